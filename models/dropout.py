"""Dropout (arXiv:1207.0580) of activations that may be split over ranks.

Where ranks along "tp" hold the same activation, they must drop the same elements, or they would go on with different
models; where each holds a part of it, its mask must not be that of the others. So these ranks begin with the same
seed: what is whole is dropped by torch's default generator, which stays in step on all of them, and what is split by
numbers of `own_numbers` (Megatron-LM keeps a second generator for the latter; arXiv:1909.08053, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Part(NamedTuple):
    """Which part of an activation this rank holds, of how many."""

    place: int = 0
    number: int = 1  # 1: all of it


@contextmanager
def own_numbers(part: Part, device: torch.device) -> Iterator[None]:
    """Random numbers on a device, CPU or CUDA, that are this part's alone; nothing changes with a single part.

    A seed for each part is drawn from the default generator of the CPU, and this part's is in force until the context
    ends. What is drawn inside follows from the state before it, and the state after it is that of all parts. Hence
    `torch.utils.checkpoint`, which restores torch's generators, repeats the same numbers, and a checkpoint needs no
    state but theirs.
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
    """Zeros with probability p in training, the rest divided by 1 - p; any shape.

    Attributes:
        part: of its input that this rank holds; `tensor_parallel` says so.
    """

    part: Part = Part()

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape and dtype."""
        if not self.training or not self.p:
            return x
        with own_numbers(self.part, x.device):
            return F.dropout(x, self.p)
