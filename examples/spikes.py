"""Loss spikes: when one happened, and where to look for its cause."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from turnout.models import ParallelModel

WINDOW, FEWEST = 50, 20  # losses to compare with, and how many of them there must be
DEVIATIONS, SHARE = 8.0, 0.05  # a spike is further above the median than so many deviations and this share of it


class Spike(NamedTuple):
    """A step whose loss is far above those before; the same on all ranks.

    Attributes:
        loss, usual: of the step, and the median before it, in nats.
        worst, where: the largest loss of a rank's part of the batch, and the rank.
        gradient, parameter, rank: the norm of the largest gradient before clipping, its parameter's name, and a rank
            that has it.
    """

    loss: float
    usual: float
    worst: float
    where: int
    gradient: float
    parameter: str
    rank: int

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.3f} is a spike: the median was {self.usual:.3f}. It is highest on rank {self.where} "
            f"({self.worst:.3f}). {self.parameter} has the largest gradient, of norm {self.gradient:.3g}, on rank "
            f"{self.rank}"
        )


class Spikes:
    """Watches the losses of a run."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, loss: float, own: Tensor | float, model: ParallelModel, scale: float) -> Spike | None:
        """Take note of a step's loss, while its gradients are there. All ranks call it.

        Args:
            loss: of the step, the same on all ranks.
            own: of this rank's part of the batch; read if there is a spike.
            scale: by which gradients were multiplied when they were clipped.
        """
        before, enough = list(self.losses), len(self.losses) >= FEWEST
        self.losses.append(loss)
        usual = median(before) if enough else loss
        spread = 1.4826 * median(abs(each - usual) for each in before) if enough else 0.0  # as a normal's deviation
        if loss <= usual + max(DEVIATIONS * spread, SHARE * usual):
            return None
        gradients: list[tuple[float, str]] = [(0.0, "no parameter")]
        for part in model.parts:
            for name, p in part.named_parameters():
                if p.grad is not None:
                    held = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                    gradients.append((float(torch.linalg.vector_norm(held.float())) / scale, name))
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (float(own), *max(gradients)))
        where = max(range(len(said)), key=lambda rank: said[rank][0])
        rank = max(range(len(said)), key=lambda rank: said[rank][1])
        return Spike(loss, usual, said[where][0], where, *said[rank][1:], rank)
