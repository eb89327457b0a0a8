"""Time that a layer takes in a step, forward and backward, without a wait for the device."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...dispatch.torch_internals import in_backward, transformed

Stamp = float | torch.cuda.Event


class LayerTimer:
    """Times the forwards of a layer in training mode, and the backward from its output's gradient to its input's.

    On a GPU it records events, which are read at the end of many steps. Forwards in a compiled graph are not timed, and
    the backward only if the layer's input requires a gradient. Recomputed activations count as a part of the backward.
    """

    def __init__(self) -> None:
        self.spans: deque[tuple[Stamp, Stamp]] = deque(maxlen=1000)  # of this step
        self.steps: deque[list[tuple[Stamp, Stamp]]] = deque(maxlen=1000)
        self._began: Stamp = 0.0

    def attach(self, layer: nn.Module) -> list[RemovableHandle]:
        """Time a layer from now on."""
        return [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after, with_kwargs=True),
        ]

    def end_step(self) -> None:
        """The spans since the last call are those of one step."""
        self.steps.append([*self.spans])
        self.spans.clear()

    def take(self) -> float:
        """Seconds of a step, of the steps since the last call; 0 if nothing was timed. It waits for the device.

        It is the lower quartile, because other work on the machine can only add time.
        """
        if any(isinstance(stamp, torch.cuda.Event) for spans in self.steps for span in spans for stamp in span):
            torch.cuda.synchronize()
        seconds = sorted(sum(_between(*span) for span in spans) for spans in self.steps if spans)
        self.steps.clear()
        return seconds[(len(seconds) - 1) // 4] if seconds else 0.0

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _counts(layer):
            return None
        x = _input(args, kwargs)
        self._began = _now(x)
        # Autograd runs nodes made last first, except that a leaf gets its gradient at once. A view made here gets it
        # after all backward work of the layer, also after gradients of gathered weights have travelled.
        x = x.view_as(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "x": x})

    def _after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        if not _counts(layer) or not y.requires_grad:
            return
        x, began = _input(args, kwargs), []
        self.spans.append((self._began, _now(y)))
        if x.requires_grad:
            y.register_hook(lambda grad: began.append(_now(grad)))

            def end(grad: Tensor) -> None:
                if began:
                    self.spans.append((began[0], _now(grad)))

            x.register_hook(end)

    def __reduce__(self) -> tuple[type[LayerTimer], tuple[()]]:
        return LayerTimer, ()  # a copied layer starts without times


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["x"]


def _counts(layer: nn.Module) -> bool:
    return layer.training and not torch.compiler.is_compiling() and not in_backward() and not transformed()


def _now(tensor: Tensor) -> Stamp:
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Stamp, last: Stamp) -> float:
    if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
        return first.elapsed_time(last) / 1e3
    assert isinstance(first, float)
    assert isinstance(last, float)
    return last - first
