"""Find the MoE blocks of a model, and for each kind of block the rule by which it is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ...moe.layer import MoE
from .block_experts import FusedExperts
from .block_parts import Parts
from .block_twins import HOOKS, tensors
from .bridged import BridgedExperts, BridgedMoE
from .compare_blocks import block_differs, experts_differ, marks, takes_routing
from .families import EXPERTS, FAMILIES, NOT_FEED_FORWARD, ROUTERS, plain

Adapter = Callable[[Any], Parts]
Adapters = Mapping[type[nn.Module], Adapter]


@dataclass(frozen=True)
class Rule:
    """How blocks of one kind are replaced: the whole block, or its child `experts`.

    Attributes:
        child: name of the child that is replaced, or "" for the whole block.
        layer: function from a block to the layer that replaces it. It raises ValueError if the block has other parts.
        differs: function from a block to a sentence about the first difference between block and layer, or None. It
            computes with both.
        fits: the same without computing, from the parts of the block alone.
    """

    child: str
    layer: Callable[[Any], BridgedMoE]
    differs: Callable[[Any], str | None]
    fits: Callable[[Any], str | None]


@dataclass(frozen=True)
class Found:
    """An MoE block: its path in the model, its parent module and its name there."""

    path: str
    parent: nn.Module
    name: str
    block: nn.Module


def blocks(module: nn.Module, adapters: Adapters, prefix: str = "") -> Iterator[Found]:
    """Yield the MoE blocks of a module that are not replaced already."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, MoE):
            continue
        experts = dict(child.named_children()).get("experts")
        if _known(child, adapters) or (experts is not None and not isinstance(experts, MoE)):
            if type(child).__name__ not in NOT_FEED_FORWARD or type(child) in adapters:
                yield Found(path, module, name, child)
        else:
            yield from blocks(child, adapters, path)


def kind(block: nn.Module) -> tuple[Any, ...]:
    """Key of a block. Blocks with equal keys compute the same function of their input and weights."""
    return tuple(marks(block))


def rule(found: Found, adapters: Adapters, verify: bool) -> Rule:
    """The first rule that fits a block. With `verify`, the first one whose layer computes what the block does.

    Raises:
        ValueError: no rule fits. The message has the block's name and the reason.
    """
    own = _known(found.block, adapters)
    reasons = []
    for each in [_whole(own)] if own else [_whole(plain), EXPERTS_ALONE]:
        try:
            wrong = (each.differs if verify else each.fits)(found.block)
        except ValueError as error:
            wrong = str(error)
        except Exception as error:  # of code that is not ours, on inputs it may not expect
            wrong = f"{type(error).__name__}: {error}"
        if wrong is None:
            return each
        reasons.append(wrong)
    name = type(found.block).__name__
    if own:
        raise ValueError(f"{found.path} ({name}) and the MoE made of its parts do not compute the same: {reasons[0]}")
    raise ValueError(
        f"{found.path} is a {name}, for which there is no adapter, and it cannot be replaced by what it looks like: "
        f"{reasons[-1]}. Write a function block -> Parts and pass adapters={{{name}: it}}; docs/guides/hugging_face.md "
        "says how"
    )


def refuse(found: Found, rule: Rule) -> None:
    """Raise ValueError if a block is sharded, offloaded, on several devices, or has hooks that would not run."""
    called = f"{found.path} ({type(found.block).__name__})"
    held = tensors(found.block)
    for name, t in held.items():
        if isinstance(t, DTensor):
            raise ValueError(
                f"{called}: {name} is spread over ranks already: load the model without tp_plan, ep_plan or "
                "distributed_config, and let parallelize spread the experts"
            )
    if len({t.device for t in held.values() if not t.is_meta}) > 1:  # a model without weights may have buffers
        raise ValueError(f"{called} lies on several devices: load the model with a device_map that keeps blocks whole")
    for name, m in found.block.named_modules():
        hook: Any = getattr(m, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
            raise ValueError(
                f"{called} is offloaded by accelerate, which brings its weights only where the block itself runs: load "
                "the model without offload (device_map without 'cpu' or 'disk' beside a GPU)"
            )
        if getattr(m, "_is_expert_parallel", False):
            raise ValueError(f"{called} is spread by transformers' expert parallelism: load the model without it")
        # modules that are called no more: what is in the experts, and they themselves if the whole block is replaced
        silent = name.startswith("experts.") or (name == "experts" and not rule.child)
        if silent and any(getattr(m, each) for each in HOOKS):
            raise ValueError(f"{called}: {name} has hooks, which would never run: remove them, or hook the block")


def _whole(adapter: Adapter) -> Rule:
    def fits(block: nn.Module) -> str | None:
        if adapter is plain:  # others may change the block
            plain(block)
        return None

    return Rule("", lambda b: BridgedMoE(b, adapter(b)), lambda b: block_differs(b, adapter), fits)


def _alone(block: Any) -> BridgedExperts:
    router = next((getattr(block, name) for name in ROUTERS if hasattr(block, name)), None)
    return BridgedExperts(block.experts, _computing(block.experts)(block.experts), getattr(router, "top_k", 1))


def _fit(block: Any) -> str | None:
    if not takes_routing(block.experts):
        return f"{type(block.experts).__name__} is not called as experts(x, expert, weight)"
    if _computing(block.experts) is FusedExperts:  # others may change the module
        FusedExperts(block.experts)
    return None


def _computing(experts: nn.Module) -> Callable[[Any], FusedExperts]:
    known = EXPERTS if type(experts).__module__.startswith("transformers.") else {}
    return known.get(type(experts).__name__, FusedExperts)


EXPERTS_ALONE = Rule("experts", _alone, lambda b: _fit(b) or experts_differ(b.experts, _computing(b.experts)), _fit)


def _known(block: nn.Module, adapters: Adapters) -> Adapter | None:
    if type(block) in adapters:
        return adapters[type(block)]
    # by name and place: other people's code may use the same names for another rule
    return FAMILIES.get(type(block).__name__) if type(block).__module__.startswith("transformers.") else None
