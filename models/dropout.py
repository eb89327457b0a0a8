"""Dropout (arXiv:1207.0580) that is right under tensor parallelism.

Ranks along "tp" must drop the same elements of an activation that all of them hold. Of an activation that is split,
each rank must drop other elements than the others. So these ranks start with the same seed. Whole activations use
torch's default generator, which then draws the same on all of them. Split ones use `own_numbers`. Megatron-LM keeps a
second generator for the split ones (arXiv:1909.08053, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Part(NamedTuple):
    """This rank's part of an activation that is split over ranks."""

    place: int = 0  # index of the part, from 0
    number: int = 1  # number of parts; 1: this rank has all of it


@contextmanager
def own_numbers(part: Part, device: torch.device) -> Iterator[None]:
    """Context in which the device's default generator draws other random numbers for each part.

    The CPU's default generator draws one seed for each part. This part's seed is in force until the context ends.
    Then the generator goes on from its state before, the same for all parts. All numbers follow from torch's default
    generators. So `torch.utils.checkpoint` repeats them, and a checkpoint saves no other state.

    Args:
        part: this rank's part. With a single part nothing changes.
        device: CPU, or a CUDA device.
    """
    if part.number == 1:
        yield
        return
    seed = int(torch.randint(2**62, (part.number,), device="cpu")[part.place])
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class Dropout(nn.Module):
    """Dropout: in training each element becomes 0 with probability p, and the others are divided by 1 - p.

    Attributes:
        p: probability, in [0, 1).
        part: this rank's part of the input; `tensor_parallel` and `context_parallel` set it.
    """

    part: Part = Part()

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Tensor of any shape and floating dtype -> the same shape and dtype."""
        if not self.training or not self.p:
            return x
        with own_numbers(self.part, x.device):
            return F.dropout(x, self.p)
