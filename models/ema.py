"""Exponential moving average (EMA) of a model's parameters, on any mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

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

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters into the average, after a step of the optimizer. Nothing is sent between ranks."""
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
        for name, same in self._averaged:
            average = local(self.get_buffer(name))
            own = local(same[0].detach()).clone()
            for p in same:
                local(p.detach()).copy_(average)
            average.copy_(own)


def _buffer(name: str) -> str:
    """Name of a parameter's average. It has no dots, as a buffer's must."""
    return "ema " + name.replace(".", "/")
