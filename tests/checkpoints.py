"""What tests of checkpoints share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def small(value: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose weight is this number, and AdamW after a step: the same on every rank, without process groups."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((model := nn.Linear(4, 4)).parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    model.weight.data.fill_(value)
    return model, optimizer


@contextmanager
def tiny_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A new folder on a file system of its own; skips the test where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here, which needs root: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
