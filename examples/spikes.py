"""Detection of loss spikes, with the rank and the parameter where to look for the cause."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from turnout.models import ParallelModel
from turnout.moe.experts.sharded import local

WINDOW, FEWEST = 50, 20  # most and fewest losses to compare with
DEVIATIONS, SHARE = 8.0, 0.05  # a spike exceeds the median by more than 8 deviations and by more than 5 %


class Spike(NamedTuple):
    """A step whose loss is far above the losses before; the same on all ranks.

    Attributes:
        loss: loss of the step, in nats.
        usual: median of the losses before, in nats.
        worst: largest loss of a rank's part of the batch, in nats.
        where: rank of that loss.
        gradient: norm of the largest gradient before clipping.
        parameter: name of its parameter.
        rank: rank that has it.
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
    """Detector of spikes among a run's losses."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, loss: float, own: Tensor | float, model: ParallelModel, scale: float) -> Spike | None:
        """Add a step's loss, and return a spike if it is one. All ranks call it, before gradients are dropped.

        Args:
            loss: loss of the step, the same on all ranks.
            own: loss of this rank's part of the batch, which is read only for a spike.
            model: model with the gradients of the step.
            scale: factor by which clipping multiplied the gradients.
        """
        before, enough = list(self.losses), len(self.losses) >= FEWEST
        self.losses.append(loss)
        usual = median(before) if enough else loss
        # 1.4826 times the median deviation is the standard deviation of a normal distribution
        spread = 1.4826 * median(abs(each - usual) for each in before) if enough else 0.0
        if loss <= usual + max(DEVIATIONS * spread, SHARE * usual):
            return None
        gradients: list[tuple[float, str]] = [(0.0, "no parameter")]
        for part in model.parts:
            for name, p in part.named_parameters():
                if p.grad is not None:
                    gradients.append((float(torch.linalg.vector_norm(local(p.grad).float())) / scale, name))
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (float(own), *max(gradients)))
        where = max(range(len(said)), key=lambda rank: said[rank][0])
        rank = max(range(len(said)), key=lambda rank: said[rank][1])
        return Spike(loss, usual, said[where][0], where, *said[rank][1:], rank)
