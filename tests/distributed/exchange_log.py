"""The order of events on a rank: when exchanges of rows start, and when they are waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Self

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class ExchangeLog(ABC):
    """Context that writes "start NAME" and "wait NAME" of each exchange of rows [n, D] into `events`."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._exchange = dist.all_to_all_single

    @abstractmethod
    def name(self, x: Tensor, group: ProcessGroup | None) -> str | None:
        """What an exchange of x over a group is called; None leaves it out."""

    def __enter__(self) -> Self:
        dist.all_to_all_single = self._begin
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self._exchange

    def _begin(self, out: Tensor, x: Tensor, recv=None, send=None, group=None, **options):
        work = self._exchange(out, x, recv, send, group=group, **options)
        rows = x.ndim > 1 and x.is_floating_point()  # not sizes, expert ids or weights
        if not rows or (name := self.name(x, group)) is None:
            return work
        self.events.append(f"start {name}")
        return SimpleNamespace(wait=lambda: (self.events.append(f"wait {name}"), work.wait()))
