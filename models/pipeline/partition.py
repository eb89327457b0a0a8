"""Pipeline partition: which blocks each stage has, which rank runs it, and equal FLOPs per stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blocks import active_parameters
from ..gpt import GPT, GPTConfig, check_gpt

PER_RANK = {  # schedule: fewest and most stages on one rank
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved1f1b": (2, None),
    "interleaved_zb": (2, None),
    "zbv": (2, 2),
}


@dataclass(frozen=True)
class Stages:
    """Partition of a model into pipeline stages, each a range of consecutive blocks. Make it by `Stages.of`.

    Rank r runs the stages r, r + ranks, r + 2 * ranks and so on (Megatron-LM, arXiv:2104.04473, section 2.2). With the
    schedule "zbv" it runs r and 2 * ranks - 1 - r, so rank 0 has the first and the last stage (arXiv:2401.10241,
    section 6).

    Attributes:
        config: sizes of the whole model.
        schedule: name of the schedule.
        ranks: number of ranks of the pipeline, P.
        blocks: range of blocks of each stage, from the first stage to the last.

    >>> stages = Stages.of(GPTConfig(layers=8), "1f1b", ranks=4)
    >>> stages.blocks, stages.of_rank(1)
    ((range(0, 2), range(2, 4), range(4, 6), range(6, 8)), [1])
    """

    config: GPTConfig
    schedule: str
    ranks: int
    blocks: tuple[range, ...]

    @classmethod
    def of(cls, config: GPTConfig, schedule: str, ranks: int, per_rank: int | None = None) -> Stages:
        """Cut a model so that the stage with most FLOPs has as few as possible. The last stage has the head as well.

        Args:
            config: sizes of the whole model.
            schedule: ``"gpipe"`` (arXiv:1811.06965), ``"1f1b"``, ``"interleaved1f1b"`` (both arXiv:2104.04473),
                ``"interleaved_zb"`` or ``"zbv"`` (ZB-1P, interleaved, and ZB-V of arXiv:2401.10241).
            ranks: number of ranks of the pipeline, P.
            per_rank: number of stages on each rank. None, the default, is the fewest that the schedule allows, 1 or 2.

        Raises:
            ValueError: an unknown schedule, a number of stages that it does not allow, or fewer layers than stages.
            TypeError: a config that is no `GPTConfig`.
        """
        check_gpt(config, "a pipeline")
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
        """Indices of the stages that a rank runs, ascending."""
        if self.schedule == "zbv":
            return [rank, 2 * self.ranks - 1 - rank]
        return list(range(rank, len(self.blocks), self.ranks))

    def rank_of(self, stage: int) -> int:
        """Rank that runs a stage."""
        folded = self.schedule == "zbv" and stage >= self.ranks
        return len(self.blocks) - 1 - stage if folded else stage % self.ranks

    def build(self, rank: int) -> list[GPT]:
        """Build the stages of a rank, with the initial values that ``GPT(config)`` has under the same seed.

        Each stage draws random numbers for the whole model, from torch's default generator. Memory holds the blocks of
        the rank and one more. The first and the last stage each have a copy of a tied embedding.
        """
        *others, last = self.of_rank(rank)
        parts = []
        for stage in others:
            with torch.random.fork_rng(devices=[]):
                parts.append(GPT(self.config, self.blocks[stage]))
        return [*parts, GPT(self.config, self.blocks[last])]


def flops(config: GPTConfig) -> list[int]:
    """FLOPs of a token's forward and backward in each block; the last includes the head, embedding costs nothing."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = GPT(config)
    width, spans = 12 * config.heads * config.head_size, [config.window(i) for i in range(config.layers)]
    costs = [
        6 * active_parameters(block) + width * min(span or config.seq_len, config.seq_len)
        for block, span in zip(model.blocks, spans, strict=True)
    ]
    costs[-1] += 6 * config.vocab * config.dim
    for depth in model.mtp:
        costs[-1] += 6 * active_parameters(depth) + width * config.seq_len + 6 * config.vocab * config.dim
    return costs


def cut(costs: list[int], stages: int) -> tuple[range, ...]:
    """Cut blocks into consecutive ranges, none empty, so that the largest cost of a range is as small as possible.

    Among equal cuts the smallest sum of squared costs wins, so the other ranges are even as well.

    >>> cut([1, 1, 1, 3], stages=2)
    (range(0, 3), range(3, 4))
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
