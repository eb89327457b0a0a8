"""`upcycle`: initialise MoE layers from a dense model's feed-forward blocks, so that both compute the same at first."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..experts.base import Experts
from ..experts.feed_forward import FeedForwardExperts
from ..experts.placed import check_home
from ..experts.sharded import held_slice, local, seeded, whole
from ..gates import Gate
from ..layer import MoE, moe_layers
from ..names import called
from .dense_block import Dense, dense_tensors, named_activation

Model = TypeVar("Model", bound=nn.Module)

HIDDEN = {"w_up": 1, "w_gate": 1, "w_down": 0, "b_up": 0, "b_gate": 0}  # hidden axis of one expert's tensors


@torch.no_grad()
def upcycle(model: Model, dense: Dense, noise: float = 0.0, reset: float = 0.0, scale: float | None = None) -> Model:
    """Give a model with MoE layers the weights of a dense model, in place, so that both compute the same at first.

    Every expert becomes a copy of the dense block at its layer's place (sparse upcycling). If experts are narrower,
    with H = H_dense / G, each copy is cut into G fine-grained experts: expert e holds shard e mod G of the hidden
    units. The G experts of a copy share one row of the router. So a token that picks k experts, a multiple of G, picks
    k / G whole copies ("virtual groups").

    The weighted sum of copies must be the dense block, so down projections are multiplied by a constant. It is found
    with random tokens, for any gate. A capacity limit that drops tokens still changes the function.

    Every rank calls it, before or after `parallelize`, and fills the parts that it holds. Other parameters and buffers
    are copied by name. The router keeps its initial values, except for shared rows.

    Args:
        model: a `MoE`, or a model with `MoE` layers, not on the meta device. Experts are named ones, or modules of the
            dense block's own kind, for which G is 1.
        dense: for a model, the dense model, whose modules have the same names. For a `MoE`, a block with Linear layers
            ``up``, ``down`` and perhaps ``gate`` (or ``up_proj`` ...), or an `nn.Sequential` of Linear, activation,
            Linear. Tensors by the names of `FeedForwardExperts` will do as well:
            ``{"w_up": [D, H_dense], "w_down": [H_dense, D], ...}``.
        noise: standard deviation of normal noise on each expert's matrices, as a multiple of the matrix's own; 0.0 by
            default. Above 0, the model is not equal to the dense one.
        reset: share of each expert's hidden units that is drawn anew, with the mean and deviation of the replaced
            values; 0.0 by default, 0.5 in the Drop-Upcycling paper. Above 0, the model is not equal to the dense one.
        scale: factor of down projections. None, the default, finds it as above. It does not exist if weights are
            softmax scores over all E experts, whose sum is not constant. For an untrained router, He et al. then
            use num_experts * G / top_k.

    Returns:
        The model.

    Raises:
        ValueError: the models do not fit together, or no constant makes them equal. The model is then unchanged.

    References:
        Sparse upcycling: Komatsuzaki et al. 2022, arXiv:2212.05055. Virtual groups: He et al. 2024, arXiv:2410.07524.
        Drop-Upcycling: arXiv:2502.19261.

    >>> dense = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    >>> layer = upcycle(MoE(dim=4, hidden=8, num_experts=4, experts="gelu", bias=True), dense)
    >>> x = torch.randn(3, 4)
    >>> torch.allclose(layer(x), dense(x), atol=1e-5)
    True
    """
    if noise < 0 or not 0 <= reset <= 1:
        raise ValueError(f"noise must be 0 or more, and reset between 0 and 1; got noise={noise} and reset={reset}")
    check_home(model, "upcycle")
    layers = moe_layers(model)
    blocks = {name: dense if layer is model else _part(dense, name) for name, layer in layers.items()}
    blocks = {name: block for name, block in blocks.items() if not isinstance(block, MoE)}
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer where the dense model has a dense block: pass the MoE model first"
        )
    rest = list(_rest(model, dense, blocks))
    plans = [(layers[name], *_plan(name, layers[name], block, reset, scale)) for name, block in blocks.items()]
    for target, value in rest:
        local(target).copy_(whole(value)[held_slice(target)])
    for layer, tensors, groups, factor in plans:
        tensors = {name: whole(t) for name, t in tensors.items()}  # whole tensors of one block at a time
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
    """Tensors of the dense block by an expert's names, the number of shards G, and the factor of down projections."""
    where = called(name)
    for what, given in {"shared": layer.shared, "free": layer.free}.items():
        if given is not None:
            raise ValueError(f"{where} has {what} experts, whose outputs the dense block lacks: build it without them")
    if layer.experts.lora is not None:
        raise ValueError(f"the experts of {where} have adapters: call upcycle before add_lora")
    if layer.experts.in_four_bits:
        raise ValueError(f"the experts of {where} are in 4 bits: call upcycle before quantize_experts")
    if layer.experts.weight_on != "output":
        raise ValueError(
            f"{where} multiplies inputs by the router's weight, so that its output is no weighted sum: set "
            'layer.experts.weight_on = "output"'
        )
    if any(t.is_meta for t in (*layer.parameters(), *layer.buffers())):
        raise ValueError(f"{where} is on the meta device: call to_empty and reset_parameters first")
    experts = layer.experts
    if isinstance(experts, FeedForwardExperts):
        tensors, groups = _feed_forward(where, experts, dense)
    elif reset:
        raise ValueError(
            f"reset={reset} needs named experts, but {where} has {type(experts).__name__}: leave reset out"
        )
    else:
        tensors, groups = _as_they_are(where, experts, dense), 1
    if layer.num_experts % groups or layer.top_k % groups:
        raise ValueError(
            f"experts of {where} hold 1/{groups} of the dense block: num_experts={layer.num_experts} and "
            f"top_k={layer.top_k} must be multiples of {groups}, so that a token gets all shards of a copy"
        )
    factor = 1 / _share(where, layer.gate, groups) if scale is None else scale
    if experts.normed and groups > 1:
        raise ValueError(
            f"experts of {where} normalise their outputs, so that shards of a block do not add up to it: build them as "
            "wide as the block"
        )
    if (experts.normed or not isinstance(experts, FeedForwardExperts)) and abs(factor - 1) > 1e-6:
        raise ValueError(
            f"router weights of {where} add up to {1 / factor:.3g}, and {type(experts).__name__} cannot be scaled: use "
            "a gate whose weights add up to 1"
        )
    return tensors, groups, factor


def _feed_forward(where: str, experts: FeedForwardExperts, dense: Dense) -> tuple[dict[str, Tensor], int]:
    tensors, activation = dense_tensors(dense)
    wanted = {name for name, _ in experts.named_parameters()}
    missing = {name for name in wanted if name.startswith("w_")} - tensors.keys()
    if missing or tensors.keys() - wanted:
        raise ValueError(
            f"experts of {where} have {sorted(wanted)}, but the dense block has {sorted(tensors)}: "
            "build the layer with the same kind of experts, and bias=True if the block has biases"
        )
    if activation is not None and named_activation(tensors, activation) != experts.activation:
        raise ValueError(
            f"{where} has {experts.activation} experts, but the dense block has another activation, {activation}: "
            "build the layer with that one"
        )
    dim, wide = tensors["w_up"].shape
    groups = wide // experts.hidden
    if dim != experts.dim or groups < 1 or wide % experts.hidden:
        raise ValueError(
            f"experts of {where} are {experts.dim} x {experts.hidden}, but the dense block is {dim} x {wide}: "
            f"dim must be equal, and hidden must be {wide} or a divisor of it"
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
    """Tensors of a dense block that is itself a module of the experts' kind, without renaming."""
    own = dict(dense) if isinstance(dense, Mapping) else {f"module.{name}": t for name, t in dense.state_dict().items()}
    shapes = {name: tuple(t.shape[1:]) for name, t in _stacked(experts)}
    if {name: tuple(t.shape) for name, t in own.items()} != shapes:
        raise ValueError(
            f"an expert of {where} has {shapes}, but the dense block is of another kind: build experts as the block is"
        )
    return own


def _share(where: str, gate: Gate, groups: int) -> float:
    """The sum of router weights over the copies of a shard, which must be equal for all (random) tokens and shards."""
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
            f"router weights of {where} add up to {groups * least:.3g} for one token and {groups * most:.3g} for "
            "another, so that no scale makes experts equal to the dense block: use a gate with normalised weights "
            f"(topk with top_k > 1, or TopKGate(..., normalize=True){', and learned' if groups > 1 else ''}), or pass "
            "scale="
        )
    return float(share.mean())


def _group_rows(gate: Gate, groups: int) -> None:
    """Virtual groups: give all experts of a copy the router row of the first one, so that their scores are equal."""
    for each in (getattr(gate, "weight", None), gate.bias) if groups > 1 and gate.learned else ():
        if isinstance(each, Tensor):
            each.copy_(each[::groups].repeat_interleave(groups, 0))


def _shard(tensors: Mapping[str, Tensor], shard: int, groups: int, factor: float) -> dict[str, Tensor]:
    values = {}
    for name, tensor in tensors.items():
        if name in HIDDEN:
            tensor = tensor.chunk(groups, HIDDEN[name])[shard]
        scale = {"w_down": factor, "b_down": factor / groups}.get(name, 1.0)  # all G shards of a copy add their bias
        values[name] = tensor if scale == 1 else tensor * scale
    return values


def _reset(values: dict[str, Tensor], part: float, generator: torch.Generator) -> None:
    """Draw a share of the hidden units anew, the same units in all matrices."""
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
    """Tensors of the model outside its MoE layers, each with the dense model's tensor of the same name."""
    if isinstance(dense, Mapping) or "" in blocks:
        return
    theirs = {**dict(dense.named_parameters(remove_duplicate=False)), **dict(dense.named_buffers())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(name.startswith(f"{block}.") for block in blocks):
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            got = tuple(theirs[name].shape) if name in theirs else "missing"
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but {got} in the dense model: build both alike")
        yield tensor, theirs[name].detach()


def _part(dense: Dense, name: str) -> nn.Module:
    if isinstance(dense, Mapping):
        raise ValueError("dense is a dict of tensors, which fits a single MoE: for a model pass the dense model")
    try:
        return dense.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the dense model has no module {name}, where the MoE model has a layer: give its modules the same names"
        ) from None


def _stacked(experts: Experts) -> list[tuple[str, Tensor]]:
    return [*experts.named_parameters(), *experts.named_buffers()]
