"""Host copies of tensors, so that training may change the originals while the copies are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch.torch_internals import is_traceable_wrapper_subclass


class HostCopies:
    """Makes copies of tensors in host memory, pinned for tensors on a GPU.

    The first call allocates the memory, and later calls reuse it. So a copy is valid until the next call.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    @torch.no_grad()
    def of(self, values: dict[str, Any]) -> dict[str, Any]:
        """Copy each tensor, and return all values by the same names. A DTensor's copy is a DTensor like it."""
        before, self._memory = self._memory, {}
        copies = {name: self._copy(name, value, before) for name, value in values.items()}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory are asynchronous
        return copies

    def _copy(self, name: str, value: Any, before: dict[str, Tensor]) -> Any:
        if not isinstance(value, Tensor):
            return value
        tensor = value.detach()
        if is_traceable_wrapper_subclass(tensor):  # a DTensor: copy its local tensor
            inner, context = tensor.__tensor_flatten__()
            parts = {each: self._copy(f"{name} {each}", getattr(tensor, each), before) for each in inner}
            return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
        memory = before.get(name)
        if memory is None or (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
            memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._memory[name] = memory
        return memory.copy_(tensor, non_blocking=tensor.is_cuda)
