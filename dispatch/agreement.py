"""What ranks must agree on before rows travel, and how all of them learn that they do not.

A rank that raises alone leaves the others waiting in a collective. So each rank sends a short note to
every other, beside the sizes; all of them read the same notes and raise the same error together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACCEPTED, _NAN, _REFUSED = 0, 1, 2


class DispatchError(RuntimeError):
    """Ranks disagree on what to exchange, one of them cannot take part, or an exchange failed; raised on every rank."""


@dataclass(frozen=True)
class Note:
    """One rank's view of the exchange to come: everything that must be equal, and whether it takes part."""

    state: int  # 0 takes part, 1 has NaN among its weights, 2 raised an error of its own
    dim: int
    dtype: int
    grad: int  # 1 where a backward will follow: the way back has collectives as well
    capacity: int  # rows per expert of a padded plan, -1 if ragged; the largest one counts

    @classmethod
    def tensor(cls, x: Tensor, weight: Tensor, capacity: int | None) -> Tensor:
        """The note for x [T, D] and weight [T, k], int64 [5] on x's device, without a host sync."""
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        padded = -1 if capacity is None else capacity
        state = torch.where(weight.isnan().any(), _NAN, _ACCEPTED)
        # Filled on the device: torch.tensor would copy from the host, and wait for all that the device still has to do.
        known = (torch.full_like(state, n) for n in (x.shape[1], _DTYPES.index(x.dtype), int(grad), padded))
        return torch.stack([state, *known])

    @classmethod
    def refusal(cls, device: torch.device) -> Tensor:
        """The note of a rank that has failed and says so."""
        return torch.tensor([_REFUSED, 0, 0, 0, 0], device=device)


NOTE = len(Note.__dataclass_fields__)  # int64 numbers a note takes


def agree(notes: list[list[int]]) -> int | None:
    """Read the notes of all ranks, in rank order; returns the capacity to use, None if ragged.

    Raises:
        DispatchError: with the same text on every rank, naming the ranks at fault.
    """
    ranks = [Note(*note) for note in notes]
    _refuse_if([r for r, note in enumerate(ranks) if note.state == _REFUSED], "raised an error; see its own message")
    _refuse_if([r for r, note in enumerate(ranks) if note.state == _NAN], _NAN_MESSAGE)
    for name, what, remedy in (
        ("dim", "the model width", "build the same layer on every rank"),
        ("dtype", "the dtype of the tokens", "use one dtype and the same autocast on every rank"),
        ("grad", "whether a backward will follow", "train or evaluate (torch.no_grad) on all ranks at once"),
    ):
        values = [getattr(note, name) for note in ranks]
        if len(set(values)) > 1:
            shown = [str(_DTYPES[v]) for v in values] if name == "dtype" else values
            raise DispatchError(f"ranks differ in {what}: {shown} (in rank order of the group); {remedy}")
    capacities = [note.capacity for note in ranks]
    if min(capacities) < 0 <= max(capacities):
        raise DispatchError(f"some ranks send padded rows and some ragged ones: capacities {capacities}; set pad alike")
    return max(capacities) if max(capacities) >= 0 else None


def check_weight(weight: Tensor) -> None:
    """Raise ValueError on NaN weights where looking is free: on a CPU, eagerly. Elsewhere see `stats`."""
    if weight.device.type == "cpu" and not torch.compiler.is_compiling() and bool(weight.isnan().any()):
        raise ValueError(f"the gate produced {_NAN_MESSAGE}")


_NAN_MESSAGE = "NaN among the gate's weights: look for NaN or infinity in the layer's input or in the gate's parameters"


def _refuse_if(ranks: list[int], why: str) -> None:
    if ranks:
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        raise DispatchError(f"{names} of the expert group: {why}")
