"""Count what a step of a layer would launch on a GPU, on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}


class Launches(TorchDispatchMode):
    """Counts kernels by name: one for each operator that computes, and those that our own operators launch.

    Attributes:
        count: number of launches by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "turnout":  # run what it does: on meta, torch would only ask for the shapes
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        with self:
            if (parts := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                return parts
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        on_host = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        if not (func.is_view or name in ALLOCATES or on_host):
            self.count[name] += 1
        return result

    def launched(self, kernel: str, *_: Any) -> None:
        """In the place of a backend of `cuda/launch.py`."""
        self.count[kernel.partition("<")[0]] += 1

    def triton(self, name: str) -> Any:
        """In the place of a Triton kernel."""

        class Kernel:
            def __getitem__(_, grid: Any) -> Any:
                return lambda *args, **named: self.launched(name)

        return Kernel()
