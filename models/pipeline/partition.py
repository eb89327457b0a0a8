"""How a model is cut into the stages of a pipeline: which blocks a stage has, and which rank runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blocks import active_parameters
from ..gpt import GPT, GPTConfig

PER_RANK = {  # stages on one rank: at least, at most
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved1f1b": (2, None),
    "interleaved_zb": (2, None),
    "zbv": (2, 2),
}


@dataclass(frozen=True)
class Stages:
    """A model cut into stages, each a range of consecutive blocks, for the ranks of a pipeline.

    The stages of rank r are r, r + ranks, r + 2 * ranks and so on (Megatron-LM, arXiv:2104.04473, section 2.2); with
    the schedule "zbv" they are r and 2 * ranks - 1 - r, so that the first and the last stage are on one rank
    (arXiv:2401.10241, section 6).

    Attributes:
        config: the whole model's.
        schedule: a name of `PER_RANK`.
        ranks: of the pipeline, P.
        blocks: of each stage, in the order in which a token meets them.
    """

    config: GPTConfig
    schedule: str
    ranks: int
    blocks: tuple[range, ...]

    @classmethod
    def of(cls, config: GPTConfig, schedule: str, ranks: int, per_rank: int | None = None) -> Stages:
        """Cut a model so that the stage with most FLOPs has as few as possible; the last one has the head as well.

        Args:
            config: of the model.
            schedule: ``"gpipe"`` (arXiv:1811.06965), ``"1f1b"``, ``"interleaved1f1b"`` (both arXiv:2104.04473),
                ``"interleaved_zb"`` or ``"zbv"`` (ZB-1P, interleaved, and ZB-V of arXiv:2401.10241).
            ranks: that the model is cut for.
            per_rank: stages on each rank; None: the fewest that the schedule is made for, 1 or 2.

        Raises:
            ValueError: a name or number that does not fit, saying what does.
        """
        if schedule not in PER_RANK:
            raise ValueError(f"schedule must be one of {', '.join(PER_RANK)}; got {schedule!r}")
        least, most = PER_RANK[schedule]
        per_rank = least if per_rank is None else per_rank
        if ranks < 1 or per_rank < least or per_rank > (most or per_rank):
            raise ValueError(
                f"{schedule} runs {least if most == least else f'{least} or more'} stages on each of 1 or more ranks; "
                f"got per_rank={per_rank}, ranks={ranks}"
            )
        if config.layers < ranks * per_rank:
            raise ValueError(
                f"{config.layers} layers cannot fill {ranks} ranks x {per_rank} stages; use more layers, fewer ranks, "
                "or a schedule with fewer stages on each"
            )
        return cls(config, schedule, ranks, cut(flops(config), ranks * per_rank))

    def of_rank(self, rank: int) -> list[int]:
        """The stages that a rank runs, ascending."""
        if self.schedule == "zbv":
            return [rank, 2 * self.ranks - 1 - rank]
        return list(range(rank, len(self.blocks), self.ranks))

    def rank_of(self, stage: int) -> int:
        """The rank that runs a stage."""
        folded = self.schedule == "zbv" and stage >= self.ranks
        return len(self.blocks) - 1 - stage if folded else stage % self.ranks

    def build(self, rank: int) -> list[GPT]:
        """The stages of a rank, with the initial values they have in ``GPT(config)`` under the same seed.

        Random numbers are drawn for the whole model, from torch's default generator; at any time the blocks of the
        rank and one more are in memory. Both ends hold a tied embedding, each a copy of its own.
        """
        *others, last = self.of_rank(rank)
        parts = []
        for stage in others:
            with torch.random.fork_rng(devices=[]):
                parts.append(GPT(self.config, self.blocks[stage]))
        return [*parts, GPT(self.config, self.blocks[last])]


def flops(config: GPTConfig) -> list[int]:
    """Forward and backward FLOPs of a token in each block; the head counts to the last one, a look-up costs nothing."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = GPT(config)
    attention = 12 * config.heads * config.head_size * config.seq_len
    costs = [6 * active_parameters(block) + attention for block in model.blocks]
    costs[-1] += 6 * config.vocab * config.dim
    return costs


def cut(costs: list[int], stages: int) -> tuple[range, ...]:
    """Consecutive ranges, none of them empty, of which the most costly one costs as little as possible.

    Among equals, the one with the smallest sum of squares: what is left over is spread as well.
    """
    best: dict[int, tuple[int, int, tuple[range, ...]]] = {0: (0, 0, ())}
    for _ in range(stages):
        longer: dict[int, tuple[int, int, tuple[range, ...]]] = {}
        for start, (most, squares, ranges) in best.items():
            cost = 0
            for stop in range(start + 1, len(costs) + 1):
                cost += costs[stop - 1]
                found = max(most, cost), squares + cost**2, (*ranges, range(start, stop))
                if stop not in longer or found[:2] < longer[stop][:2]:
                    longer[stop] = found
        best = longer
    return best[len(costs)][2]
