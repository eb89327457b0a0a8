"""Checks before rows travel that all ranks exchange the same thing. If they do not, every rank raises the same error.

A rank that raises alone leaves the others waiting in a collective. So each rank sends a short note with its sizes.
All ranks read the same notes, and so they raise together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .place import LayerCall
from .plan import Plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACCEPTED, _NAN, _REFUSED = 0, 1, 2


class DispatchError(RuntimeError):
    """Ranks disagree about an exchange, one of them cannot take part, or the exchange failed. Raised on every rank.

    Attributes:
        met: index of another layer that a rank of the group was in, or -1. Passed on to ranks that did not see it.
    """

    met: int = -1


@dataclass(frozen=True)
class Note:
    """One rank's description of the coming exchange: what must be equal on all ranks, and whether it takes part."""

    state: int  # 0: takes part, 1: has NaN among its weights, 2: has raised an error
    model: int  # this field and the next seven come from the `LayerCall`; -1 if the layer has no `Place`
    layer: int
    forward: int
    training: int
    chunks: int
    parallelism: int  # which weights are gathered
    shadow: int
    max_rows: int
    dim: int
    dtype: int
    grad: int  # 1 if a backward follows, because its collectives need all ranks as well
    capacity: int  # rows per expert of a padded plan, -1 if ragged; ranks use the largest one
    met: int = -1  # on a rank that failed because it met another layer: the index of that layer

    @classmethod
    def tensor(cls, x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
        """Note of a rank that takes part, for x [T, D] and weight [T, k]: int64 [14] on x's device, no host sync."""
        padded = -1 if plan.capacity is None else plan.capacity
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        state = torch.where(weight.isnan().any(), _NAN, _ACCEPTED).unsqueeze(0)
        return torch.cat(
            [state, _to_device([*_ids(plan.call), x.shape[1], _DTYPES.index(x.dtype), int(grad), padded, -1], x.device)]
        )

    @classmethod
    def refusal(cls, device: torch.device, call: LayerCall | None = None, met: int = -1) -> Tensor:
        """Note of a rank that has failed. `met` is the layer it met, if that is why."""
        return torch.tensor([_REFUSED, *_ids(call), 0, 0, 0, 0, met], device=device)


NOTE = len(Note.__dataclass_fields__)  # int64 numbers in a note


def _ids(call: LayerCall | None) -> list[int]:
    if call is None:
        return [-1] * 8
    here = [call.place.model, call.place.layer, call.forward, int(call.training), call.chunks]
    return [*here, call.parallelism, call.shadow, call.max_rows]


def _to_device(numbers: list[int], device: torch.device) -> Tensor:
    """Copy numbers to a device. Memory is pinned, because otherwise the host waits for all queued work."""
    on_host = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def agree(notes: list[list[int]], call: LayerCall | None = None, equal_tokens: bool = False) -> int | None:
    """Read the notes of all ranks and return the capacity to use, or None if plans are ragged.

    Args:
        notes: one list of numbers for each rank, in rank order.
        call: this rank's own forward, for the names of layers in errors. None, the default, if there is no `Place`.
        equal_tokens: whether to raise if capacities differ; False, the default, takes the largest.

    Returns:
        The largest capacity of all ranks, in rows per expert. None if the plans are ragged.

    Raises:
        DispatchError: on every rank. The message names the ranks at fault and the layers they are in.
    """
    ranks = [Note(*note) for note in notes]
    where = "" if call is None else f"layer {call.place.name!r}: "
    if refused := [rank for rank, note in enumerate(ranks) if note.state == _REFUSED]:
        why = "raised an error; see its own message"
        note = ranks[refused[0]]
        if note.met >= 0:
            why = f"in {_layer(note, call)} met a rank in {_layer(replace(note, layer=note.met), call)}"
        raise DispatchError(f"{where}{told(refused)} of the expert group {why}")
    if len({replace(note, state=0, dim=0, dtype=0, grad=0, capacity=0, met=0) for note in ranks}) > 1:
        _check_calls(ranks, call)
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
            f"{where}some ranks have padded plans and some ragged ones: capacities {capacities} (in rank order of the "
            "group, -1 is ragged); give Capacity the same pad on all ranks"
        )
    if equal_tokens and len(set(capacities)) > 1:
        raise DispatchError(
            f"{where}ranks differ in the capacity that follows from their tokens: {capacities} rows per expert (in "
            "rank order of the group); equal_tokens needs the same number of tokens on all ranks, or set it to False"
        )
    return max(capacities) if max(capacities) >= 0 else None


def _check_calls(ranks: list[Note], call: LayerCall | None) -> None:
    """Raise if ranks are not all in the same forward of the same layer, and say which rank is where."""

    def differ(key: Callable[[Note], object], say: Callable[[Note], str], remedy: str) -> None:
        found: dict[str, list[int]] = {}
        for rank, note in enumerate(ranks):
            found.setdefault(say(note), []).append(rank)
        if len({key(note) for note in ranks}) > 1:
            places = "; ".join(f"{told(those)} in {what}" for what, those in found.items())
            error = DispatchError(f"ranks of the expert group are in different forwards: {places}. {remedy}")
            mine = -1 if call is None else call.place.layer
            error.met = next((note.layer for note in ranks if note.layer != mine), mine)
            raise error

    differ(
        lambda note: (note.model, note.layer),
        lambda note: _layer(note, call),
        "Call the same MoE layers in the same order on every rank; a rank without tokens calls them with x[:0]",
    )
    differ(
        lambda note: note.forward,
        lambda note: f"{_layer(note, call)}, forward {note.forward}",
        "A rank has skipped this layer before, or called it more often: call it equally often on all ranks",
    )
    differ(
        lambda note: note.training,
        lambda note: f"{_layer(note, call)}, {'training' if note.training else 'evaluation'}",
        "Call model.train() or model.eval() on all ranks",
    )
    differ(
        lambda note: note.chunks,
        lambda note: f"{_layer(note, call)}, in {note.chunks} chunks",
        "Give OverlapDispatcher the same degree on all ranks",
    )
    differ(
        lambda note: note.parallelism,
        lambda note: f"{_layer(note, call)}, parallelism {note.parallelism}",
        "Set layer.parallelism to the same number on all ranks",
    )
    differ(
        lambda note: note.shadow,
        lambda note: f"{_layer(note, call)}, {f'shadow set {note.shadow}' if note.shadow else 'without shadow'}",
        "Set layer.shadow to the same experts on all ranks",
    )
    differ(
        lambda note: note.max_rows,
        lambda note: f"{_layer(note, call)}, {f'max_rows {note.max_rows}' if note.max_rows else 'without max_rows'}",
        "Give BoundedDispatcher the same max_rows on all ranks",
    )


def _layer(note: Note, call: LayerCall | None) -> str:
    if call is None or note.model != call.place.model:
        return "a layer outside of parallelize" if note.model < 0 else f"layer {note.layer} of another model"
    return f"layer {call.place.names[note.layer]!r}"


NAN_MESSAGE = "NaN among the gate's weights: look for NaN or infinity in the layer's input or in the gate's parameters"


def told(ranks: Sequence[int]) -> str:
    """Names of ranks for an error.

    >>> told([2]), told([0, 1])
    ('rank 2', 'ranks 0, 1')
    """
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
