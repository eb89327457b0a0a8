"""Weights for the world outside: safetensors files that hold a model whole, whatever mesh it was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as _write

from .checkpoint.together import CheckpointError, on_first, together

INDEX = "model.safetensors.index.json"  # which file has which tensor


def export(model: nn.Module | Sequence[nn.Module], folder: Path, file_bytes: int = 5 << 30) -> Path:
    """Write a model's weights as safetensors, under the names of one rank's model; returns the folder.

    All ranks call it, and none ever holds the whole: each writes what it has, and rank 0 puts tensors together on the
    disk, one after the other. The folder gets its name when all is there. Files and index are those that
    transformers and others read; `load_exported` here. Needs the package safetensors (``turnout[train]``).

    Args:
        model: a module, or the stages of a pipeline that this rank runs (`ParallelModel.parts`).
        folder: new; every rank must see the same one. While it is written twice its size is needed.
        file_bytes: start another file rather than exceed this many bytes; one tensor may.

    Raises:
        CheckpointError: on every rank, if one cannot write, or the folder exists.
    """
    parts = [model] if isinstance(model, nn.Module) else model
    state = {name: tensor for part in parts for name, tensor in get_model_state_dict(part).items()}
    aside = folder.with_name(f"{folder.name}.incomplete")

    def begin() -> None:
        if folder.exists():
            raise CheckpointError(f"{folder} exists already; choose another name")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    together(_check_installed)
    sizes = {
        name: size for each in together(lambda: _sizes(cast(dict[str, Tensor], state))) for name, size in each.items()
    }
    on_first(begin)
    writer = HuggingFaceStorageWriter(
        str(aside), _files(sizes, file_bytes), save_distributed=True, enable_consolidation=True
    )
    try:
        _write(state, storage_writer=writer)
    except CheckpointException as error:  # not an Exception
        raise CheckpointError(f"{aside} cannot be written: {error.failures}") from None

    def finish() -> None:
        shutil.rmtree(aside / "sharded")
        aside.rename(folder)

    on_first(finish)
    return folder


def load_exported(folder: Path, model: nn.Module) -> None:
    """Read what `export` wrote into a model of one rank, before it is spread.

    Raises:
        CheckpointError: names or shapes that differ from the model's; the model is as it was.
    """
    _check_installed()
    from safetensors import safe_open

    own = model.state_dict()
    place = json.loads((folder / INDEX).read_text())["weight_map"]
    if place.keys() != own.keys():
        raise CheckpointError(f"{folder} is of another model: only one of both has {sorted(place.keys() ^ own.keys())}")
    read: dict[str, Tensor] = {}
    for file in sorted(set(place.values())):
        with safe_open(folder / file, framework="pt") as tensors:
            read |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not a dict
    for name, tensor in read.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(f"{name} is {tuple(tensor.shape)} in {folder}, {tuple(own[name].shape)} in the model")
    with torch.no_grad():
        model.load_state_dict(read)


def _check_installed() -> None:
    if find_spec("safetensors") is None:
        raise CheckpointError("exporting needs the package safetensors: pip install safetensors")


def _sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """Bytes of each whole tensor."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}


def _files(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to."""
    files, number, filled = {}, 1, 0
    for name in sorted(sizes):
        if filled and filled + sizes[name] > limit:
            number, filled = number + 1, 0
        files[name], filled = number, filled + sizes[name]
    return files
