"""A `GPT` on meshes of any shape: the parts of this package put together, and one step of its training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..dispatch import mesh as axes
from ..dispatch.mesh import Meshes
from ..moe.auxiliary import aux_loss
from ..moe.parallel.gradients import clip_grad_norm_, sync_gradients
from ..moe.parallel.parallelize import moe_layers, parallelize
from .data_parallel import Data, begin_micro_batch, data_parallel, reshard
from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .offload import activations_on_cpu
from .pipeline.boundary import Boundary
from .pipeline.engine import Losses, Pipeline, check_batch
from .pipeline.partition import Stages
from .recompute import recompute as recomputing
from .tensor_parallel import tensor_parallel


def parallel_model(
    config: GPTConfig,
    meshes: Meshes,
    *,
    micro_batches: int = 1,
    schedule: str = "1f1b",
    stages_per_rank: int | None = None,
    data: Data = "replicate",
    bf16: bool = False,
    cpu_offload: bool = False,
    recompute: Literal["none", "full", "selective"] = "none",
    activations_on_cpu: bool = False,
    dtype: torch.dtype = torch.float32,
    **experts: Any,
) -> ParallelModel:
    """Build a GPT and spread it over the ranks of a job; call it on every rank, under one `torch.manual_seed`.

    Each rank draws the same random numbers, so that the model is that of one rank, whatever the meshes.

        meshes = Meshes.of("cuda", pp=2, tp=2, ep=4)
        model = parallel_model(GPTConfig(), meshes, micro_batches=8, data="zero1", bf16=True)
        optimizer = torch.optim.AdamW(param_groups(model))
        losses = model.step(tokens, targets)
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    Args:
        config: the whole model's.
        meshes: `Meshes.of`.
        micro_batches: in which a rank's part of the batch is cut, m.
        schedule, stages_per_rank: of the pipeline, as for `Stages.of`; without effect where pp = 1.
        data, bf16, cpu_offload: as for `data_parallel`.
        recompute: as for `recompute`.
        activations_on_cpu: what the backward needs, weights apart, waits in the host's memory.
        dtype: of the parameters.
        experts: further arguments of `parallelize`: dispatcher, profile, overlap, wire, timeout, parallelism.
    """
    pp, tp = meshes.dense[axes.PP], meshes.dense[axes.TP]
    stages = Stages.of(config, schedule, pp.size(), stages_per_rank) if pp.size() > 1 else None
    parts = stages.build(pp.get_local_rank()) if stages else [GPT(config)]
    for part in parts:
        recomputing(part.to(meshes.dense.device_type, dtype), recompute)
        tensor_parallel(part, tp)
        if moe_layers(part):  # a stage may have none, and a dense model has none
            parallelize(part, meshes, **experts)
    pipeline = None
    if stages:  # before parameters are offloaded: it takes their device for its own
        boundary = Boundary(config.dim, tp.get_group() if tp.size() > 1 else None)
        hidden = torch.bfloat16 if bf16 and data != "replicate" else None
        pipeline = Pipeline(parts, stages, pp.get_group(), micro_batches, boundary=boundary, dtype=hidden)
    for part in parts:
        data_parallel(part, meshes, data, bf16, cpu_offload)
    return ParallelModel(parts, meshes, micro_batches, data, pipeline, activations_on_cpu)


class ParallelModel(nn.Module):
    """What a rank has of a model, and the steps it takes together with the others; made by `parallel_model`.

    Attributes:
        parts: the whole `GPT`, or the stages that this rank runs; what `checkpoint.save` takes.
    """

    def __init__(
        self,
        parts: list[GPT],
        meshes: Meshes,
        micro_batches: int,
        data: Data,
        pipeline: Pipeline | None,
        activations_on_cpu: bool,
    ) -> None:
        super().__init__()
        if micro_batches < 1:
            raise ValueError(f"micro_batches must be positive; got {micro_batches}")
        self.parts, self._held = parts, nn.ModuleList(parts)
        self.meshes, self.micro_batches, self.pipeline = meshes, micro_batches, pipeline
        self.data: Data = data
        self.activations_on_cpu = activations_on_cpu

    def step(self, tokens: Tensor, targets: Tensor, scale: float = 1.0) -> Losses:
        """Forward and backward of a batch: leaves the gradients of the mean over micro-batches and data ranks.

        Gradients must be None or zero before. `clip_grad_norm_` and the optimizer come next.

        Args:
            tokens, targets: int64 [B, S], this data rank's part of the batch, B a multiple of the micro-batches; the
                same for all ranks along "pp" and "tp". Targets are the tokens that come next.
            scale: of the gradients, for float16: ``scaler.get_scale()`` of a `GradScaler`.

        Returns:
            Means over this data rank's micro-batches, unscaled, equal on all ranks along "pp" and "tp".
        """
        with activations_on_cpu(self) if self.activations_on_cpu else nullcontext():
            losses = (self._one_by_one if self.pipeline is None else self.pipeline.step)(tokens, targets, scale)
        sync_gradients(self, self.meshes)
        return losses

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of this data rank's part of a batch [B, S], B any number; call ``eval()`` before.

        It is equal on all ranks along "pp" and "tp".
        """
        if self.pipeline is not None:
            mean = self.pipeline.evaluate(tokens, targets)
        else:
            pairs = zip(tokens.tensor_split(self.micro_batches), targets.tensor_split(self.micro_batches), strict=True)
            losses = [next_token_loss(self.parts[0](x), y) * len(x) for x, y in pairs if len(x)]
            mean = torch.stack(losses).sum(dtype=torch.float64) / len(tokens)
        reshard(self)
        return mean

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that the norm of the whole model's is at most `max_norm`; returns the norm before."""
        if self.pipeline is not None:
            return self.pipeline.clip_grad_norm_(max_norm)
        return clip_grad_norm_(self, max_norm)

    def _one_by_one(self, tokens: Tensor, targets: Tensor, scale: float) -> Losses:
        """The micro-batches in turn, on the whole model."""
        check_batch(tokens, self.micro_batches)
        m, (model,) = self.micro_batches, self.parts
        seen = []
        for number, (x, y) in enumerate(zip(tokens.chunk(m), targets.chunk(m), strict=True), 1):
            begin_micro_batch(model, self.data, last=number == m)
            task = next_token_loss(model(x), y)
            aux = aux_loss(model)
            ((task + aux) * (scale / m)).backward()
            seen.append(torch.stack([task.detach().double(), aux.detach().double()]))
        return Losses(*torch.stack(seen).mean(0).unbind())
