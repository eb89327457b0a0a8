"""Parameters of which several pipeline stages have a copy, such as an embedding that is the head as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ...moe.experts.sharded import local
from .partition import Stages


class SharedParameters:
    """This rank's copies of parameters that several stages have (`Stages.shared`).

    Args:
        stages: partition of the model.
        parts: the stages of this rank, by their index.
        group: ranks of the pipeline.
    """

    def __init__(self, stages: Stages, parts: Mapping[int, nn.Module], group: ProcessGroup) -> None:
        self.stages, self.group = stages, group
        self.held = [
            (holders, {stage: parts[stage].get_parameter(name) for stage in holders if stage in parts})
            for name, holders in stages.shared().items()
        ]

    def parameters(self) -> list[nn.Parameter]:
        """All copies on this rank."""
        return [p for _, copies in self.held for p in copies.values()]

    def copies(self) -> list[nn.Parameter]:
        """Copies that do not count in a norm: all but those in the first stage that has the parameter."""
        return [p for (first, *_), copies in self.held for stage, p in copies.items() if stage != first]

    def sum_gradients(self) -> None:
        """Give all copies the sum of their gradients, so that they stay equal, bit for bit."""
        exchange: list[dist.P2POp] = []
        sums: list[tuple[list[Tensor], list[Tensor]]] = []  # gradients of this rank's copies; summands of all ranks
        for holders, copies in self.held:
            grads = [_gradient(p) for p in copies.values() if p.requires_grad]
            if not grads:
                continue
            mine = grads[0].contiguous()
            for grad in grads[1:]:
                mine.add_(grad)
            summands = []
            for rank in sorted({self.stages.rank_of(stage) for stage in holders}):  # all ranks add in this order
                if rank == dist.get_rank(self.group):
                    summands.append(mine)
                    continue
                summands.append(torch.empty_like(mine))
                exchange.append(dist.P2POp(dist.isend, mine, group=self.group, group_peer=rank))
                exchange.append(dist.P2POp(dist.irecv, summands[-1], group=self.group, group_peer=rank))
            sums.append((grads, summands))
        for work in dist.batch_isend_irecv(exchange) if exchange else ():
            work.wait()
        for grads, (total, *others) in sums:
            for each in others:
                total.add_(each)
            for grad in grads:
                grad.copy_(total)


def _gradient(p: nn.Parameter) -> Tensor:
    """This rank's part of a parameter's gradient, which is zero if there is none."""
    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if isinstance(p, DTensor):  # with tensor parallelism, embedding and head give gradients of two placements
        p.grad = cast(DTensor, p.grad).redistribute(placements=p.placements)
    return local(cast(Tensor, p.grad))
