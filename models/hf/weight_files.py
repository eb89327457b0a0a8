"""Safetensors files in transformers' layout: read them by parts, and write them tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.together import place, together

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAPPED = 1 << 26  # bytes read from mapped files before they are unmapped
# names of the format, in the order in which its own writer sorts them
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WeightReader:
    """Reads tensors of a folder by name. Files are mapped, so only the parts that are asked for are read.

    Attributes:
        bytes_read: bytes of all parts that were read.

    Raises:
        ValueError: the folder has no safetensors files, a file of the index is missing, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.bytes_read = Path(folder), 0
        self._handles: dict[str, Any] = {}
        self._mapped = 0
        if (self.folder / INDEX).is_file():
            self._files: dict[str, str] = json.loads((self.folder / INDEX).read_text())["weight_map"]
            if missing := sorted({file for file in self._files.values() if not (self.folder / file).is_file()}):
                raise ValueError(f"{self.folder} lacks {', '.join(missing)}, which {INDEX} names: fetch it again")
        elif (self.folder / FILE).is_file():
            self._files = {}
            self._files = dict.fromkeys(self._opened(FILE).keys(), FILE)
        else:
            raise ValueError(
                f"{self.folder} has neither {INDEX} nor {FILE}: give the folder of a model in transformers' format "
                "with safetensors, such as huggingface_hub.snapshot_download returns"
            )

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._slices(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor in the file."""
        stored = self._slices(name).get_dtype()
        if stored not in DTYPES.values():
            raise ValueError(f"{name} in {self.folder} is {stored}, for which torch has no dtype")
        return next(dtype for dtype, known in DTYPES.items() if known == stored)

    def read(self, name: str, region: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or a region of it, one slice per axis. It is memory of the mapped file: copy it to keep it."""
        slices = self._slices(name)
        part: Tensor = slices[region or ...]
        self.bytes_read += part.nbytes
        self._mapped += part.nbytes
        return part

    def _slices(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self._opened(self._files[name]).get_slice(name)

    def _opened(self, file: str) -> Any:
        """A mapped file. Files are mapped anew now and then, because pages that were read count as own memory."""
        from safetensors import SafetensorError, safe_open

        if self._mapped > MAPPED:
            self._handles.clear()  # unmaps them
            self._mapped = 0
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(str(self.folder / file), framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.folder / file} is no safetensors file, or torn: {error}") from None
        return self._handles[file]


class WeightWriter:
    """Writes the tensors of a folder one by one in any order, so that only one is in memory.

    Files have the bytes that safetensors would write. They have temporary names until `finish`.

    Args:
        folder: folder for the files. It is made if it is missing.
        tensors: all tensors by name, on the meta device, for their shapes and dtypes.
        max_shard_size: largest size of a file, in bytes or as in "5GB" ("50GB" by default). A single tensor may exceed
            it.
    """

    def __init__(self, folder: str | Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "50GB") -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self._left, self._places = dict(tensors), {}
        self._streams: dict[str, BinaryIO] = {}
        for file, names in self._split.filename_to_tensors.items():
            header, offsets = _header({name: tensors[name] for name in names})
            self._streams[file] = stream = _incomplete(self.folder / file).open("wb")
            stream.write(header)
            self._places |= {name: (stream, len(header) + offset) for name, offset in offsets.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor, from any device."""
        expected = self._left.pop(name, None)
        if expected is None or (expected.shape, expected.dtype) != (tensor.shape, tensor.dtype):
            given = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {given}, and {expected if expected is None else expected.shape} is to come")
        stream, offset = self._places[name]
        stream.seek(offset)
        stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self, **metadata: Any) -> None:
        """Rename the files, remove files of an earlier save, and write the index, with `metadata` in it."""
        if self._left:
            raise ValueError(f"not all tensors were written: {', '.join(self._left)} are left")
        for file, stream in self._streams.items():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            _incomplete(self.folder / file).replace(self.folder / file)
        written = {*self._streams} | ({INDEX} if self._split.is_sharded else set())
        for path in self.folder.iterdir():
            ours = path.name in (FILE, INDEX) or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path.name)
            if ours and path.name not in written:
                path.unlink()
        if self._split.is_sharded:
            index = {"metadata": metadata | self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Close and remove files that still have a temporary name, after an error."""
        for file, stream in self._streams.items():
            stream.close()
            _incomplete(self.folder / file).unlink(missing_ok=True)


class RankZeroWriter:
    """A `WeightWriter` on rank 0 that all ranks use in the same way, as a context.

    If rank 0 cannot write, it still gathers tensors with the other ranks, so that none waits for it. `finish` then
    raises on all ranks.

    Args:
        make: function that makes the writer, called on rank 0.
    """

    def __init__(self, make: Callable[[], WeightWriter]) -> None:
        self._writer: WeightWriter | None = None
        self._error: Exception | None = None

        def begin() -> None:
            if place()[0] == 0:
                self._writer = make()

        everywhere(begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write the tensors that a function returns, on rank 0. After an error this does nothing."""
        if self._writer is None or self._error is not None:
            return
        try:
            for name, tensor in tensors().items():
                self._writer.write(name, tensor)
        except Exception as error:
            self._error = error

    def finish(self, **metadata: Any) -> None:
        """See `WeightWriter.finish`. All ranks call it."""

        def end() -> None:
            if self._error is not None:
                raise self._error
            if self._writer is not None:
                self._writer.finish(**metadata)

        everywhere(end)


def everywhere(work: Callable[[], Any]) -> list[Any]:
    """Run `work` on each rank, and return all results. Of several ranks, all raise a CheckpointError if one fails."""
    return together(work) if dist.is_initialized() else [work()]


def _incomplete(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Header of a file, and the offset of each tensor behind it, in bytes."""
    order, at, offsets = list(DTYPES), 0, {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        tensor, offsets[name] = tensors[name], at
        at += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets[name], at]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def converted(own: Any, target: str, converter: Any, tensors: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that a converter of transformers makes of (name, pattern that the name fits, tensor)."""
    converter = deepcopy(converter)
    for name, pattern, tensor in tensors:
        converter.add_tensor(target, name, pattern, tensor)
    made = converter.convert(target, model=own, config=own.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
