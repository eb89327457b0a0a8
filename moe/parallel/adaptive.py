"""`Adaptive` chooses, between steps, how each layer brings tokens and experts together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ...dispatch import mesh as axes
from ...dispatch.failure import named
from ...dispatch.mesh import Meshes
from ..layer import moe_layers
from .adaptive_layer import AdaptiveLayer, LayerReport
from .measured_costs import measured_costs
from .place_experts import place_experts


class Adaptive:
    """Chooses parallelism, shadowed experts, transport and chunks of each layer by measurement, between steps.

    It changes what a layer leaves to it: `layer.parallelism` and `layer.shadow` if they were set to ``"auto"``, and
    transport and chunks of an `AutoDispatcher`. ``parallelize(model, mesh, parallelism="auto")`` leaves it all of
    these. Choices change no result. A cost model predicts the time of each choice from links, copies and experts, which
    are measured when the object is made, and from the load of the last steps. Choices that may be faster are tried, and
    the fastest stays until the load changes. See docs/explanations/adaptive.md.

    Layers count their load on the device. Every `every` steps, the counts and times of all layers take one all-reduce
    and one wait for the device.

    Args:
        model: model after `parallelize`, with its weights. Every rank makes the object and calls `step` at the same
            points.
        mesh: mesh that `parallelize` got. None, the default, is one rank, where nothing is chosen.
        optimizer: the optimizer of the experts, or several. With it, experts also move to other ranks, and their
            optimizer state with them, where the cost model says that it pays (`place_experts`). Experts that several
            layers share stay. None, the default, leaves all experts where they are.
        every: steps between two decisions, 20 by default.
        max_bytes: largest number of bytes of gathered weights in one layer. None, the default, sets no limit. Copies
            live until the backward has used them.

    Attributes:
        reports: a `LayerReport` for each layer, by its name in the model that `parallelize` got; empty before the first
            decision.

    Raises:
        ValueError: the model has no MoE layer, `every` or `max_bytes` is not positive, or `place_experts` refuses an
            optimizer.
        DispatchError: a rank did not answer.

    >>> from turnout.moe import MoE
    >>> model = nn.Sequential(MoE(16, 32, num_experts=4, balance=0.0))
    >>> adaptive = Adaptive(model, every=2)
    >>> for _ in range(2):
    ...     model(torch.randn(10, 16)).sum().backward()
    ...     adaptive.step()
    >>> report = adaptive.reports["0"]
    >>> sum(report.tokens_per_expert), report.predicted > 0
    (40, True)
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh | Meshes | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        every: int = 20,
        max_bytes: float | None = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps; got {every!r}")
        if max_bytes is not None and not (isinstance(max_bytes, int | float) and max_bytes > 0):
            raise ValueError(f"max_bytes must be a positive number of bytes, or None; got {max_bytes!r}")
        layers = moe_layers(model)
        if not layers and (mesh is None or not axes.staged(mesh)):  # a stage of a pipeline may have none
            raise ValueError(f"{type(model).__name__} has no MoE layer: there is nothing to choose")
        self.every, self.reports = every, dict[str, LayerReport]()
        self._group = None if mesh is None else axes.token_group(mesh)
        self._device = next(model.parameters()).device
        experts = None if mesh is None else axes.of_experts(mesh)
        costs = measured_costs(layers, experts, self._group) if layers else {}
        self._layers = {
            name: AdaptiveLayer(name if layer.place is None else layer.place.name, layer, costs[name], max_bytes)
            for name, layer in layers.items()
        }
        users = Counter(id(p) for layer in layers.values() for p in layer.experts.parameters())
        self._movable = [n for n, layer in layers.items() if all(users[id(p)] == 1 for p in layer.experts.parameters())]
        self._model, self._mesh, self._steps = model, mesh, 0
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else [*(optimizer or ())]
        if self._optimizers and mesh is not None:
            place_experts(model, mesh, self._optimizers, {})  # what it refuses, it refuses now

    def step(self) -> None:
        """End a step. Call it after each optimizer step, on every rank; every `every`-th call decides."""
        for each in self._layers.values():
            each.end_step()
        self._steps += 1
        if self._steps < self.every or not self._layers:
            return
        self._steps, ranks = 0, 1 if self._group is None else dist.get_world_size(self._group)
        taken = [each.take(self._device) for each in self._layers.values()]
        numbers = torch.cat(taken)
        if self._group is not None:
            with named("loads and times of layers (Adaptive)", self._group):
                dist.all_reduce(numbers, group=self._group)
        first = self._group is None or dist.get_rank(self._group) == 0
        parts = [part.tolist() for part in numbers.cpu().split([len(each) for each in taken])]
        ran = [(each, part) for each, part in zip(self._layers.values(), parts, strict=True) if sum(part[:-3])]
        self._agree([each for each, _ in ran if each.decisions is None])
        for each, (*counts, _, forwards, seconds) in ran:
            tokens = sum(counts) / each.layer.top_k / forwards
            steps = self.every * ranks
            self.reports[each.name] = each.decide(counts, tokens, forwards / steps, seconds / ranks, says=first)
        if self._optimizers and self._mesh is not None:
            found = {name: self._layers[name].better_order(says=first) for name in self._movable}
            if orders := {name: order for name, order in found.items() if order is not None}:
                place_experts(self._model, self._mesh, self._optimizers, orders)

    def _agree(self, layers: list[AdaptiveLayer]) -> None:
        """Let all ranks use the same transports for layers that decide for the first time.

        An `AutoDispatcher` has chosen with the ranks that share the experts. With "edp" there are several such groups,
        whose batches may have differed in size.
        """
        if layers and self._group is not None:
            sent = [[each.transport for each in layers]]
            with named("the first choice of transports (Adaptive)", self._group):
                dist.broadcast_object_list(sent, group=self._group, group_src=0)
            for each, choice in zip(layers, sent[0], strict=True):
                each.use_transport(choice)
