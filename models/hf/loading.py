"""A model of Hugging Face, read by many ranks: each reads its experts and its shards, and no rank the whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ...dispatch import mesh as axes
from ...dispatch.mesh import Meshes
from ...moe.parallel.parallelize import parallelize
from .recognise import Adapter
from .replace import replace_moe
from .slots import Slot, family_slots, family_view, give_memory
from .weight_files import WeightReader, converted, everywhere

__all__ = ["empty_pretrained", "from_pretrained", "load_pretrained"]


def from_pretrained(
    folder: str | Path,
    mesh: DeviceMesh | Meshes | None = None,
    *,
    auto_class: Any = AutoModelForCausalLM,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    adapters: Mapping[type[nn.Module], Adapter] | None = None,
    **options: Any,
) -> Any:
    """A family's model with its experts spread over ranks, of which each rank has read its own part alone.

    It is `empty_pretrained`, `replace_moe`, `parallelize` and `load_pretrained`, one after the other. Where the rest of
    the model is to be split as well, call these, and FSDP2 before the last one: docs/guides/hugging_face.md. A rank
    needs main memory for its part and one tensor more. Call it on every rank; the model is in eval mode, as that of
    transformers' method.

    Args:
        folder: of a model in transformers' format, with safetensors; all ranks must see it.
        mesh: as for `parallelize`; None: one process has all experts.
        auto_class, dtype: as for `empty_pretrained`.
        device: where the parameters go; None: the current GPU if the mesh is one of GPUs, else the CPU.
        adapters: as for `replace_moe`.
        options: further arguments of `parallelize`.

    Raises:
        ValueError: as the four functions.
        CheckpointError: on every rank of several, what `load_pretrained` raises on one.
    """
    model = replace_moe(empty_pretrained(folder, auto_class, dtype), adapters)
    if mesh is not None:
        parallelize(model, mesh, **options)
    kind = "cpu" if mesh is None else axes.of_experts(mesh).device_type
    current = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    return load_pretrained(model, folder, current if device is None else device).eval()


def empty_pretrained(
    folder: str | Path, auto_class: Any = AutoModelForCausalLM, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a folder without its weights: parameters are on the meta device and take no memory, buffers are not.

    Args:
        folder: has `config.json`, and `generation_config.json` if the model can generate.
        auto_class: class of transformers whose `from_config` builds the model.
        dtype: of parameters; None: what the config says, or else that of the first floating-point tensor in the files.
            What the family keeps in float32 is in float32.

    Raises:
        ValueError: a folder without `config.json`, or quantised weights.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json: give the folder of a model, as huggingface_hub.snapshot_download returns it"
        )
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} holds quantised weights (quantization_config in its config.json), which experts cannot compute "
            "with: take the model's unquantised weights"
        )
    dtype = dtype or cast(torch.dtype | None, config.dtype) or _stored(folder)
    with init_empty_weights(include_buffers=False):  # buffers are small, and no file has all of them
        model = auto_class.from_config(config, dtype=dtype)
    model.tie_weights()
    if exact := model._get_dtype_plan(dtype):
        pattern, names, _ = build_glob_alternation(list(exact))
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if found := pattern.search(name):
                t.data = t.data.to(exact[names[cast(str, found.lastgroup)]])
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    return model


def load_pretrained(model: Any, folder: str | Path, device: torch.device | str = "cpu") -> Any:
    """Read the weights of a folder into a model of transformers on the meta device, in place; call it on every rank.

    A rank reads what lies on it: of files with a tensor for each expert its experts, of others its rows. Parameters are
    new objects: make the optimizer afterwards. What is tied stays tied. Buffers must have values, as those of
    `empty_pretrained` have.

    Args:
        model: of `empty_pretrained`, then maybe of `replace_moe`, `parallelize`, `fully_shard_experts` and
            `fully_shard`.
        folder: with safetensors files in the format of the model's family.
        device: where the parameters go.

    Raises:
        ValueError: tensors that are missing, left over, or of other shapes, by name; buffers on the meta device.
        CheckpointError: on every rank of several, if there is one of these errors on any.
    """

    def load() -> None:
        if empty := [name for name, t in model.named_buffers() if t.is_meta]:
            raise ValueError(f"buffers {_some(empty)} have no values: build the model with empty_pretrained")
        give_memory(model, device)
        slots = family_slots(model)
        with family_view(model):
            _fill(cast(PreTrainedModel, model), slots, WeightReader(folder))

    everywhere(load)
    return model


@dataclass
class _Source:
    """What a family's tensor is made of: one of the file by its name, or several by the pattern they match."""

    converter: WeightConverter | None = None
    names: dict[str, list[str]] = field(default_factory=dict)


def _fill(own: PreTrainedModel, slots: dict[str, Slot], reader: WeightReader) -> None:
    """Read what is needed here; `own` is a `family_view`."""
    mapping = get_model_conversion_mapping(own)
    sources, unexpected = _sources(own, mapping, slots, reader)
    made = {name: name for name in sources} | {
        other: name for name, source in sources.items() for other in _targets(name, source) if other in slots
    }
    filled = {id(slots[name].tensor) for name in made}
    missing = {name for name, slot in slots.items() if name not in made and id(slot.tensor) not in filled}
    found: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    own._adjust_missing_and_unexpected_keys(found)  # what the family says is no matter
    missing |= {name for name in missing - found.missing_keys if isinstance(slots[name].tensor, nn.Parameter)}
    if missing or found.unexpected_keys:
        both = {"it has no": found.missing_keys | missing, "the model has no": found.unexpected_keys}
        raise ValueError(
            f"{reader.folder} does not fit {type(own).__name__}: "
            + ", and ".join(f"{verb} {_some(sorted(names))}" for verb, names in both.items() if names)
            + ". Is the model of another class (auto_class) or config?"
        )
    first: dict[tuple[int, int | None], str] = {}  # of names that are one tensor
    for target, source in sources.items():
        key = id(slots[target].tensor), slots[target].expert
        if key in first:
            _check_tied(first[key], target, source, slots, reader)
        else:
            first[key] = target
            _read(own, target, source, slots, reader)
    used = [each for each in mapping if each.was_used()]
    vars(own)["_weight_conversions"] = used  # as transformers does: `save_pretrained` undoes them


def _sources(
    own: PreTrainedModel, mapping: list[Any], slots: dict[str, Slot], reader: WeightReader
) -> tuple[dict[str, _Source], set[str]]:
    """By the first of the family's tensors that they make; and names in the files that make none."""
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, _Source] = {}
    unexpected = set()
    for name in sorted(reader.names, key=dot_natural_key):
        prefix, known = own.base_model_prefix, cast(dict, slots)
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in slots and name in slots:  # saved by the names that the model has now
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in slots:
            unexpected.add(name)
            continue
        source = sources.setdefault(target, _Source(None if pattern is None else by_pattern[pattern]))
        if source.names and (pattern is None or source.converter is None):
            other = next(iter(source.names.values()))[0]
            raise ValueError(f"{other} and {name} in {reader.folder} are both {target} of the model: remove one")
        source.names.setdefault(pattern or "", []).append(name)
    return sources, unexpected


def _targets(target: str, source: _Source) -> list[str]:
    """All of the family's tensors that a source makes."""
    patterns = [] if source.converter is None else source.converter.target_patterns
    return [target.replace(patterns[0], each) for each in patterns] or [target]


def _read(own: PreTrainedModel, target: str, source: _Source, slots: dict[str, Slot], reader: WeightReader) -> None:
    """Read one of the family's tensors, or those that one conversion makes together, as far as they lie here."""
    slot, converter = slots[target], source.converter
    needed = [name for name in _targets(target, source) if name in slots and slots[name].region is not None]
    if converter is None:
        (name,) = source.names[""]
        _check(name, reader.shape(name), slot, reader)
        if slot.region is not None:
            slot.put(reader.read(name, slot.region))
    elif needed and _expert_wise(converter) and slot.expert is None and not slot.flat:
        for pattern, names in source.names.items():
            if len(names) != slot.tensor.shape[0]:
                raise ValueError(
                    f"{reader.folder} has {len(names)} tensors {pattern} for {target}, which is of "
                    f"{slot.tensor.shape[0]} experts"
                )
            if (numbers := _numbers(pattern, names)) != list(range(len(names))):
                raise ValueError(f"{reader.folder} has {pattern} for {target} of experts {numbers}, not 0 and on")
        for expert in slot.here:
            part = _converted(own, target, converter, {k: [v[expert]] for k, v in source.names.items()}, reader)[target]
            _put(target, part[0], slot.of_expert(expert), reader)
    elif needed:
        whole = _converted(own, target, converter, source.names, reader)
        for name in needed:
            _put(name, whole[name], slots[name], reader)


def _check_tied(first: str, target: str, source: _Source, slots: dict[str, Slot], reader: WeightReader) -> None:
    """A file that has a tied tensor twice has to say the same."""
    slot = slots[target]
    if source.converter is not None or slot.region is None:
        return
    (name,) = source.names[""]
    _check(name, reader.shape(name), slot, reader)
    if not torch.equal(reader.read(name, slot.region).to(slot.tensor.dtype), slot.held.cpu()):
        raise ValueError(
            f"{target} and {first} are one tensor in the model, and differ in {reader.folder}: set "
            "tie_word_embeddings to false in its config.json"
        )


def _numbers(pattern: str, names: list[str]) -> list[int]:
    """The experts that tensors are of: the number in the place of the pattern's star."""
    star = re.escape(pattern.strip("^$")).replace(r"\*", r"(\d+)")
    found = [re.search(star, name) for name in names]
    return [int(match[1]) if match and match.re.groups else place for place, match in enumerate(found)]


def _expert_wise(converter: WeightConverter) -> bool:
    """Whether it stacks the experts and then changes each by itself, so that one may be had without the others."""
    first, *others = converter.operations
    stacks = type(first) is MergeModulelist and first.dim == 0 and len(converter.target_patterns) == 1
    axes_of = [[value for key, value in vars(op).items() if re.fullmatch(r"dim\d?", key)] for op in others]
    return stacks and all(found and 0 not in found for found in axes_of)


def _converted(
    own: PreTrainedModel, target: str, converter: WeightConverter, names: dict[str, list[str]], reader: WeightReader
) -> dict[str, torch.Tensor]:
    tensors = ((name, pattern, reader.read(name)) for pattern, each in names.items() for name in each)
    return converted(own, target, converter, tensors)


def _put(name: str, whole: torch.Tensor, slot: Slot, reader: WeightReader) -> None:
    _check(name, tuple(whole.shape), slot, reader)
    if slot.region is not None:
        slot.put(whole[slot.region])


def _check(name: str, shape: tuple[int, ...], slot: Slot, reader: WeightReader) -> None:
    if shape != slot.shape:
        raise ValueError(
            f"{name} is {shape} in {reader.folder}, and {slot.shape} in the model: is its config another one?"
        )


def _some(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _stored(folder: Path) -> torch.dtype:
    reader = WeightReader(folder)
    dtypes = (reader.dtype(name) for name in reader.names)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
