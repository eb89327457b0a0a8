"""Adapters (LoRA) of a bridged model in PEFT's files: the experts' adapters together with PEFT's own."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...moe.adapters.lora import DEFAULT, add_lora, lora_parameters, merge_lora
from ...moe.experts.low_rank import LowRank
from ...moe.experts.placed import check_home
from ...moe.experts.sharded import held_slice, local, whole
from ..checkpoint.together import on_first
from .block_experts import FusedExperts
from .bridged import BridgedMoE

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT calls them
OWN = "adapters.safetensors"  # for experts that PEFT has no format for, by the names of `lora_parameters`
ROOT = "base_model.model."  # prefix of all names in a PeftModel and in its files


@torch.no_grad()
def save_adapters(model: nn.Module, folder: str | Path, name: str = DEFAULT) -> None:
    """Write an adapter in PEFT's format, with the experts' part and PEFT's own part. Call it on every rank.

    Rank 0 writes `adapter_model.safetensors` and `adapter_config.json`.
    ``PeftModel.from_pretrained(model_of_the_family, folder)`` reads them, as do vLLM and other programs that know
    PEFT's `target_parameters`. `load_adapters` reads them into a bridged model. PEFT cannot target the experts of DBRX.
    Their adapters go to `adapters.safetensors`, which only `load_adapters` reads.

    Args:
        model: a model after `replace_moe` and `add_lora`. It may be a `PeftModel`.
        folder: folder for the files. It is made if it is missing, and files in it are overwritten.
        name: name of the adapter, in `add_lora` and in PEFT.

    Raises:
        ValueError: there is no adapter of that name, or PEFT has no format for it, as for DoRA.
        CheckpointError: on every rank, if rank 0 cannot write.
    """
    folder, (config, tensors) = Path(folder), _of_peft(model, name)
    others = {id(p): own for own, p in lora_parameters(model, name).items()}
    if not (others or tensors):
        raise ValueError(f"{type(model).__name__} has no adapter {name!r}: call add_lora, or get_peft_model, first")
    for place in _places(model):
        if (adapter := place.adapter(name)) is not None:
            _configure(config, place, adapter)
            a, b = (whole(p).cpu() for p in (adapter.a, adapter.b))  # [E, in, r] and [E, out, r]
            values = a.mT.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            tensors |= {own: value.contiguous() for own, value in zip(place.names, values, strict=True)}
            for p in (adapter.a, adapter.b):
                del others[id(p)]
    held = dict(model.named_parameters())
    own = {
        _renamed(key.removeprefix(ROOT), name, DEFAULT): whole(held[key]).cpu().contiguous() for key in others.values()
    }

    def write() -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        for file in (WEIGHTS, CONFIG, OWN):
            (folder / file).unlink(missing_ok=True)
        if tensors:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        if own:
            save_file(own, folder / OWN)

    on_first(write) if dist.is_initialized() else write()


@torch.no_grad()
def load_adapters(model: nn.Module, folder: str | Path, name: str = DEFAULT) -> None:
    """Read an adapter from files that PEFT or `save_adapters` wrote into a bridged model, in place.

    Experts without an adapter of that name get one, as from `add_lora`, and use it. Each rank reads the file and keeps
    its share. Tensors of other layers, such as attention, go to the adapter of that name in a `PeftModel`. Make it
    first, by ``get_peft_model(model, LoraConfig.from_pretrained(folder))`` with `target_parameters` set to None.

    Args:
        model: a model after `replace_moe`, before or after `parallelize`, without FSDP.
        folder: folder with `adapter_model.safetensors` and `adapter_config.json`.
        name: name of the adapter in the model.

    Raises:
        ValueError: the file belongs to another model or has another rank r, lacks experts, or has tensors for which the
            model has no place. The model is unchanged.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).exists() else {}
    tensors = load_file(folder / WEIGHTS) if config else {}
    if not (config or (folder / OWN).exists()):
        raise ValueError(f"{folder} has no {CONFIG}")
    parts = [_take_experts(model, tensors, config, name), _take_peft(model, tensors, config, name)]
    for put in (_take_own(model, folder / OWN, name), *parts):
        put()


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters in use, of experts and of PEFT, to the weights, and drop them.

    Args:
        model: a bridged model, or a `PeftModel` of one.

    Returns:
        The model, without PEFT's wrapper.

    Raises:
        ValueError: the model has no adapters, or `merge_lora` refuses them.
    """
    experts = bool(lora_parameters(model))
    if not (experts or has_peft_layers(model)):
        raise ValueError(f"{type(model).__name__} has no adapters, neither of experts nor of PEFT")
    if experts:
        merge_lora(model, keep=False)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # pyright: ignore[reportCallIssue]


def has_peft_layers(model: nn.Module) -> bool:
    """Whether a model has layers that PEFT has wrapped."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # without this import there are none
    return tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules())


@dataclass(frozen=True)
class _Place:
    """One stacked matrix of a family's experts, and its names in PEFT.

    Attributes:
        experts: experts that compute with the matrix.
        matrix: its name in `Experts.matrices` and in the family's module.
        key: name of the module by which PEFT would wrap the experts. It wraps them once for each parameter, the first
            one innermost.
        target: name of the parameter in `target_parameters`.
    """

    experts: FusedExperts
    matrix: str
    key: str
    target: str

    def adapter(self, name: str) -> LowRank | None:
        """The adapter of this name beside the matrix."""
        return dict(self.experts.adapters()).get(name, {}).get(self.matrix)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the adapter's matrices A and B in the file."""
        return f"{self.key}.lora_A.weight", f"{self.key}.lora_B.weight"


def _places(model: nn.Module, targets: list[str] | None = None) -> list[_Place]:
    """All matrices that PEFT can target, or those that `targets` names."""
    check_home(model, "adapters are read or written")
    places = []
    for path, layer in model.named_modules():
        if not (isinstance(layer, BridgedMoE) and isinstance(experts := layer.experts, FusedExperts)):
            continue
        inside = [own for own, module in layer.block.named_modules() if module is experts.module]
        path = ".".join(filter(None, (path.removeprefix(ROOT), *inside[:1])))  # "" where it is the block itself
        full = {own: f"{path}.{own}" for own in experts.matrices() if hasattr(experts.module, own)}
        found = [own for own in full if targets is None or any(f".{full[own]}".endswith(f".{t}") for t in targets)]
        for number, own in enumerate(found):
            key = ROOT + path + ".base_layer" * (len(found) - 1 - number)
            places.append(_Place(experts, own, key, ".".join(full[own].split(".")[-3:])))
    return places


def _of_peft(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and whole tensors of PEFT's own adapter of this name, on the CPU. Both are empty without one."""
    known: dict[str, Any] = getattr(model, "peft_config", {})  # pyright: ignore[reportAssignmentType]
    if name not in known:
        return {}, {}
    from peft import get_peft_model_state_dict

    config = {key: sorted(v) if isinstance(v, set) else v for key, v in known[name].to_dict().items()}
    if config["peft_type"] != "LORA":
        raise ValueError(f"the adapter {name!r} of PEFT is {config['peft_type']}, and those of experts are LORA")
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    return config | {"inference_mode": True}, {key: whole(t).cpu().contiguous() for key, t in tensors.items()}


def _configure(config: dict[str, Any], place: _Place, adapter: LowRank) -> None:
    """Add the adapter of a matrix of experts to a configuration of PEFT."""
    if bad := [option for option in ("use_dora", "lora_bias", "fan_in_fan_out") if config.get(option)]:
        raise ValueError(f"PEFT has no adapters of experts beside {bad[0]}=True: leave it out")
    rank = adapter.a.shape[-1]
    alpha = adapter.scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    alpha = int(alpha) if alpha == int(alpha) else alpha
    if not config:
        fixed = {"peft_type": "LORA", "bias": "none", "inference_mode": True, "target_modules": []}
        config |= fixed | {"r": rank, "lora_alpha": alpha}
    config["lora_dropout"] = 0.0  # PEFT refuses dropout beside `target_parameters`, and only training uses it
    config["target_parameters"] = sorted({*(config.get("target_parameters") or ()), place.target})
    for own, pattern, value in (("r", "rank_pattern", rank), ("lora_alpha", "alpha_pattern", alpha)):
        if config[own] != value:
            config[pattern] = (config.get(pattern) or {}) | {re.escape(place.target): value}


def _scale(config: dict[str, Any], place: _Place, rank: int) -> float:
    """Factor alpha / r of one matrix in a configuration of PEFT."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    parameter = f"{place.key.removeprefix(ROOT).replace('.base_layer', '')}.{place.matrix}"
    found = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", parameter)]
    alpha = found[0] if found else config["lora_alpha"]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _take_experts(
    model: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any], name: str
) -> Callable[[], None]:
    """Check the experts' part of a file and take it out of `tensors`. Returns a function that loads it."""
    taken: list[tuple[_Place, Tensor, Tensor]] = []
    for place in _places(model, list(config.get("target_parameters") or ())):
        matrix, transposed = place.experts.matrices()[place.matrix]
        experts, fan_in, fan_out = (matrix.shape[i] for i in ((0, 2, 1) if transposed else (0, 1, 2)))
        a, b = (tensors.pop(own, None) for own in place.names)
        if a is None or b is None:
            raise ValueError(f"the file has no {place.names[a is not None]}, and its configuration says that it has")
        rank = len(a) // experts
        if a.shape != (experts * rank, fan_in) or b.shape != (fan_out, rank * experts):
            raise ValueError(
                f"{place.names[0]} is {tuple(a.shape)} and B {tuple(b.shape)}; {experts} experts of {fan_in} x "
                f"{fan_out} want (r * {experts}, {fan_in}) and ({fan_out}, r * {experts})"
            )
        taken.append((place, a.unflatten(0, (experts, rank)).mT, b.unflatten(1, (rank, experts)).permute(2, 0, 1)))
    ranks = {a.shape[-1] for _, a, _ in taken}
    present = {adapter.a.shape[-1] for place, *_ in taken if (adapter := place.adapter(name)) is not None}
    if len(ranks) > 1 or (present and present != ranks):
        raise ValueError(
            f"the file's adapters of experts have rank r = {sorted(ranks)}, and those of the model {sorted(present)}: "
            "one rank for all experts can be read, into a new name or an adapter of that rank"
        )

    def put() -> None:
        if taken and not present:
            add_lora(model, ranks.pop(), router=False, name=name)
        for place, a, b in taken:
            adapter = place.adapter(name)
            assert adapter is not None
            adapter.scale = _scale(config, place, a.shape[-1])
            for p, value in ((adapter.a, a), (adapter.b, b)):
                local(p).copy_(value[held_slice(p)])

    return put


def _take_own(model: nn.Module, file: Path, name: str) -> Callable[[], None]:
    """Check the part that PEFT has no format for. Returns a function that loads it."""
    from safetensors.torch import load_file

    saved = {_renamed(own, DEFAULT, name): t for own, t in load_file(file).items()} if file.exists() else {}
    held = {own.removeprefix(ROOT): p for own, p in lora_parameters(model, name).items()}
    if wrong := [own for own, t in saved.items() if own not in held or held[own].shape != t.shape]:
        raise ValueError(
            f"{file} has {wrong[0]}, {tuple(saved[wrong[0]].shape)}, and the model not: add_lora as it was"
        )

    def put() -> None:
        for own, value in saved.items():
            local(held[own]).copy_(value[held_slice(held[own])])

    return put


def _take_peft(model: nn.Module, rest: dict[str, Tensor], config: dict[str, Any], name: str) -> Callable[[], None]:
    """Check the part of PEFT's own layers. Returns a function that loads it."""
    own, have = _of_peft(model, name)
    if wrong := sorted(rest.keys() ^ have.keys()):
        raise ValueError(
            f"{'the file' if wrong[0] in rest else 'the model'} alone has {wrong[0]}: make the model's adapter of the "
            "same layers first, get_peft_model(model, LoraConfig.from_pretrained(folder)) with target_parameters=None"
        )
    for option in ("r", "lora_alpha", "use_rslora"):
        if rest and own.get(option) != config.get(option, own.get(option)):
            raise ValueError(f"the file has {option}={config[option]}, and the model's adapter {own.get(option)}")

    def put() -> None:
        if rest:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, rest, adapter_name=name)

    return put


def _renamed(parameter: str, old: str, new: str) -> str:
    return parameter.replace(f".lora.{old}.", f".lora.{new}.")
