"""Load a model of Hugging Face on many ranks. Each rank reads its own experts and shards alone."""

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
    """Load a model with its experts spread over ranks. Each rank reads its own part alone, and every rank calls it.

    It calls `empty_pretrained`, `replace_moe`, `parallelize` and `load_pretrained`. To shard the rest of the model as
    well, call these yourself, and FSDP2 before the last one (docs/guides/hugging_face.md). A rank needs main memory for
    its part and one more tensor.

    Args:
        folder: folder of a model in transformers' format, with safetensors, which all ranks see.
        mesh: mesh as for `parallelize`. None, the default: one process has all experts.
        auto_class, dtype: as for `empty_pretrained`.
        device: device of the parameters. None, the default, is the current GPU for a mesh of GPUs, else the CPU.
        adapters: as for `replace_moe`.
        options: further arguments of `parallelize`.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: as for the four functions.
        CheckpointError: on every rank of several, if `load_pretrained` fails on one.
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
    """Build the model of a folder without its weights. Parameters are on the meta device, and buffers have values.

    Args:
        folder: folder with `config.json`, and `generation_config.json` if the model can generate.
        auto_class: class of transformers whose `from_config` builds the model; `AutoModelForCausalLM` by default.
        dtype: dtype of the parameters. None, the default, takes the config's, or else the dtype of the first
            floating-point tensor in the files. Parameters that the family keeps in float32 stay in float32.

    Raises:
        ValueError: the folder has no `config.json`, or its weights are quantised.
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
    """Read the weights of a folder into a model on the meta device, in place. Call it on every rank.

    Each rank reads its own part alone. Parameters are new objects, so make the optimizer afterwards. Tied parameters
    stay tied.

    Args:
        model: model from `empty_pretrained`, maybe after `replace_moe`, `parallelize`, `fully_shard_experts` and
            `fully_shard`.
        folder: folder with safetensors files in the format of the model's family.
        device: device of the parameters; the CPU by default.

    Returns:
        The model.

    Raises:
        ValueError: tensors are missing, left over, or of other shapes, or buffers have no values. The message has the
            names.
        CheckpointError: on every rank of several, if one of these errors is found on any.
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
    """The tensors of the files from which a family's tensor is made: one, or several for a converter."""

    converter: WeightConverter | None = None
    names: dict[str, list[str]] = field(default_factory=dict)


def _fill(own: PreTrainedModel, slots: dict[str, Slot], reader: WeightReader) -> None:
    """Read this rank's part of all tensors. `own` is a `family_view`."""
    mapping = get_model_conversion_mapping(own)
    sources, unexpected = _sources(own, mapping, slots, reader)
    made = {name: name for name in sources} | {
        other: name for name, source in sources.items() for other in _targets(name, source) if other in slots
    }
    filled = {id(slots[name].tensor) for name in made}
    missing = {name for name, slot in slots.items() if name not in made and id(slot.tensor) not in filled}
    found: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    own._adjust_missing_and_unexpected_keys(found)  # removes what the family ignores
    missing |= {name for name in missing - found.missing_keys if isinstance(slots[name].tensor, nn.Parameter)}
    if missing or found.unexpected_keys:
        both = {"it has no": found.missing_keys | missing, "the model has no": found.unexpected_keys}
        raise ValueError(
            f"{reader.folder} does not fit {type(own).__name__}: "
            + ", and ".join(f"{verb} {_some(sorted(names))}" for verb, names in both.items() if names)
            + ". Is the model of another class (auto_class) or config?"
        )
    first: dict[tuple[int, int | None], str] = {}  # first name of each tensor: tied ones have several
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
    """The source of each of the family's tensors, by name, and names in the files that fit no tensor."""
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, _Source] = {}
    unexpected = set()
    for name in sorted(reader.names, key=dot_natural_key):
        prefix, known = own.base_model_prefix, cast(dict, slots)
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in slots and name in slots:  # the files have the names of this version
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
    """Names of all tensors that are made from a source."""
    patterns = [] if source.converter is None else source.converter.target_patterns
    return [target.replace(patterns[0], each) for each in patterns] or [target]


def _read(own: PreTrainedModel, target: str, source: _Source, slots: dict[str, Slot], reader: WeightReader) -> None:
    """Read this rank's part of one tensor, or of all tensors that a converter makes together."""
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
    """Raise ValueError if files have a tied tensor twice, with different values."""
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
    """Ids of the experts of these tensors: the number in the place of the pattern's star."""
    star = re.escape(pattern.strip("^$")).replace(r"\*", r"(\d+)")
    found = [re.search(star, name) for name in names]
    return [int(match[1]) if match and match.re.groups else place for place, match in enumerate(found)]


def _expert_wise(converter: WeightConverter) -> bool:
    """Whether a converter stacks experts and changes each by itself, so that one can be converted alone."""
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
