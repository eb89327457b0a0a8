"""What `torch.compile` can see of a trip, and what it has to leave out.

Its graphs hold collectives whose shapes are known when they are made (`exchange`). They hold no handle of an exchange
under way, and no shape that the host reads from a device in each step: such trips are taken `outside`, between graphs.
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
# Before, a Function with a collective inside got another backward in the graph than its own (seen with torch 2.11).
KEEPS_BACKWARDS = torch.__version__ >= "2.13"


class Arrived(NamedTuple):
    """An exchange in a graph, in place of a `collectives.Travel`: the compiler says when to wait."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        """What came."""
        return self.tensors


def exchange(
    tensors: tuple[Tensor, ...],
    send: list[int] | None,
    recv: list[int] | None,
    group: ProcessGroup | None,
    wire: Wire | None,
) -> Arrived:
    """`collectives.all_to_all_start` inside a graph; an error on the wire is the backend's own there."""
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
    """Hides from `torch.compile` what changes from step to step: of what it sees it checks every number and size."""

    def __init__(self, content: Any) -> None:
        self.content = content


@torch.compiler.disable(reason="sizes or state of this step, which no graph can hold")
def outside(run: Callable[..., Result], *args) -> Result:
    """run(*args) between two graphs."""
    return run(*args)
