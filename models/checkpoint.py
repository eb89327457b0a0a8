"""Checkpoints that any number of ranks can read: torch.distributed.checkpoint, written aside and renamed.

Expert weights are DTensors in global expert order, so that a checkpoint of 4 ranks loads on 2. The rest is
the same on every rank and saved once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as _read
from torch.distributed.checkpoint.state_dict_saver import save as _write
from torch.optim import Optimizer

_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)  # not by position: groups differ between meshes


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which and why."""


def save(folder: Path, model: nn.Module, optimizer: Optimizer, step: int, extra: dict[str, Any] | None = None) -> Path:
    """Write model, optimizer and `extra` (what JSON can say) to folder/step-N; all ranks call it. Returns that path.

    It is written under another name first: what is called step-N is complete.
    """
    final, aside = folder / f"step-{step}", folder / f"step-{step}.incomplete"
    if final.exists():
        raise CheckpointError(f"{final} exists already; resume from it, or choose another folder")
    _write(_state(model, optimizer) | {"step": step, "extra": json.dumps(extra or {})}, checkpoint_id=aside)
    dist.barrier()
    if dist.get_rank() == 0:
        aside.rename(final)
    dist.barrier()
    return final


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of most steps in a folder, None if there is none."""
    steps = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return steps[max(steps)] if steps else None


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> tuple[int, dict[str, Any]]:
    """Read a checkpoint into a model and an optimizer, on any mesh; returns its step and `extra`.

    Raises:
        CheckpointError: on every rank, if it is damaged or of another model.
    """
    state = _state(model, optimizer) | {"step": 0, "extra": ""}
    try:
        _read(state, checkpoint_id=path)
    except CheckpointException as error:  # not an Exception
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path} does not load: is it of a model of other sizes, or damaged? {first}") from None
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_BY_NAME)
    return state["step"], json.loads(state["extra"])


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_BY_NAME),
    }
