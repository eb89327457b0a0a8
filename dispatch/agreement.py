"""What ranks must agree on before rows travel, and how all of them learn that they do not.

A rank that raises alone leaves the others waiting in a collective. So each rank sends a short note to
every other, beside the sizes; all of them read the same notes and raise the same error together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .place import Visit
from .plan import Plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACCEPTED, _NAN, _REFUSED = 0, 1, 2


class DispatchError(RuntimeError):
    """Ranks disagree on what to exchange, one of them cannot take part, or an exchange failed; raised on every rank.

    Attributes:
        met: the layer of a rank that was in another forward, -1 if that was not it: for ranks that have not seen it.
    """

    met: int = -1


@dataclass(frozen=True)
class Note:
    """One rank's view of the exchange to come: everything that must be equal, and whether it takes part."""

    state: int  # 0 takes part, 1 has NaN among its weights, 2 raised an error of its own
    model: int  # these seven are the `Visit`: which layer, which forward; -1 if the layer has no place
    layer: int
    forward: int
    training: int
    chunks: int
    parallelism: int  # which weights are gathered
    shadow: int
    dim: int
    dtype: int
    grad: int  # 1 where a backward will follow: the way back has collectives as well
    capacity: int  # rows per expert of a padded plan, -1 if ragged; the largest one counts
    met: int = -1  # of a rank that has failed because it met another layer: which

    @classmethod
    def tensor(cls, x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
        """The note for x [T, D] and weight [T, k], int64 [13] on x's device, without a host sync."""
        padded = -1 if plan.capacity is None else plan.capacity
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        state = torch.where(weight.isnan().any(), _NAN, _ACCEPTED).unsqueeze(0)
        return torch.cat(
            [state, _copied([*_which(plan.visit), x.shape[1], _DTYPES.index(x.dtype), int(grad), padded, -1], x.device)]
        )

    @classmethod
    def refusal(cls, device: torch.device, visit: Visit | None = None, met: int = -1) -> Tensor:
        """The note of a rank that has failed and says so, and the layer it has met if that is why."""
        return torch.tensor([_REFUSED, *_which(visit), 0, 0, 0, 0, met], device=device)


NOTE = len(Note.__dataclass_fields__)  # int64 numbers a note takes


def _which(visit: Visit | None) -> list[int]:
    if visit is None:
        return [-1] * 7
    here = [visit.place.model, visit.place.layer, visit.forward, int(visit.training), visit.chunks]
    return [*here, visit.parallelism, visit.shadow]


def _copied(numbers: list[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device. From pinned memory, or the host would wait for all that the device has to do."""
    on_host = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def agree(notes: list[list[int]], visit: Visit | None = None, equal_tokens: bool = False) -> int | None:
    """Read the notes of all ranks, in rank order; returns the capacity to use, None if ragged.

    Args:
        notes: one list for each rank.
        visit: this rank's own, for the names of layers.
        equal_tokens: raise where capacities differ, instead of taking the largest.

    Raises:
        DispatchError: on every rank, naming the ranks at fault and the layers they are in.
    """
    ranks = [Note(*note) for note in notes]
    where = "" if visit is None else f"layer {visit.place.name!r}: "
    if refused := [rank for rank, note in enumerate(ranks) if note.state == _REFUSED]:
        why = "raised an error; see its own message"
        note = ranks[refused[0]]
        if note.met >= 0:
            why = f"in {_layer(note, visit)} met a rank in {_layer(replace(note, layer=note.met), visit)}"
        raise DispatchError(f"{where}{told(refused)} of the expert group {why}")
    if len({replace(note, state=0, dim=0, dtype=0, grad=0, capacity=0, met=0) for note in ranks}) > 1:
        _check_visits(ranks, visit)
    if nan := [rank for rank, note in enumerate(ranks) if note.state == _NAN]:
        raise DispatchError(f"{where}{told(nan)} of the expert group: {NAN_MESSAGE}")
    for name, what, remedy in (
        ("dim", "the model width", "build the same layer on every rank"),
        ("dtype", "the dtype of the tokens", "use one dtype and the same autocast on every rank"),
        ("grad", "whether a backward will follow", "train or evaluate (torch.no_grad) on all ranks at once"),
    ):
        values = [getattr(note, name) for note in ranks]
        if len(set(values)) > 1:
            shown = [str(_DTYPES[v]) for v in values] if name == "dtype" else values
            raise DispatchError(f"{where}ranks differ in {what}: {shown} (in rank order of the group); {remedy}")
    capacities = [note.capacity for note in ranks]
    if min(capacities) < 0 <= max(capacities):
        raise DispatchError(
            f"{where}some ranks send padded rows and some ragged ones: capacities {capacities}; set pad alike"
        )
    if equal_tokens and len(set(capacities)) > 1:
        raise DispatchError(
            f"{where}ranks differ in the capacity that follows from their tokens: {capacities} rows an expert (in rank "
            "order of the group); equal_tokens promises the same number of tokens on all ranks"
        )
    return max(capacities) if max(capacities) >= 0 else None


def _check_visits(ranks: list[Note], visit: Visit | None) -> None:
    """Raise where ranks are not all in the same forward of the same layer, naming who is where."""

    def differ(key: Callable[[Note], object], say: Callable[[Note], str], remedy: str) -> None:
        found: dict[str, list[int]] = {}
        for rank, note in enumerate(ranks):
            found.setdefault(say(note), []).append(rank)
        if len({key(note) for note in ranks}) > 1:
            places = "; ".join(f"{told(those)} in {what}" for what, those in found.items())
            error = DispatchError(f"ranks of the expert group are in different forwards: {places}. {remedy}")
            mine = -1 if visit is None else visit.place.layer
            error.met = next((note.layer for note in ranks if note.layer != mine), mine)
            raise error

    differ(
        lambda note: (note.model, note.layer),
        lambda note: _layer(note, visit),
        "Every rank has to call the same MoE layers in the same order; without tokens for one, call it with x[:0]",
    )
    differ(
        lambda note: note.forward,
        lambda note: f"{_layer(note, visit)}, forward {note.forward}",
        "A rank has skipped this layer before, or called it once more than the others",
    )
    differ(
        lambda note: note.training,
        lambda note: f"{_layer(note, visit)}, {'training' if note.training else 'evaluation'}",
        "Call model.train() or model.eval() on all ranks",
    )
    differ(
        lambda note: note.chunks,
        lambda note: f"{_layer(note, visit)}, in {note.chunks} chunks",
        "Give OverlapDispatcher the same degree on all ranks",
    )
    differ(
        lambda note: note.parallelism,
        lambda note: f"{_layer(note, visit)}, parallelism {note.parallelism}",
        "Set layer.parallelism to the same number on all ranks",
    )
    differ(
        lambda note: note.shadow,
        lambda note: f"{_layer(note, visit)}, {f'shadow set {note.shadow}' if note.shadow else 'without shadow'}",
        "Set layer.shadow to the same experts on all ranks",
    )


def _layer(note: Note, visit: Visit | None) -> str:
    if visit is None or note.model != visit.place.model:
        return "a layer without a place" if note.model < 0 else f"layer {note.layer} of another model"
    return f"layer {visit.place.names[note.layer]!r}"


NAN_MESSAGE = "NaN among the gate's weights: look for NaN or infinity in the layer's input or in the gate's parameters"


def told(ranks: Sequence[int]) -> str:
    """Ranks as messages name them: "rank 2", "ranks 0, 1"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
