"""The data of the main job: folders that turnout.models.data has prepared, or text that rank 0 prepares below --out."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import launch
import torch.distributed as dist
from launch import say
from options import Job
from torch import Tensor
from turnout.dispatch import Meshes
from turnout.models.checkpoint.together import on_first, together
from turnout.models.data import Batches, DataError, HeldOut, Source, prepare
from turnout.models.data.shards import HEADER, read_header
from turnout.models.data.text_files import files_in
from turnout.models.data.tokenizing import FILE, size_of

PATIENCE = timedelta(hours=6)  # that ranks wait while rank 0 prepares text
MOST_PASSES = 4  # over the held-out text, in one evaluation


def paths(job: Job) -> list[tuple[Path, float | None]]:
    """Pairs (path, weight or None) of --data."""
    found: list[tuple[Path, float | None]] = []
    for given in job.data:
        head, _, tail = given.rpartition(":")
        if Path(given).exists() or not head:
            found.append((Path(given), None))
            continue
        try:
            found.append((Path(head), float(tail)))
        except ValueError:
            found.append((Path(given), None))
    return found


def are_prepared(job: Job) -> bool:
    """Whether --data names prepared folders, not text.

    Raises:
        DataError: a mixture of both, a path that does not exist, or weights that are not possible.
    """
    given = paths(job)
    for path, _ in given:
        if not path.exists():
            raise DataError(f"--data {path}: there is no such file or folder; check the path")
    kinds = {(path / HEADER).exists() for path, _ in given}
    weighed = {weight is not None for _, weight in given}
    if len(kinds) > 1 or (weighed == {True} and kinds == {False}):
        raise DataError(
            "--data takes prepared folders, which may have weights, or text without weights: prepare the text by "
            "python -m turnout.models.data prepare"
        )
    if wrong := [weight for _, weight in given if weight is not None and not 0 < weight < math.inf]:
        raise DataError(f"--data: weights must be positive numbers; got {wrong[0]:g}")
    if len(weighed) > 1:
        raise DataError("--data: give a weight to every folder, as in PATH:0.3, or to none")
    return kinds == {True}


def with_vocabulary(job: Job) -> Job:
    """The job with `vocab` and `eod` of its data filled in.

    Raises:
        DataError: data that is not there, a --vocab that is too small for it, or an --eod that is not its own.
    """
    if job.plan and job.vocab and not all(path.exists() for path, _ in paths(job)):
        return job  # a plan needs no data
    if prepared := are_prepared(job):
        header = read_header(paths(job)[0][0])
        vocab, eod = header["vocab"], header["eod"]
    else:
        vocab, eod = size_of(job.tokenizer)
    if prepared and job.tokenizer != "bytes":
        raise DataError(f"--tokenizer {job.tokenizer} is for text, and --data is prepared: leave it out")
    if 0 < job.vocab < vocab:
        raise DataError(f"--vocab ({job.vocab}) must be at least {vocab}, the token ids of the data")
    if job.eod >= 0 and job.eod != eod:
        raise DataError(f"--eod ({job.eod}) must be {eod}, the token that begins a document of the data: leave it out")
    return replace(job, vocab=job.vocab or vocab, eod=-1 if job.join_documents else eod)


def tokens_of(job: Job) -> int | None:
    """Tokens to train on; of text, its bytes; None if there is none."""
    if not all(path.exists() for path, _ in paths(job)):
        return None
    if are_prepared(job):
        return sum(len(Source.open(path).train) for path, _ in paths(job))
    return sum(path.stat().st_size for _, path in text_of(job))


def text_of(job: Job) -> list[tuple[str, Path]]:
    """Pairs (name, path) of the files of --data, or of Python's standard library."""
    return files_in(path for path, _ in paths(job)) if job.data else corpus.standard_library()


class Rows(NamedTuple):
    """Held-out rows."""

    tokens: Tensor  # int64 [eval_size / dp, seq + 1]
    bytes_per_token: float


@dataclass(frozen=True)
class Data:
    """The data of a job, opened on this rank.

    Attributes:
        sources: sources and weights.
        fingerprint: SHA-256 of the data and its weights.
    """

    sources: list[tuple[Source, float]]
    fingerprint: str

    @classmethod
    def open(cls, job: Job) -> Data:
        """Open the data, which rank 0 first prepares if it is text, and check it. All ranks call it.

        Raises:
            DataError, CheckpointError: on every rank, for what is wrong on any of them.
        """
        folders = paths(job)
        if not are_prepared(job):
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)  # the job's own timeout is for steps
            folders = [(on_first(lambda: prepared_text(job), patient), None)]
            dist.destroy_process_group(patient)
        if len(set(together(lambda: cls._of(folders, check=True).fingerprint))) > 1:
            raise DataError("--data differs between nodes: copy the same folders to each, or name shared ones")
        return cls._of(folders)

    @classmethod
    def _of(cls, folders: list[tuple[Path, float | None]], check: bool = False) -> Data:
        sources = []
        for path, weight in folders:
            source = Source.open(path)
            if check:  # the ranks of a node share the work
                source.check(launch.RANK % launch.RANKS_PER_NODE, launch.RANKS_PER_NODE)
            sources.append((source, len(source.train) if weight is None else weight))
        marks = [(source.fingerprint, weight) for source, weight in sources]
        return cls(sources, hashlib.sha256(json.dumps(marks).encode()).hexdigest())

    def batches(self, job: Job, meshes: Meshes) -> Batches:
        """This rank's part of the batches.

        Raises:
            DataError: the steps pass over a source more often than --epochs allows.
        """
        dp = meshes.dense["dp"]
        mine = {"rank": dp.get_local_rank(), "ranks": dp.size(), "micro_batches": job.micro_batches * job.accumulate}
        batches = Batches(self.sources, job.seq, seed=job.seed, batch=job.batch, **mine)
        passes = max(batches.passes(job.steps))
        if passes > job.epochs:
            source = batches.sources[batches.passes(job.steps).index(passes)]
            raise DataError(
                f"{job.steps} steps pass {passes:,.1f} times over {source.folder}, more often than --epochs "
                f"({job.epochs}): give more --data or fewer --steps, or accept it by --epochs {math.ceil(passes)}"
            )
        return batches

    def held_out(self, job: Job, meshes: Meshes) -> Rows:
        """This rank's held-out rows.

        Raises:
            DataError: --eval-size reads the held-out text over and over.
        """
        dp, held_out = meshes.dense["dp"], HeldOut(self.sources, job.seq)
        there = sum(len(source.held_out) for source, _ in self.sources) // job.seq
        if job.eval_size > (most := MOST_PASSES * there):
            raise DataError(
                f"--eval-size ({job.eval_size:,}) must be at most {most:,}: the held-out text has {there:,} sequences "
                f"of {job.seq} tokens, and an evaluation may read it {MOST_PASSES} times"
            )
        return Rows(held_out(job.eval_size, dp.get_local_rank(), dp.size()), held_out.bytes_per_token)

    def keep_tokenizer(self, out: Path) -> None:
        """Copy the tokenizer of subwords to --out, for what reads the trained model. Rank 0 calls it."""
        file = self.sources[0][0].folder / FILE
        if file.exists():
            shutil.copyfile(file, out / FILE)

    def facts(self) -> dict[str, Any]:
        """Sizes of the data, for the log."""
        train, held_out = ([getattr(source, split) for source, _ in self.sources] for split in ("train", "held_out"))
        return {
            "train_bytes": sum(tokens.bytes for tokens in train),
            "held_out_bytes": sum(tokens.bytes for tokens in held_out),
            "train_tokens": sum(len(tokens) for tokens in train),
        }


def prepared_text(job: Job) -> Path:
    """Folder below --out with the text of the job as tokens. It is made unless it is there, of the same files."""
    files = text_of(job)
    seen = [(name, str(path), (s := path.stat()).st_size, s.st_mtime_ns) for name, path in files]
    key = hashlib.sha256(json.dumps([seen, job.tokenizer]).encode()).hexdigest()[:12]
    folder = Path(job.out) / "data" / key
    if not folder.exists():
        say(f"preparing {len(files):,} files of text in {folder}")
        prepare(folder, files, job.tokenizer)
    return folder
