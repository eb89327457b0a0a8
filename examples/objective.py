"""What the main job learns (--objective): next tokens by GPT, masked tokens by BERT, or removed spans by T5."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from turnout.models import BERT, GPT, OBJECTIVES, T5, BERTConfig, GPTConfig, T5Config
from turnout.models.blocks import Config
from turnout.models.data import Batches
from turnout.models.loss import IGNORED

if TYPE_CHECKING:
    from options import Job

MODELS = {"clm": "gpt", "mlm": "bert", "denoise": "t5"}  # names in turnout.models.OBJECTIVES
TRAIN, HELD_OUT = 1, 2  # streams of random numbers
BYTES = 256  # token ids of a vocabulary of bytes


def config_of(objective: str, config: GPTConfig) -> GPTConfig | BERTConfig | T5Config:
    """Sizes of the objective's model, with ids of its own behind those of the text: a mask token, or sentinels.

    Raises:
        ValueError: a setting that this model does not have.
    """
    if objective == "clm":
        return config
    own = {"--windows": config.windows, "--mtp": config.mtp, "--z-loss": config.z_loss, "--untied": not config.tied}
    if given := [flag for flag, value in own.items() if value]:
        raise ValueError(f"{', '.join(given)}: only a GPT has that; leave it out with --objective {objective}")
    text = config.vocab
    common = {f.name: getattr(config, f.name) for f in fields(Config) if f.name != "vocab"}
    if objective == "mlm":
        return BERTConfig(vocab=8 * (text // 8 + 1), mask_token=text, **common)
    return T5Config(vocab=64 * ((text + spans(config.seq_len) + 1) // 64 + 1), start=text, **common)


def spans(length: int) -> int:
    """Number of spans that are removed from a text of so many tokens."""
    text = torch.zeros(1, length, dtype=torch.int64)
    source, _ = OBJECTIVES["t5"].batch(T5Config(vocab=length + 2, start=1), F.pad(text, (0, 1)), None)
    return int((source[0] > 1).sum())


def check(job: Job) -> None:
    """Raise a ValueError for sequences that are too short for the objective."""
    if job.objective == "denoise" and job.seq < 3:
        raise ValueError(f"--seq ({job.seq}) must be at least 3 with --objective denoise, which removes spans")


def flops_per_token(model: GPT | BERT | T5) -> int:
    """FLOPs of a step, for each token of the text: a T5 reads and writes fewer tokens than there are."""
    if not isinstance(model, T5):
        return model.flops_per_token()
    length = model.config.seq_len
    (source, target), _ = OBJECTIVES["t5"].batch(model.config, torch.zeros(1, length + 1, dtype=torch.int64), None)
    return model.flops(source.shape[1], target.shape[1]) // length


class Pair(NamedTuple):
    """Inputs of a model and its targets, which have a row for each sequence."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device | str) -> Pair:
        return Pair(tuple(each.to(device) for each in self.inputs), self.targets.to(device))


def pair(rows: Tensor | Pair) -> Pair:
    """Inputs and targets of rows, int64 [n, S + 1]: the next tokens, unless the rows are a pair already."""
    return rows if isinstance(rows, Pair) else Pair((rows[:, :-1],), rows[:, 1:])


def asked(job: Job, rows: Tensor, stream: int, numbers: Iterable[int]) -> Tensor | Pair:
    """Rows, int64 [n, S + 1], as the objective asks for them.

    What is masked or removed in a row is a function of the seed, the stream and the row's number, on any mesh.
    """
    if job.objective == "clm":
        return rows
    config, batch, found = job.config(), OBJECTIVES[MODELS[job.objective]].batch, []
    for row, number in zip(rows.split(1), numbers, strict=True):
        (seed,) = np.random.SeedSequence((job.seed, stream, int(number))).generate_state(1, np.uint64).tolist()
        found.append(batch(config, row, torch.Generator().manual_seed(seed >> 1)))
    inputs, targets = zip(*found, strict=True)
    whole = Pair(tuple(torch.cat(each) for each in zip(*inputs, strict=True)), torch.cat(targets))
    parts = job.cp * job.tp
    return padded(whole, parts) if job.objective == "denoise" and parts > 1 else whole


def padded(given: Pair, multiple: int) -> Pair:
    """Source and target of a T5, padded to lengths that --cp x --tp ranks split, with a mask of each for what is real.

    A span that is removed makes the source shorter, so --seq alone does not say whether its length splits.
    """
    missing = [-each.shape[1] % multiple for each in given.inputs]
    tokens = [F.pad(each, (0, n)) for each, n in zip(given.inputs, missing, strict=True)]
    masks = [
        F.pad(torch.ones_like(each, dtype=torch.bool), (0, n)) for each, n in zip(given.inputs, missing, strict=True)
    ]
    return Pair((*tokens, *masks), F.pad(given.targets, (0, missing[-1]), value=IGNORED))


@dataclass(frozen=True)
class Asked:
    """Batches to train on: calling it with a step reads this rank's rows, as the objective asks for them."""

    job: Job
    rows: Batches

    def __call__(self, step: int) -> Tensor | Pair:
        return asked(self.job, self.rows(step), TRAIN, step * self.rows.batch + self.rows.mine)

    @property
    def of_bytes(self) -> bool:
        """Whether all tokens are bytes, by which experts can be described."""
        return self.rows.vocab == BYTES and self.job.objective == "clm"


def figures(event: dict[str, Any]) -> dict[str, float | None]:
    """Results of the last evaluation, for the job's last line of output."""
    if "loss" in event:
        return {"val_loss": event["loss"], "val_accuracy": event["accuracy"]}
    return {"val_bpb": event.get("bits_per_byte")}


def described(job: dict[str, Any]) -> str:
    """The kind of model in the flags of a job, and its blocks."""
    kind = MODELS[job["objective"]].upper()
    return f"{kind} of {job['layers']}{' + ' + str(job['layers']) if kind == 'T5' else ''} blocks"
