"""How far ahead of the model are reading and packing, and what do shards cost in time and memory?

    OMP_NUM_THREADS=1 python benchmarks/data.py

One thread reads rows of several lengths, from a file in the page cache and from a sparse file of 100 GB. The GPT of
`make train` trains on one core. The last table reads the same rows through a memory map.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from turnout.models import GPT, GPTConfig, next_token_loss
from turnout.models.data import Batches, Bytes, Source, prepare
from turnout.models.data.shards import Shard, write_header
from turnout.moe import Balance, aux_loss

ROWS, BATCH = 4096, 32


def seconds(work: Callable[[int], object], number: int) -> float:
    """Median of three measurements of one call."""
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        for each in range(number):
            work(each)
        found.append((time.perf_counter() - begun) / number)
    return sorted(found)[1]


def resident() -> float:
    """MB of memory of this process, pages of files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def sparse(folder: Path, tokens: int) -> Path:
    """Prepared data that takes no room on the disk: all its token ids are 0."""
    folder.mkdir()
    for name, size in (("train-00000.tokens", 2 * tokens), ("train-00000.documents", 8)):
        with open(folder / name, "wb") as file:
            file.truncate(size)
    time_ns = (folder / "train-00000.tokens").stat().st_mtime_ns
    shards = [Shard("train-00000", tokens, 1, tokens, "", "", time_ns)]
    write_header(folder, {"train": shards, "held_out": []}, tokenizer="bytes", vocab=256, eod=0, dtype="<u2")
    return folder


def reading(source: Source, seq: int) -> float:
    """Tokens per second of one thread."""
    batches = Batches([(source, 1.0)], seq, seed=0, batch=BATCH)
    return BATCH * seq / seconds(batches, max(10, ROWS // BATCH))


def training(source: Source, seq: int) -> float:
    """Tokens per second of the model of `make train` on one core, in bytes with documents."""
    torch.manual_seed(0)
    config = GPTConfig(seq_len=seq, eod=source.eod, moe={"balance": Balance(0.01, over="sequence")})
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    rows = max(1, 4096 // seq)
    batches = Batches([(source, 1.0)], seq, seed=0, batch=rows)

    def step(number: int) -> None:
        tokens = batches(number)
        (next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]) + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    return rows * seq / seconds(step, 3)


def memory(source: Source, seq: int, mapped: bool) -> float:
    """MB by which the process grows while it reads rows at random."""
    batches = Batches([(source, 1.0)], seq, seed=1, batch=BATCH)
    if mapped:
        ids = np.memmap(source.train.path(0), source.train.dtype, mode="r")
        source.train.read = lambda start, count: ids[start : start + count].astype(np.int64)  # type: ignore[method-assign]
    before = resident()
    for step in range(ROWS // BATCH):
        batches(step)
    return resident() - before


def main() -> None:
    sys.path.insert(0, "examples")
    import corpus

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        begun = time.perf_counter()
        text = prepare(Path(name) / "bytes", corpus.standard_library(), Bytes())
        print(f"prepared {text.train.bytes / 1e6:.1f} MB of text in {time.perf_counter() - begun:.1f} s, as bytes")
        large = sparse(Path(name) / "sparse", 50 * 10**9)
        begun = time.perf_counter()
        Source.open(large).check()
        print(f"opened and checked 100 GB in {(time.perf_counter() - begun) * 1e3:.1f} ms")
        print("| tokens in a row | read, million tokens/s | read from 100 GB | trained, tokens/s | times ahead |")
        print("|---|---|---|---|---|")
        for seq in (128, 1024, 4096):
            cached, far, trained = reading(text, seq), reading(Source.open(large), seq), training(text, seq)
            print(f"| {seq} | {cached / 1e6:.1f} | {far / 1e6:.1f} | {trained:,.0f} | {cached / trained:,.0f} |")
        for mapped in (False, True):
            grown = memory(Source.open(large), 4096, mapped)
            print(f"{'memory map' if mapped else 'pread'}: {grown:.0f} MB more after {ROWS} rows of 4096 tokens")


if __name__ == "__main__":
    main()
