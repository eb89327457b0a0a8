"""Exponential moving average (EMA) of a model's parameters, on any mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..moe.experts.base import Experts
from ..moe.experts.placed import STATE_DICT, Placement, exchange
from ..moe.experts.sharded import local


class EMA(nn.Module):
    """Exponential moving average of the parameters of a model. Each rank averages the parts that it holds.

    After n updates the decay is the smaller of `decay` and (1 + n) / (10 + n), so early averages forget the initial
    values soon. `torch.optim.swa_utils.AveragedModel` has no place here, because it copies the model, which FSDP2
    refuses. Its averaging function does the work.

    The averages are buffers. To save and load them with the model, give both to a checkpoint::

        ema = EMA(model.parts, decay=0.999)      # after parallel_model or fully_shard
        optimizer.step()
        ema.update()
        checkpoint.save(folder, [*model.parts, ema], optimizer, step)
        with ema.applied():                      # evaluate, or export
            model.evaluate(tokens, targets)

    If `place_experts` moves experts, the next update or use of the averages moves theirs after them.

    Args:
        model: module, or list of the pipeline stages that this rank runs (`ParallelModel.parts`).
        decay: share of the old average that an update keeps, in (0, 1).

    Raises:
        ValueError: a decay outside of (0, 1).

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> ema = EMA(model, decay=0.5)
    >>> _ = nn.init.constant_(model.weight, 10.0)  # in place of a step
    >>> ema.update()
    >>> with ema.applied():
    ...     applied = model.weight.item()
    >>> round(applied, 4), model.weight.item()
    (9.0, 10.0)
    """

    def __init__(self, model: nn.Module | list[nn.Module], decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1); got {decay}")
        self.decay = decay
        parts = [model] if isinstance(model, nn.Module) else model
        named: dict[str, list[nn.Parameter]] = {}
        for part in parts:
            for name, p in part.named_parameters():
                named.setdefault(name, []).append(p)  # the first and the last stage have an embedding each
        self._averaged = [(_buffer(name), same) for name, same in named.items()]
        for name, (first, *_) in self._averaged:
            self.register_buffer(name, first.detach().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        names = {p: _buffer(name) for name, (p, *_) in named.items()}
        layers = [module for part in parts for module in part.modules() if isinstance(module, Experts)]
        self._of_experts = [_OfExperts(each, [names[p] for p in each.parameters()], each.order) for each in layers]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters into the average, after a step of the optimizer. All ranks call it.

        Nothing is sent between ranks, unless `place_experts` has moved experts since the last call.
        """
        self._follow()
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        average = get_ema_multi_avg_fn(decay)
        alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        for name, (p, *_) in self._averaged:
            pair = local(self.get_buffer(name)), local(p.detach())
            for each, into in zip(pair, alike.setdefault((p.dtype, p.device), ([], [])), strict=True):
                into.append(each)
        for averages, parameters in alike.values():
            average(averages, parameters, None)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averages as its parameters. It has its own again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._follow()
        for name, same in self._averaged:
            average = local(self.get_buffer(name))
            own = local(same[0].detach()).clone()
            for p in same:
                local(p.detach()).copy_(average)
            average.copy_(own)

    def _follow(self) -> None:
        """Move averages to where `place_experts` has put their experts."""
        for each in self._of_experts:
            after, placement = each.experts.order, each.experts.placement
            each.group = each.group if placement is None else placement.group
            if after != each.order and each.group is not None:
                exchange([local(self.get_buffer(name)) for name in each.names], each.order, after, each.group)
                each.order = after

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._follow()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._reorder(destination, prefix, Placement.to_global)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._follow()
        self._reorder(state_dict, prefix, Placement.to_slots)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _reorder(self, state: dict[str, Any], prefix: str, reorder: Any) -> None:
        """State dicts have experts in the order of global ids, wherever they are."""
        for each in self._of_experts:
            if each.experts.placement is not None:
                names = [prefix + name for name in each.names if prefix + name in state]
                state.update(reorder(each.experts.placement, {name: state[name] for name in names}, STATE_DICT))


@dataclass
class _OfExperts:
    """Averages of one layer's experts.

    Attributes:
        experts: the experts.
        names: names of the averages.
        order: global id of the expert in each slot of the averages.
        group: ranks that share the experts, once they were placed.
    """

    experts: Experts
    names: list[str]
    order: tuple[int, ...]
    group: ProcessGroup | None = None


def _buffer(name: str) -> str:
    """Name of a parameter's average. It has no dots, as a buffer's must."""
    return "ema " + name.replace(".", "/")
