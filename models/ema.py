"""Exponential moving average (EMA) of a model's parameters, on any mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..moe.experts.base import Experts
from ..moe.experts.placed import PlacedCopies
from ..moe.experts.sharded import local

AVERAGE, UPDATES = "ema ", "updates"  # buffers: an average, before the name of its parameter, and the number of updates


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

    Averages of experts follow `place_experts` at the next call of a method, which all ranks then make. State dicts have
    them in the order of global ids.

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
        self.register_buffer(UPDATES, torch.zeros((), dtype=torch.int64))
        modules = {module for part in parts for module in part.modules() if isinstance(module, Experts)}
        owners = {id(p): experts for experts in modules for p in experts.parameters()}
        stacked: dict[Experts, list[str]] = {}
        for name, (first, *_) in self._averaged:
            if (experts := owners.get(id(first))) is not None:
                stacked.setdefault(experts, []).append(name)
        self._placed = [(PlacedCopies(experts), names) for experts, names in stacked.items()]
        self.register_state_dict_pre_hook(lambda *_: self._follow())
        self.register_state_dict_post_hook(_in_global_order)
        self.register_load_state_dict_pre_hook(_into_slots)

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters into the average, after a step of the optimizer.

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
        """Move the averages of experts to where `place_experts` has moved the experts."""
        for placed, names in self._placed:
            placed.follow([self.get_buffer(name) for name in names])


def _in_global_order(ema: EMA, state: dict[str, Any], prefix: str, _: Any) -> None:
    for placed, names in ema._placed:
        held = {prefix + name: state[prefix + name] for name in names if prefix + name in state}
        state.update(placed.to_global(held))


def _into_slots(ema: EMA, state: dict[str, Any], prefix: str, *_: Any) -> None:
    ema._follow()
    for placed, names in ema._placed:
        held = {prefix + name: state[prefix + name] for name in names if prefix + name in state}
        state.update(placed.to_slots(held))


def _buffer(name: str) -> str:
    """Name of a parameter's average. It has no dots, as a buffer's must."""
    return AVERAGE + name.replace(".", "/")
