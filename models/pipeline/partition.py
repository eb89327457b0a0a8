"""Pipeline partition: which blocks each stage has, which rank runs it, and equal FLOPs per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..bert import BERT, BERTConfig
from ..blocks import active_parameters
from ..gpt import GPT, GPTConfig
from ..t5 import T5, T5Config

PER_RANK = {  # schedule: fewest and most stages on one rank
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved1f1b": (2, None),
    "interleaved_zb": (2, None),
    "zbv": (2, 2),
}
Config = GPTConfig | BERTConfig | T5Config
Model = GPT | BERT | T5


@dataclass(frozen=True)
class Stages:
    """Partition of a model into pipeline stages, each a range of consecutive blocks. Make it by `Stages.of`.

    A T5's blocks are the encoder's, then the decoder's. One stage may have blocks of both.

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

    config: Config
    schedule: str
    ranks: int
    blocks: tuple[range, ...]

    @classmethod
    def of(cls, config: Config, schedule: str, ranks: int, per_rank: int | None = None) -> Stages:
        """Cut a model so that the stage with most FLOPs has as few as possible. The last stage has the head as well.

        Sequences count as ``config.seq_len`` long, and the target of a T5 as a fifth of that, as for its training task
        (`turnout.models.corrupt_spans`).

        Args:
            config: sizes of the whole model, of a GPT, BERT or T5.
            schedule: ``"gpipe"`` (arXiv:1811.06965), ``"1f1b"``, ``"interleaved1f1b"`` (both arXiv:2104.04473),
                ``"interleaved_zb"`` or ``"zbv"`` (ZB-1P, interleaved, and ZB-V of arXiv:2401.10241).
            ranks: number of ranks of the pipeline, P.
            per_rank: number of stages on each rank. None, the default, is the fewest that the schedule allows, 1 or 2.

        Raises:
            ValueError: an unknown schedule, a number of stages that it does not allow, or fewer blocks than stages.
            TypeError: a config of another model.
        """
        check_config(config, "a pipeline")
        if schedule not in PER_RANK:
            raise ValueError(f"schedule must be one of {', '.join(PER_RANK)}; got {schedule!r}")
        least, most = PER_RANK[schedule]
        per_rank = least if per_rank is None else per_rank
        if ranks < 1 or per_rank < least or per_rank > (most or per_rank):
            raise ValueError(
                f"{schedule} runs {least if most == least else f'{least} or more'} stages on each of 1 or more ranks; "
                f"got per_rank={per_rank}, ranks={ranks}"
            )
        if config.num_blocks < ranks * per_rank:
            raise ValueError(
                f"{config.num_blocks} layers cannot fill {ranks} ranks x {per_rank} stages; use more layers, fewer "
                "ranks, or a schedule with fewer stages on each"
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

    def build(self, rank: int) -> list[Model]:
        """Build the stages of a rank, with the initial values that the whole model has under the same seed.

        Each stage draws random numbers for the whole model, from torch's default generator. Memory holds the blocks of
        the rank and one more. Stages have copies of parameters that they share (`shared`).
        """
        *others, last = self.of_rank(rank)
        parts = []
        for stage in others:
            with torch.random.fork_rng(devices=[]):
                parts.append(model_of(self.config, self.blocks[stage]))
        return [*parts, model_of(self.config, self.blocks[last])]

    def shared(self) -> dict[str, list[int]]:
        """Stages that have a copy of a parameter, by its name, for each parameter that several stages have.

        The first and the last stage share an embedding that is the head as well. Of a T5, the stage with the decoder's
        first block has it, too, and the stages of each stack share its table of biases.

        >>> Stages.of(T5Config(layers=2, decoder_layers=4), "1f1b", ranks=3).shared()
        {'embed.weight': [0, 1, 2], 'encoder_bias.weight': [0, 1], 'decoder_bias.weight': [1, 2]}
        """
        config, held = self.config, list(enumerate(self.blocks))
        found: dict[str, list[int]] = {}
        if isinstance(config, T5Config):
            looks_up = {0, config.layers, config.num_blocks - 1}
            found["embed.weight"] = [stage for stage, blocks in held if looks_up & {*blocks}]
            found["encoder_bias.weight"] = [stage for stage, blocks in held if blocks.start < config.layers]
            found["decoder_bias.weight"] = [stage for stage, blocks in held if blocks.stop > config.layers]
        elif isinstance(config, BERTConfig) or config.tied or config.mtp:
            found["embed.weight"] = sorted({0, len(held) - 1})
        return {name: stages for name, stages in found.items() if len(stages) > 1}

    def lengths(self, stage: int, inputs: Sequence[int]) -> list[int]:
        """Lengths of the hidden states that a stage returns, for input sequences of these lengths.

        They are the one length of a GPT or BERT. A T5 reads M and S tokens. Stages of its encoder return hidden states
        of M positions. Stages of its decoder return hidden states of S, then the memory of M.
        """
        decodes = isinstance(self.config, T5Config) and self.blocks[stage].stop > self.config.layers
        return [inputs[1], inputs[0]] if decodes else [inputs[0]]


def check_config(config: object, what: str) -> None:
    """Raise a TypeError if a config is of a model other than GPT, BERT and T5."""
    if not isinstance(config, Config):
        raise TypeError(
            f"{what} splits a GPT, BERT or T5; got {type(config).__name__}: spread experts and batches of any model by "
            "parallelize(model, mesh) and FSDP2"
        )


def model_of(config: Config, kept: range | None = None) -> Model:
    """The model of a config, or the pipeline stage of it that has a range of blocks."""
    if isinstance(config, GPTConfig):
        return GPT(config, kept)
    return BERT(config, kept) if isinstance(config, BERTConfig) else T5(config, kept)


def flops(config: Config) -> list[int]:
    """FLOPs of the forward and backward in each block, of a token, and with a T5 of a text.

    The last block includes the head. Embedding costs nothing.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = model_of(config)
    length = config.seq_len
    if isinstance(model, T5):
        return model.block_flops(length, max(1, length // 5))
    windows = [config.window(i) if isinstance(config, GPTConfig) else 0 for i in range(config.layers)]
    width, head = 12 * config.heads * config.head_size, 6 * config.vocab * config.dim
    costs = [
        6 * active_parameters(block) + width * min(window or length, length)
        for block, window in zip(model.blocks, windows, strict=True)
    ]
    costs[-1] += head
    if isinstance(model, BERT):
        costs[-1] += 6 * config.dim**2
        return costs
    for depth in model.mtp:
        costs[-1] += 6 * active_parameters(depth) + width * length + head
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
