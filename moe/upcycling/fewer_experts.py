"""Fewer experts in a trained layer: drop those that see few tokens, or merge them into others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...dispatch.local import LocalDispatcher
from ...dispatch.reorder import wide
from ..experts import FeedForwardExperts
from ..gates import BiasedGate, HierarchicalGate
from ..layer import MoE
from .matching import matched

ROWS = {"weight", "bias", "noise_weight", "expert_bias"}  # tensors of gates with a row for each expert
SHARED = {"projection", "temperature"}  # those of the cosine gate that all experts share


def prune_experts(layer: MoE, keep: Sequence[int]) -> MoE:
    """Keep some experts of a trained layer, with their rows of the router, in place.

    Tokens of a dropped expert go to their next best ones. `merge_experts` keeps a part of what it has learned. Take the
    loads of many batches to choose, as `turnout.moe.load` gives them. Shared experts, the capacity factor and the
    expert bias of "sigmoid" stay as they are. Call `parallelize` and make the optimizer afterwards.

    A model's config is not changed: a model built with the new `num_experts` loads the state dict.

    Args:
        layer: layer on one rank.
        keep: ids of the experts to keep, at least `top_k`. They get the ids 0, 1 and so on, in this order.

    Returns:
        The layer.

    Raises:
        ValueError: ids that do not fit, or a layer whose experts cannot be dropped. The layer is then unchanged.

    >>> layer = MoE(dim=4, hidden=8, num_experts=4, top_k=2)
    >>> _ = prune_experts(layer, keep=[3, 0])
    >>> layer.num_experts, layer.experts.w_up.shape[0], layer.gate.weight.shape[0]
    (2, 2, 2)
    """
    return merge_experts(layer, [[expert] for expert in keep])


@torch.no_grad()
def merge_experts(layer: MoE, groups: Sequence[Sequence[int]], load: Tensor | None = None) -> MoE:
    """Make one expert of each group of experts of a trained layer, in place: the mean of their weights, by load.

    The rows of the router are averaged in the same way. Before, the hidden units of feed-forward experts are put in the
    order that is most like the first expert's of their group (`matching.matched`). Experts made by a factory are
    averaged as they are. Even matched experts lose much if they were not initialised alike, as by `upcycle`: compare
    the loss with that of `prune_experts`, and train on.

    Args:
        layer: layer on one rank, as for `prune_experts`.
        groups: ids of the experts of each new expert; the hidden units of the first keep their order. Experts in no
            group are dropped.
        load: tokens of each expert, [E], which weigh the mean. None, the default, weighs them equally, and so does a
            group without any tokens.

    Returns:
        The layer.

    Raises:
        ValueError: ids or a load that do not fit, or a layer whose experts cannot be dropped. The layer is then
            unchanged.

    References:
        MC-SMoE, arXiv:2310.01334.

    >>> layer = MoE(dim=4, hidden=8, num_experts=4, top_k=2)
    >>> expected = (3 * layer.gate.weight[0] + layer.gate.weight[2]) / 4
    >>> layer = merge_experts(layer, [[0, 2], [1, 3]], load=torch.tensor([3, 5, 1, 5]))
    >>> torch.allclose(layer.gate.weight[0], expected)
    True
    """
    _check(layer, groups, load)
    _match(layer, groups)
    E = layer.num_experts
    load = torch.ones(E) if load is None else load
    shares = []
    for group in groups:
        own = load[list(group)].double().cpu()
        shares.append(own / own.sum() if own.sum() > 0 else torch.full_like(own, 1 / len(own)))

    def mixed(rows: Tensor) -> Tensor:
        """The rows of new experts: [E, ...] -> [number of groups, ...]."""
        each = []
        for group, share in zip(groups, shares, strict=True):
            own = rows[list(group)]
            if len(group) > 1:
                own = wide(own)
                own = (own * share.to(own).view(-1, *[1] * (own.ndim - 1))).sum(0, keepdim=True)
            each.append(own.to(rows.dtype))
        return torch.cat(each)

    for module in layer.experts.modules():
        _replace(module, mixed, {*module._parameters, *module._buffers})
    _replace(layer.gate, mixed, ROWS)
    layer.num_experts = layer.experts.num_experts = layer.gate.num_experts = len(groups)
    if isinstance(layer.gate, BiasedGate):
        layer.gate._load = torch.zeros(len(groups), dtype=torch.int64)
    layer._last, layer._checked = None, set()
    return layer


def _match(layer: MoE, groups: Sequence[Sequence[int]]) -> None:
    """Put the hidden units of all experts of a group into the order of the first one's."""
    if not isinstance(layer.experts, FeedForwardExperts):
        return  # nothing is known about the units of a factory's modules
    for first, *others in groups:
        for other in others:
            for name, own in matched(layer.experts, first, other).items():
                getattr(layer.experts, name)[other] = own


def _replace(module: nn.Module, mixed: Callable[[Tensor], Tensor], names: Collection[str]) -> None:
    for name, p in [*module._parameters.items()]:
        if p is not None and name in names:
            module._parameters[name] = nn.Parameter(mixed(p.detach()), p.requires_grad)
    for name, b in [*module._buffers.items()]:
        if b is not None and name in names:
            module._buffers[name] = mixed(b)


def _check(layer: MoE, groups: Sequence[Sequence[int]], load: Tensor | None) -> None:
    """Raise a ValueError for what cannot be pruned, before anything is changed."""
    gate, experts, E = layer.gate, layer.experts, layer.num_experts
    kind = type(gate).__name__
    tensors = [*layer.parameters(), *layer.buffers()]
    own = {name for name, _ in [*gate.named_parameters(), *gate.named_buffers()]}
    groups_of_gate = getattr(gate, "groups", 1)
    for wrong, why in (
        (not gate.learned, f"{kind} has no rows of a router to drop: it would send all tokens elsewhere"),
        (isinstance(gate, HierarchicalGate), f"{kind} chooses groups of experts first, and they would be unequal"),
        (groups_of_gate > 1, f"the gate chooses among groups={groups_of_gate} of equal size"),
        (layer.free is not None, "its gate also chooses free experts"),
        (
            experts.lora is not None or gate.lora is not None,
            "it has adapters: call merge_lora(layer, keep=False) before",
        ),
        (experts.in_four_bits, "its experts are in 4 bits: prune before quantize_experts"),
        (layer.tap is not None, "its routings are recorded or replayed, by ids that would change: end that before"),
        (any(t.is_meta for t in tensors), "it is on the meta device, without weights"),
    ):
        if wrong:
            raise ValueError(f"experts of this layer cannot be pruned: {why}")
    if not isinstance(layer.dispatcher, LocalDispatcher) or any(isinstance(t, DTensor) for t in tensors):
        raise ValueError("experts are spread over ranks: prune them on one rank, before parallelize and FSDP")
    if experts.placement is not None:
        raise ValueError("place_experts has moved the experts: prune them before")
    if unknown := own - ROWS - SHARED:
        raise ValueError(f"{kind} has {', '.join(sorted(unknown))}: it is unknown which rows belong to an expert")
    ids = [expert for group in groups for expert in group]
    if not groups or not all(len(group) for group in groups):
        raise ValueError(f"there must be one group of experts or more, and none without experts; got {list(groups)}")
    if len(set(ids)) < len(ids) or not all(isinstance(e, int) and 0 <= e < E for e in ids):
        raise ValueError(f"ids of experts must be different integers from 0 to {E - 1}; got {ids}")
    if load is not None and (load.shape != (E,) or bool((load < 0).any())):
        raise ValueError(f"load must be the tokens of {E} experts, 0 or more; got {load.tolist()}")
    if len(groups) < layer.top_k:
        raise ValueError(
            f"{len(groups)} experts are fewer than top_k={layer.top_k}: keep more, or lower layer.top_k before"
        )
