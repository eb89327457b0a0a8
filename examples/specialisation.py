"""Specialisation of experts: the bytes that each expert gets most of."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from turnout.models import ParallelModel
from turnout.moe import Routing
from turnout.moe.layer import moe_layers

SHOWN = 8  # most bytes listed for an expert


class BytesOfExperts:
    """Context that counts the bytes that each expert of each MoE layer gets, in training or eval mode.

    It works on any mesh: each rank counts its tokens in its layers. Afterwards the model is as before.
    """

    def __init__(self, model: ParallelModel) -> None:
        config = model.parts[0].config
        names = config.moe_layers()
        shape = (len(names), config.num_experts, config.vocab)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=model.meshes.dense.device_type)
        found = [named for part in model.parts for named in moe_layers(part).items()]
        self.layers = {names.index(name): layer for name, layer in found}

    def __enter__(self) -> Self:
        self._hooks = []
        for index, layer in self.layers.items():
            seen = Seen(self.counts[index])
            self._hooks += [
                layer.register_forward_pre_hook(seen.ids_of, with_kwargs=True),
                layer.gate.register_forward_hook(seen.count),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def most(self) -> list[list[list[list[int]]]]:
        """Lists of [byte, tokens] for each layer and expert: bytes that it gets more of than an even share.

        Counts are sums over all ranks. All ranks call it.
        """
        dist.all_reduce(self.counts)  # ranks of other stages add zeros for a layer
        above = self.counts - self.counts.sum(1, keepdim=True).double() / self.counts.shape[1]
        best = above.topk(SHOWN, dim=-1)
        tokens = self.counts.gather(-1, best.indices)
        table = torch.stack([best.indices, tokens, best.values > 0], -1).tolist()
        return [[[[b, n] for b, n, more in expert if more] for expert in layer] for layer in table]


class Seen:
    """Hooks of one layer: they take its token ids and then its routing, and add to `counts`, int64 [E, bytes]."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        self.ids: Tensor | None = None

    def ids_of(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.ids = kwargs["ids"].flatten()

    def count(self, gate: nn.Module, args: Any, routing: Routing) -> None:
        assert self.ids is not None
        cells = (routing.expert * self.counts.shape[1] + self.ids.unsqueeze(1))[routing.expert >= 0]
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)
