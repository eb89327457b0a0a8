"""Inputs of a step: checked on every rank before any rank waits for another, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from ..loss import IGNORED
from ..t5 import T5

Inputs = Tensor | tuple[Tensor | None, ...]  # in the order of the model's arguments; None is an input that is left out


def check_batch(targets: Tensor, micro_batches: int) -> None:
    """Raise a ValueError if a batch [B, S] is empty, or does not split into equal micro-batches."""
    if len(targets) % micro_batches or not len(targets):
        raise ValueError(
            f"a batch of {len(targets)} sequences does not split into {micro_batches} micro-batches; use a multiple of "
            f"{micro_batches}"
        )


def checked(model: Any, given: Inputs, rows: int | None = None) -> tuple[Tensor | None, ...]:
    """Inputs of a GPT, BERT or T5 as a tuple, after its `check_inputs`.

    Args:
        model: the model, or a pipeline stage of it.
        given: its inputs.
        rows: number of sequences that all inputs must have. None, the default, takes the first input's.

    Raises:
        ValueError: more or fewer inputs than the model takes, other numbers of sequences, or inputs that do not fit.
        TypeError: an input that is no tensor.
    """
    inputs = given if isinstance(given, tuple) else (given,)
    if wrong := [x for x in inputs if not (x is None or isinstance(x, Tensor))]:
        raise TypeError(f"inputs must be a tensor or a tuple of tensors; got {type(wrong[0]).__name__}")
    takes = signature(model.check_inputs).parameters
    needed = sum(each.default is Parameter.empty for each in takes.values())
    if len(inputs) > len(takes) or sum(x is not None for x in inputs[:needed]) < needed:
        optional = "" if needed == len(takes) else f", and may take {', '.join([*takes][needed:])}"
        got = ", ".join("None" if x is None else "a tensor" for x in inputs) or "nothing"
        raise ValueError(f"the model takes {', '.join([*takes][:needed])}{optional}; got {got}")
    first, *_ = inputs
    assert first is not None
    rows = len(first) if rows is None else rows
    if others := {len(x) for x in inputs if x is not None} - {rows}:
        raise ValueError(f"inputs and targets must be of as many sequences; got {others.pop()} and {rows}")
    model.check_inputs(*inputs)
    return inputs


def check_targets(model: Any, inputs: Sequence[Tensor | None], targets: Tensor) -> None:
    """Raise a ValueError unless targets are int64, one for each position of the logits, of at least one sequence."""
    if not len(targets):
        raise ValueError(f"a batch needs at least one sequence; got targets {tuple(targets.shape)}")
    read = inputs[1 if isinstance(model, T5) else 0]
    assert read is not None
    if targets.shape != read.shape or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 {tuple(read.shape)}; got {targets.dtype} {tuple(targets.shape)}")


def pieces(columns: Sequence[Tensor | None], number: int) -> list[tuple[Any, ...]]:
    """Inputs and targets [B, S] in `number` parts of whole sequences, without those that have none.

    >>> [(len(x), mask) for x, mask in pieces((torch.zeros(3, 8), None), number=4)]
    [(1, None), (1, None), (1, None)]
    """
    cut = ([None] * number if x is None else x.tensor_split(number) for x in columns)
    return [piece for piece in zip(*cut, strict=True) if len(piece[0])]


def share(part: Tensor, targets: Tensor) -> float:
    """Share of a batch's targets that are in a part of it, leaving out -100; NaN if the batch has none.

    >>> targets = torch.tensor([[1, 2], [3, -100], [-100, -100]])
    >>> [round(share(row, targets), 2) for row in targets]
    [0.67, 0.33, 0.0]
    """
    number, whole = (int((each != IGNORED).sum()) for each in (part, targets))
    return number / whole if whole else float("nan")
