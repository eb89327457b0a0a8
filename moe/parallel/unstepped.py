"""A warning for layers that are left to an `Adaptive` which never steps."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ...dispatch.torch_internals import in_backward
from ..layer import MoE
from ..names import described

FORWARDS = 1000  # training forwards of a layer, after which `Adaptive` should have chosen something


class WarnUnstepped:
    """Forward hook of a layer that `parallelize` has left to `Adaptive`: warns once if it has never stepped."""

    def __init__(self) -> None:
        self.forwards = 0

    def __call__(self, layer: MoE, args: Any, y: Any) -> None:
        """Count a training forward."""
        if torch.compiler.is_compiling() or not layer.training or in_backward():
            return
        waits = layer.weights is not None and layer.weights.free and not layer.weights.stepped
        self.forwards = self.forwards + 1 if waits else 0
        if self.forwards == FORWARDS:
            warnings.warn(
                f'parallelize(parallelism="auto") has left choices to Adaptive, but after {FORWARDS} training forwards '
                f"it has chosen nothing for {described(layer)}: make adaptive = Adaptive(model, mesh) once, and call "
                "adaptive.step() after each optimizer step, or leave out parallelism",
                stacklevel=2,
            )
