"""What `torch.compile` takes into its graph of a dispatch, and what runs between graphs.

A graph can hold a collective whose shapes are known when it is compiled (`exchange`). It cannot hold a handle of an
exchange under way, or a shape that the host reads in each step. A dispatch with such shapes runs `outside`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .torch_internals import all_to_all_single_autograd
from .wire import Wire, pack, unpack

Result = TypeVar("Result")
# torch 2.11 gave an autograd.Function with a collective inside a wrong backward in its graph.
KEEPS_BACKWARDS = torch.__version__ >= "2.13"


class Arrived(NamedTuple):
    """An exchange inside a graph, in place of a `collectives.Travel`. The compiler decides when to wait."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        """The received tensors."""
        return self.tensors


def exchange(
    tensors: tuple[Tensor, ...],
    send: list[int] | None,
    recv: list[int] | None,
    group: ProcessGroup | None,
    wire: Wire | None,
) -> Arrived:
    """`collectives.all_to_all_start` inside a graph. If it fails there, the error is the backend's own."""
    first, *others = tensors
    came = _plain(first, send, recv, group) if wire is None else _Compressed.apply(first, send, recv, group, wire)
    return Arrived((came, *(_plain(t, send, recv, group) for t in others)))  # pyright: ignore[reportArgumentType]


def _plain(x: Tensor, send: list[int] | None, recv: list[int] | None, group: ProcessGroup | None) -> Tensor:
    return all_to_all_single_autograd(x.contiguous(), recv, send, group or dist.group.WORLD)  # pyright: ignore[reportArgumentType]


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, recv, group, wire):
        ctx.back = recv, send, group, "bf16"
        rows = pack(x, wire).contiguous()
        came = rows.new_empty(rows.shape[0] if recv is None else sum(recv), *rows.shape[1:])
        dist.all_to_all_single(came, rows, recv, send, group=group)
        return unpack(came, wire, x.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Compressed.apply(grad, *ctx.back), None, None, None, None


class Sealed:
    """Hides values that change in each step from `torch.compile`, which guards every number and size that it sees."""

    def __init__(self, content: Any) -> None:
        self.content = content


@torch.compiler.disable(reason="sizes or state of this step, which no graph can hold")
def outside(run: Callable[..., Result], *args) -> Result:
    """Call run(*args) between two graphs."""
    return run(*args)
