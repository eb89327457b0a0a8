"""Export of weights to safetensors files that hold the whole model, whatever mesh it was trained on."""

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
    """Write a model's weights as safetensors, under the names of the model on one rank. All ranks call it.

    No rank ever holds the whole model. Each writes its part, and rank 0 joins tensors on the disk, one after the
    other. The folder gets its name when all of it is written. transformers and others can read the files and their
    index, and so can `load_exported`. Needs the package safetensors (``turnout[train]``).

    Args:
        model: module, or list of the pipeline stages that this rank runs (`ParallelModel.parts`).
        folder: path of a new folder, the same on every rank. Writing needs twice its final size on the disk.
        file_bytes: largest size of a file in bytes, 5 GiB by default. A larger tensor gets a file of its own.

    Returns:
        The folder.

    Raises:
        CheckpointError: on every rank, if one of them cannot write, or if the folder exists.
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
    """Load weights that `export` wrote into a whole model, before it is spread over ranks.

    Args:
        folder: path of the exported folder.
        model: model with the same names and shapes.

    Raises:
        CheckpointError: names or shapes that differ from the model's. The model is then unchanged.
    """
    _check_installed()
    from safetensors import safe_open

    own = model.state_dict()
    place = json.loads((folder / INDEX).read_text())["weight_map"]
    if place.keys() != own.keys():
        raise CheckpointError(
            f"{folder} holds another model: only one of the two has {sorted(place.keys() ^ own.keys())}; build the "
            "model with the sizes that it was exported with"
        )
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
    """Bytes of each tensor, all ranks' parts together."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}


def _files(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Number, from 1, of the file that each tensor goes to."""
    files, number, filled = {}, 1, 0
    for name in sorted(sizes):
        if filled and filled + sizes[name] > limit:
            number, filled = number + 1, 0
        files[name], filled = number, filled + sizes[name]
    return files
