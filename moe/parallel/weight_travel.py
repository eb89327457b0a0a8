"""Experts that come to their tokens: `parallelism` (Tutel's r) and `shadow` (FasterMoE).

For each expert and forward, either its tokens travel to its weights, or its weights to the tokens. Parameters,
gradients and optimizer state stay where `parallelize` has put them: a gather makes copies for one forward, and its
backward sums the copies' gradients where the parameter lies. See docs/explanations/adaptive.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ...dispatch import mesh as axes
from ...dispatch.dispatcher import Dispatcher
from ...dispatch.dispatcher import Experts as Compute
from ...dispatch.local import LocalDispatcher
from ...dispatch.place import LayerCall, Place
from ...dispatch.plan import Plan
from ...dispatch.traced import outside
from ..experts.base import Experts
from ..experts.sharded import local
from ..names import called
from .weight_copies import Tensors, copy_in_pieces, copy_to, with_copies


@dataclass(frozen=True)
class WeightTravel:
    """Which experts' weights a layer gathers in each forward, and over which ranks.

    Every rank that shares the experts has the same one; ranks compare what is chosen before anything travels.

    Args:
        ep: ranks that hold other experts, in the order of the experts. None if this rank holds all of them.
        etp: ranks that hold other slices of the same experts, in the order of the slices. None if experts are whole.
        parallelism: r. With 0, all experts are gathered. Otherwise r divides the s slices of an expert. Groups of s / r
            neighbouring ranks then gather their slices into one, and a token visits r ranks of each of its experts.
        shadow: ascending global ids of experts that are gathered whole, while tokens of other experts travel. Empty by
            default.
        free: settings that `Adaptive` may change, among ``"parallelism"`` and ``"shadow"``. Empty by default.
        stepped: whether an `Adaptive` of the layer has ended a step; False by default.
    """

    ep: ProcessGroup | None
    etp: ProcessGroup | None
    parallelism: int
    shadow: tuple[int, ...] = ()
    free: frozenset[str] = frozenset()
    stepped: bool = False
    idle: bool = field(init=False)  # nothing is gathered

    def __post_init__(self) -> None:
        idle = self.alone or (self.parallelism == _size(self.etp) and not self.shadow)
        object.__setattr__(self, "idle", idle)

    @classmethod
    def of(cls, mesh: DeviceMesh) -> WeightTravel:
        """Make one for the axes "ep" (or "node" and "local") and "etp" of a mesh. It gathers nothing."""
        ep, etp = (_ascending(axes.axis(mesh, name)) for name in (axes.EP, axes.ETP))
        return cls(ep, etp, _size(etp))

    def choose(
        self,
        num_experts: int,
        layer: str,
        parallelism: int | str | None = None,
        shadow: Sequence[int] | str | None = None,
    ) -> WeightTravel:
        """The same ranks with another choice. "auto" leaves a setting to `Adaptive`, and None keeps it.

        Args:
            num_experts: number of experts E.
            layer: words for the layer in errors.
            parallelism: r, or "auto".
            shadow: ids of experts, or "auto".

        Raises:
            ValueError: r is not among `allowed`, or ids are not those of different experts.
        """
        given = {"parallelism": parallelism, "shadow": shadow}
        fixed = {name for name, value in given.items() if value is not None}
        chosen = replace(self, free=self.free - fixed | {name for name in fixed if given[name] == "auto"})
        if parallelism is not None and parallelism != "auto":
            if type(parallelism) is not int or parallelism not in self.allowed:
                raise ValueError(
                    f"parallelism of {layer} must be one of {', '.join(map(str, self.allowed))} on this mesh, which "
                    f'splits each expert into {_size(self.etp)} (etp={_size(self.etp)}), or "auto"; got {parallelism!r}'
                )
            chosen = replace(chosen, parallelism=parallelism)
        if shadow is not None and shadow != "auto":
            ids = sorted(e for e in shadow if type(e) is int and 0 <= e < num_experts)
            if len(set(ids)) < len(shadow):
                raise ValueError(
                    f"shadow of {layer} must be None or different experts, of 0 to {num_experts - 1}, or "
                    f'"auto"; got {shadow!r}'
                )
            chosen = replace(chosen, shadow=tuple(ids))
        return chosen

    @property
    def alone(self) -> bool:
        """Whether this rank has all experts, so that nothing can be gathered."""
        return self.ep is None and self.etp is None

    @property
    def allowed(self) -> list[int]:
        """Values that `parallelism` may have, in ascending order."""
        slices = _size(self.etp)
        return [r for r in range(slices + 1) if r == 0 or slices % r == 0]

    @property
    def shadow_number(self) -> int:
        """Hash of the shadowed experts, which ranks compare; 0 without any."""
        digest = hashlib.blake2b(repr(self.shadow).encode(), digest_size=4).digest()
        return 1 + int.from_bytes(digest) if self.shadow else 0

    def __call__(self, dispatcher: Dispatcher, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Tensor:
        """x [T, D] -> y [T, D], with the result of `dispatcher` alone."""
        if torch.compiler.is_compiling():
            return outside(self, dispatcher, x, plan, weight, experts)
        _check_gatherable(experts, self)
        plan = plan.started()
        if self.parallelism == 0:
            # before the gather, all ranks hear of one that disagrees or has failed
            dispatcher.announce(x, plan.without_rows(), weight)
            return LocalDispatcher()(x, plan, weight, self.gathered(experts, plan.call))
        travels = self._sliced(experts, plan.call)
        if not self.shadow:
            return dispatcher(x, plan, weight, travels)
        slots = experts.slots_of(self.shadow)
        here = torch.full((plan.counts.numel(),), -1, device=plan.expert.device)  # slot -> its place in `slots`
        here[slots] = torch.arange(len(self.shadow), device=here.device)
        stays = torch.where(plan.expert < 0, -1, here[plan.expert])
        rest = Plan.of(
            plan.expert.masked_fill(stays >= 0, -1), plan.counts.numel(), plan.capacity, plan.place, plan.follows_load
        )
        y = dispatcher(x, replace(rest, call=plan.call), weight, travels)
        copies = self.gathered(experts, plan.call, slots)
        return y + LocalDispatcher()(x, Plan.of(stays, len(self.shadow)), weight, copies)

    def gathered(self, experts: Experts, call: LayerCall | None, slots: Sequence[int] | None = None) -> Compute:
        """A function that computes all experts, or those in some slots, with copies on this rank. Differentiable.

        The backward sends the copies' gradients to the ranks that own the parameters. These add them up in the order of
        the ranks.
        """
        return with_copies(experts, lambda: self._whole_experts(experts, call, slots))

    def _whole_experts(self, experts: Experts, call: LayerCall | None, slots: Sequence[int] | None) -> Tensors:
        ranks, held = _size(self.ep), len(experts.owned)
        wanted = range(experts.num_experts) if slots is None else slots
        places = [[slot % held for slot in wanted if slot // held == w] for w in range(ranks)]
        tensors = self._whole_slices(experts, 1, call, None if slots is None else places[_rank(self.ep)])
        if self.ep is None:
            return tensors
        recv = [len(each) for each in places]
        if max(recv) * (ranks - 1) > sum(recv):  # one rank has most of it
            return copy_in_pieces(tensors, recv, self.ep, call)
        return copy_to(tensors, [True] * ranks, recv, self.ep, call)

    def _sliced(self, experts: Experts, call: LayerCall | None) -> Compute:
        """The experts of this rank, with s / r slices of each. They are gathered once, when the first rows arrive."""
        if self.parallelism == _size(self.etp):
            return experts
        return _GatheredOnce(lambda: with_copies(experts, lambda: self._whole_slices(experts, self.parallelism, call)))

    def _whole_slices(
        self, experts: Experts, blocks: int, call: LayerCall | None, places: list[int] | None = None
    ) -> Tensors:
        """Tensors of this rank's experts, or of those at `places`, with the slices of all ranks of its block."""
        stacked = dict(experts.named_parameters()) | dict(experts.named_buffers())
        held = {name: local(t) for name, t in stacked.items()}
        if places is not None:
            some = torch.tensor(places, dtype=torch.int64)
            held = {name: t.index_select(0, some.to(t.device)) for name, t in held.items()}
        slices, place = _size(self.etp), _rank(self.etp)
        each = slices // blocks  # ranks of a block
        if self.etp is None or each == 1:
            return held
        mine = [slot // each == place // each for slot in range(slices)]
        arrived = copy_to({n: t.unsqueeze(0) for n, t in held.items()}, mine, [*map(int, mine)], self.etp, call)
        whole = {}
        for name, parts in arrived.items():
            axis = _sliced_axis(stacked[name])
            if name in experts.output_parts:  # it is added to the output where it belongs, on one block alone
                parts = _in_place(parts, place // each * each, slices)
            whole[name] = torch.cat(parts.unbind(0), axis)
        return whole

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightTravel:
        return self  # immutable, and process groups cannot be copied


class _GatheredOnce:
    """Experts that are gathered in their first call, or before it by `gather_weights` (`BoundedDispatcher`)."""

    def __init__(self, make: Callable[[], Compute]) -> None:
        self._make = make
        self._made: Compute | None = None

    def gather_weights(self) -> Compute:
        """Gather the experts, unless that is done."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __call__(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return self.gather_weights()(rows, weight, counts)


def chosen(travel: WeightTravel | None, place: Place | None, experts: Experts, **choice: Any) -> WeightTravel:
    """The `WeightTravel` of a layer after a choice. It also tells the layer's `Place`, so that ranks can compare.

    Args:
        travel: `WeightTravel` of the layer until now.
        place: place of the layer.
        experts: experts of the layer.
        choice: `parallelism` or `shadow`, as in `WeightTravel.choose`.

    Raises:
        ValueError: the layer is on one rank, the choice is not allowed, or its experts cannot be gathered.
    """
    if travel is None or place is None:
        raise ValueError(f"{next(iter(choice))} is of a layer that is spread over ranks: call parallelize first")
    travel = travel.choose(experts.num_experts, called(place.name), **choice)
    _check_gatherable(experts, travel)
    place.parallelism, place.shadow = travel.parallelism, travel.shadow_number
    return travel


def can_gather(experts: Experts, travel: WeightTravel) -> bool:
    """Whether experts can be gathered. Buffers may change in a forward, and only those of 4 bits do not."""
    try:
        _check_gatherable(experts, replace(travel, parallelism=0))
    except ValueError:
        return False
    return experts.in_four_bits or next(experts.buffers(), None) is None


def _check_gatherable(experts: Experts, travel: WeightTravel) -> None:
    names = {name for p in experts.parameters() if isinstance(p, DTensor) for name in axes.names(p.device_mesh)}
    if not travel.idle and not isinstance(experts, FSDPModule) and names - {axes.EP, axes.NODE, axes.LOCAL, axes.ETP}:
        raise ValueError(
            f"parallelism={travel.parallelism} and shadow={travel.shadow or None} gather experts, which FSDP2 has "
            "sharded as a part of something larger: call fully_shard_experts(model, mesh) before fully_shard(model)"
        )


def _in_place(parts: Tensor, first: int, slices: int) -> Tensor:
    """Slices [n, ...], with zeros for those before `first` and for the rest of `slices`: [slices, ...]."""
    before, after = first, slices - first - len(parts)
    return torch.cat([parts.new_zeros(before, *parts.shape[1:]), parts, parts.new_zeros(after, *parts.shape[1:])])


def _sliced_axis(tensor: Tensor) -> int:
    """The axis of a stacked tensor that is split over "etp"."""
    assert isinstance(tensor, DTensor)
    placed = tensor.placements[axes.names(tensor.device_mesh).index(axes.ETP)]
    assert isinstance(placed, Shard)
    return placed.dim


def _ascending(axis: DeviceMesh | None) -> ProcessGroup | None:
    """The group of an axis, or None for one rank. ValueError unless its ranks ascend along the mesh."""
    if axis is None or axis.size() == 1:
        return None
    if (ranks := axis.mesh.flatten().tolist()) != sorted(ranks):
        raise ValueError(f"ranks must ascend along {axes.names(axis)}; got {ranks}; init_device_mesh makes it so")
    return axis.get_group()


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
