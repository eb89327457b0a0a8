"""Upcycling: a dense model's feed-forward blocks become mixtures of experts that compute the same function at first."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..build import called
from ..experts.base import Experts
from ..experts.feed_forward import FeedForwardExperts
from ..experts.sharded import held_slice, local, seeded, whole
from ..gates import Gate
from ..layer import MoE
from .dense_block import Dense, dense_tensors, named_activation

Model = TypeVar("Model", bound=nn.Module)

HIDDEN = {"w_up": 1, "w_gate": 1, "w_down": 0, "b_up": 0, "b_gate": 0}  # the hidden axis of one expert's tensors


@torch.no_grad()
def upcycle(model: Model, dense: Dense, noise: float = 0.0, reset: float = 0.0, scale: float | None = None) -> Model:
    """Give a model with MoE layers the weights of a dense one, in place: at first both compute the same.

    Every expert becomes a copy of the dense block that stands where its layer does (sparse upcycling, Komatsuzaki et
    al. 2022, arXiv:2212.05055). Where experts are narrower, H = H_dense / G, they are fine-grained: expert e holds
    shard e mod G of the hidden units, and the G experts of each copy share one row of the router, so that a token that
    picks k of them, a multiple of G, picks k / G whole copies ("virtual groups", He et al. 2024, arXiv:2410.07524).
    Down projections are multiplied by the number that makes the weighted sum of copies the dense block; whether there
    is one is tried on random tokens, for any gate. What drops tokens (capacity) still changes the function.

    Every rank calls it, before or after `parallelize`; each keeps what it holds. The rest of the model is copied by
    name. The router stays as it was initialised, but for the shared rows.

    Args:
        model: a `MoE` of named experts, or of modules of the dense block's own kind (then G is 1); or a model with such
            layers. Not on the meta device.
        dense: for a `MoE`: a block with Linear layers ``up``, ``down`` and maybe ``gate``, or ``up_proj`` and so on; a
            `nn.Sequential` of Linear, activation, Linear; or the tensors of a single expert as `FeedForwardExperts`
            names them, ``{"w_up": [D, H_dense], "w_down": [H_dense, D], ...}``. For a model: the dense one, whose
            modules have the same names.
        noise: normal noise on each expert's matrices, in standard deviations of theirs. Above 0 nothing is equal.
        reset: the part of each expert's hidden units that is drawn anew, each expert its own, with mean and deviation
            of what is replaced (Drop-Upcycling, arXiv:2502.19261; 0.5 there). Above 0 nothing is equal.
        scale: what down projections are multiplied by; None: found as above. Weights that are softmax scores of all E
            experts add up to no constant; He et al. then take num_experts * G / top_k, right for an untrained router.

    Raises:
        ValueError: what does not fit, or cannot be equal, and why; the model is then as it was.
    """
    if noise < 0 or not 0 <= reset <= 1:
        raise ValueError(f"noise must not be negative, and reset lie in [0, 1]; got {noise} and {reset}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    blocks = {name: dense if layer is model else _part(dense, name) for name, layer in layers.items()}
    blocks = {name: block for name, block in blocks.items() if not isinstance(block, MoE)}
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no MoE layer where the other has a dense block")
    rest = list(_rest(model, dense, blocks))
    plans = [(layers[name], *_plan(name, layers[name], block, reset, scale)) for name, block in blocks.items()]
    for target, value in rest:
        local(target).copy_(whole(value)[held_slice(target)])
    for layer, tensors, groups, factor in plans:
        tensors = {name: whole(t) for name, t in tensors.items()}  # of one block at a time
        _group_rows(layer.gate, groups)
        for place, expert in enumerate(layer.experts.owned):
            generator = seeded(layer.experts.seed, f"{expert}/upcycle")
            values = _shard(tensors, expert % groups, groups, factor)
            _reset(values, reset, generator)
            for name, stacked in _stacked(layer.experts):
                value = values[name]
                if noise and value.ndim > 1:
                    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32)
                    value = value + noise * value.std() * drawn.to(value)
                local(stacked)[place].copy_(value[held_slice(stacked)[1:]])
    return model


def _plan(
    name: str, layer: MoE, dense: Dense, reset: float, scale: float | None
) -> tuple[dict[str, Tensor], int, float]:
    """Tensors of the dense block by the names of an expert's, shards G, and the factor of down projections."""
    where = called(name)
    for what, given in {"shared": layer.shared, "free": layer.free}.items():
        if given is not None:
            raise ValueError(f"{where} has {what}, which add to what the copies compute: build it without")
    if layer.experts.lora is not None:
        raise ValueError(f"{where} has adapters: upcycle it before add_lora")
    if layer.experts.in_four_bits:
        raise ValueError(f"{where} has experts in 4 bits: upcycle it before quantize_experts")
    if layer.experts.weight_on != "output":
        raise ValueError(
            f'{where} weighs what enters its experts, which is no weighted sum: set layer.experts.weight_on = "output"'
        )
    if any(t.is_meta for t in (*layer.parameters(), *layer.buffers())):
        raise ValueError(f"{where} is on the meta device: call to_empty and reset_parameters first")
    experts = layer.experts
    if isinstance(experts, FeedForwardExperts):
        tensors, groups = _feed_forward(where, experts, dense)
    elif reset:
        raise ValueError(f"the hidden units of {where}, of {type(experts).__name__}, are not known: leave reset out")
    else:
        tensors, groups = _as_they_are(where, experts, dense), 1
    if layer.num_experts % groups or layer.top_k % groups:
        raise ValueError(
            f"experts of {where} hold 1/{groups} of the dense block: num_experts={layer.num_experts} and "
            f"top_k={layer.top_k} must be multiples of {groups}, so that a token gets all shards of a copy"
        )
    factor = 1 / _share(where, layer.gate, groups) if scale is None else scale
    if not isinstance(experts, FeedForwardExperts) and abs(factor - 1) > 1e-6:
        raise ValueError(f"the weights of {where} add up to {1 / factor:.3g}, and its experts cannot be scaled")
    return tensors, groups, factor


def _feed_forward(where: str, experts: FeedForwardExperts, dense: Dense) -> tuple[dict[str, Tensor], int]:
    tensors, activation = dense_tensors(dense)
    wanted = {name for name, _ in experts.named_parameters()}
    missing = {name for name in wanted if name.startswith("w_")} - tensors.keys()
    if missing or tensors.keys() - wanted:
        raise ValueError(
            f"{where} has experts of {sorted(wanted)}, the dense block has {sorted(tensors)}: "
            "build the layer with the same kind of experts, and bias=True if the block has biases"
        )
    if activation is not None and named_activation(tensors, activation) != experts.activation:
        raise ValueError(f"{where} has {experts.activation} experts, the dense block another activation: {activation}")
    dim, wide = tensors["w_up"].shape
    groups = wide // experts.hidden
    if dim != experts.dim or groups < 1 or wide % experts.hidden:
        raise ValueError(
            f"{where} has experts {experts.dim} x {experts.hidden}, the dense block is {dim} x {wide}: "
            f"dim must be equal, and hidden be {wide} or a divisor of it"
        )
    for name in wanted - tensors.keys():
        tensors[name] = tensors["w_up"].new_zeros(dim if name == "b_down" else wide)
    sizes = {"w_up": (dim, wide), "w_gate": (dim, wide), "w_down": (wide, dim)}
    sizes |= {"b_up": (wide,), "b_gate": (wide,), "b_down": (dim,)}
    for name, tensor in tensors.items():
        if tensor.shape != sizes[name]:
            raise ValueError(f"{name} of the dense block must be {sizes[name]}; got {tuple(tensor.shape)}")
    return tensors, groups


def _as_they_are(where: str, experts: Experts, dense: Dense) -> dict[str, Tensor]:
    """Experts of another kind: the dense block must be one of them."""
    own = dict(dense) if isinstance(dense, Mapping) else {f"module.{name}": t for name, t in dense.state_dict().items()}
    shapes = {name: tuple(t.shape[1:]) for name, t in _stacked(experts)}
    if {name: tuple(t.shape) for name, t in own.items()} != shapes:
        raise ValueError(f"an expert of {where} has {shapes}, the dense block is of another kind")
    return own


def _share(where: str, gate: Gate, groups: int) -> float:
    """What the weights of a shard's copies add up to, for every token; tried on random ones."""
    gate = copy.deepcopy(gate).to("cpu", torch.float64)
    _group_rows(gate, groups)
    x = torch.randn(64, gate.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = {"ids": torch.arange(len(x))} if gate.takes_ids else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        routing = gate(x, **ids)
    weight = torch.where(routing.expert < 0, 0, routing.weight).to(x.dtype)
    of_each = x.new_zeros(len(x), gate.num_experts).scatter_add(1, routing.expert.clamp(min=0), weight)
    share = of_each.unflatten(1, (-1, groups)).sum(1)  # [T, G]
    least, most = share.aminmax()
    if not 0 < most <= least * (1 + 1e-5):
        raise ValueError(
            f"the weights of {where} add up to {groups * least:.3g} for one token and {groups * most:.3g} for another: "
            "no scale of the experts makes that the dense block; take a gate whose weights are normalised (topk with "
            f"top_k > 1, or TopKGate(..., normalize=True){', and learned' if groups > 1 else ''}), or pass scale="
        )
    return float(share.mean())


def _group_rows(gate: Gate, groups: int) -> None:
    """Virtual groups: the experts of one copy are scored alike, by the first one's row."""
    for each in (getattr(gate, "weight", None), gate.bias) if groups > 1 and gate.learned else ():
        if isinstance(each, Tensor):
            each.copy_(each[::groups].repeat_interleave(groups, 0))


def _shard(tensors: Mapping[str, Tensor], shard: int, groups: int, factor: float) -> dict[str, Tensor]:
    values = {}
    for name, tensor in tensors.items():
        if name in HIDDEN:
            tensor = tensor.chunk(groups, HIDDEN[name])[shard]
        scale = {"w_down": factor, "b_down": factor / groups}.get(name, 1.0)  # each of the G shards adds its bias
        values[name] = tensor if scale == 1 else tensor * scale
    return values


def _reset(values: dict[str, Tensor], part: float, generator: torch.Generator) -> None:
    """Draw a part of the hidden units anew, in all matrices alike."""
    matrices = {name: t for name, t in values.items() if name in HIDDEN and t.ndim == 2}
    if not part:
        return
    width = matrices["w_down"].shape[0]
    units = torch.randperm(width, generator=generator)[: int(part * width)]
    for name, tensor in matrices.items():
        axis, units = HIDDEN[name], units.to(tensor.device)
        old = tensor.index_select(axis, units)
        drawn = torch.randn(old.shape, generator=generator, dtype=torch.float32).to(old)
        if len(units):
            values[name] = tensor.index_copy(axis, units, old.mean() + old.std() * drawn)


def _rest(model: nn.Module, dense: Dense, blocks: Mapping[str, Dense]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of the model outside the layers, each with the dense one's."""
    if isinstance(dense, Mapping) or "" in blocks:
        return
    theirs = {**dict(dense.named_parameters(remove_duplicate=False)), **dict(dense.named_buffers())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(name.startswith(f"{block}.") for block in blocks):
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            got = tuple(theirs[name].shape) if name in theirs else "nothing"
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and {got} in the dense model")
        yield tensor, theirs[name].detach()


def _part(dense: Dense, name: str) -> nn.Module:
    if isinstance(dense, Mapping):
        raise ValueError("tensors by name are for a single MoE: for a model give the dense one")
    try:
        return dense.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the dense model has no module {name}, where the other has a MoE layer") from None


def _stacked(experts: Experts) -> list[tuple[str, Tensor]]:
    return [*experts.named_parameters(), *experts.named_buffers()]
