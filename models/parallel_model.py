"""One model under data, tensor, pipeline and expert parallelism together, and its training step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..dispatch import mesh as axes
from ..dispatch.mesh import Meshes
from ..moe.auxiliary import aux_loss
from ..moe.parallel.gradients import clip_grad_norm_, sync_gradients
from ..moe.parallel.parallelize import moe_layers, parallelize
from .bert import BERT, BERTConfig
from .context_parallel import How, SequenceSplit, context_parallel
from .data_parallel import Data, begin_micro_batch, data_parallel, reshard
from .gpt import GPT, GPTConfig
from .offload import activations_on_cpu
from .pipeline.boundary import Boundary
from .pipeline.engine import Losses, Pipeline
from .pipeline.inputs import Inputs, check_batch, check_targets, checked, pieces, share
from .pipeline.partition import Stages, check_config, model_of
from .recompute import recompute as recomputing
from .t5 import T5, T5Config
from .tensor_parallel import tensor_parallel


def parallel_model(
    config: GPTConfig | BERTConfig | T5Config,
    meshes: Meshes | None = None,
    *,
    layout: Literal["auto"] | None = None,
    batch: int | None = None,
    micro_batches: int = 1,
    accumulate: int = 1,
    schedule: str = "1f1b",
    stages_per_rank: int | None = None,
    data: Data = "replicate",
    bf16: bool = False,
    cpu_offload: bool = False,
    recompute: Literal["none", "full", "selective"] = "none",
    activations_on_cpu: bool = False,
    cp_attention: How | None = None,
    compile: bool = False,
    dtype: torch.dtype = torch.float32,
    **experts: Any,
) -> ParallelModel:
    """Build a GPT, BERT or T5 and spread it over the ranks of a job.

    Call it on every rank, after the same `torch.manual_seed`. The model then has the same initial values on any mesh::

        meshes = Meshes.of("cuda", pp=2, tp=2, ep=4)
        model = parallel_model(GPTConfig(), meshes, micro_batches=8, data="zero1", bf16=True)
        optimizer = torch.optim.AdamW(param_groups(model))
        losses = model.step(tokens, targets)
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    Args:
        config: sizes of the whole model.
        meshes: ranks of each kind of parallelism, from `Meshes.of`; None, the default, with `layout`.
        layout: ``"auto"`` lets the planner choose the meshes, micro-batches, schedule, data parallelism and
            recomputation, in place of what is given (`turnout.models.planner.automatic.planned`). None, the default,
            takes what is given.
        batch: number of sequences in a step, on all ranks together, which `layout` needs; None by default.
        micro_batches: number of micro-batches that each rank cuts its part of the batch into; 1 by default.
        accumulate: number of equal parts of the batch that go through the model one after the other, each cut into
            `micro_batches`; 1 by default. Their gradients are summed, as of one batch.
        schedule: pipeline schedule, ``"1f1b"`` by default (`Stages.of`). It has no effect with pp = 1.
        stages_per_rank: number of pipeline stages on each rank. None, the default, is the fewest for the schedule.
        data: kind of data parallelism, ``"replicate"`` by default (`data_parallel`).
        bf16: whether to compute in bfloat16 from parameters of `dtype`; False by default.
        cpu_offload: whether parameters, gradients and optimizer state stay in host memory; False by default.
        recompute: activations to compute again in the backward, ``"none"`` by default (`recompute`).
        activations_on_cpu: whether activations wait for their backward in host memory; False by default.
        cp_attention: how attention works where "cp" splits sequences, ``"ulysses"`` or ``"ring"``
            (`SequenceSplit.of`). None, the default, takes Ulysses where heads allow it.
        compile: whether torch.compile compiles each block; False by default.
        dtype: dtype of the parameters, float32 by default.
        experts: further arguments of `parallelize`: dispatcher, profile, overlap, wire, timeout, parallelism.

    Raises:
        ValueError: sizes that the meshes do not divide, or options that do not go together.
        TypeError: a config of another model, or one of BERT or T5 with `layout`.
    """
    check_config(config, "parallel_model")
    if layout is not None:
        if not isinstance(config, GPTConfig):
            raise TypeError(
                f"layout={layout!r} is for a GPT; got {type(config).__name__}: give meshes, Meshes.of(...), instead"
            )
        from .planner.automatic import planned  # models are imported without the planner

        if layout != "auto" or meshes is not None or batch is None:
            raise ValueError(f'layout="auto" takes batch=, and no meshes; got layout={layout!r}, batch={batch}')
        meshes, chosen, _ = planned(config, batch, dtype="bf16" if bf16 else "fp32")
        micro_batches, schedule, stages_per_rank = (chosen[k] for k in ("micro_batches", "schedule", "stages_per_rank"))
        data, recompute = chosen["data"], chosen["recompute"]
    if meshes is None:
        raise ValueError('parallel_model needs meshes, Meshes.of(...), or layout="auto" with batch=')
    pp, tp = meshes.dense[axes.PP], meshes.dense[axes.TP]
    split = SequenceSplit.of(config, meshes, cp_attention)
    stages = Stages.of(config, schedule, pp.size(), stages_per_rank) if pp.size() > 1 else None
    parts: list[Any] = [*stages.build(pp.get_local_rank())] if stages else [model_of(config)]
    for part in parts:
        recomputing(part.to(meshes.dense.device_type, dtype), recompute)
        tensor_parallel(part, tp)
        context_parallel(part, split)
        if moe_layers(part):  # a stage may have none, and a dense model has none
            parallelize(part, meshes, **experts)
        stacks = [part.encoder, part.decoder] if isinstance(part, T5) else [part.blocks]
        for block in chain(*stacks) if compile else ():
            if block is not None:
                block.compile()  # before FSDP2 wraps it
    pipeline = None
    if stages:  # before parameters are offloaded: the pipeline takes its device from them
        boundary = Boundary(config.dim, tp.get_group() if tp.size() > 1 else None, parts=meshes.dense[axes.CP].size())
        hidden = torch.bfloat16 if bf16 and data != "replicate" else None
        pipeline = Pipeline(parts, stages, pp.get_group(), micro_batches, split.loss, boundary, hidden)
    for part in parts:
        data_parallel(part, meshes, data, bf16, cpu_offload)
    return ParallelModel(parts, split, micro_batches, data, pipeline, activations_on_cpu, accumulate)


class ParallelModel(nn.Module):
    """This rank's part of a model, and the training step that all ranks take together; made by `parallel_model`.

    Attributes:
        parts: list of one whole `GPT`, `BERT` or `T5`, or of the pipeline stages of one that this rank runs. Pass it to
            `checkpoint.save`.
        meshes: meshes of the job.
        split: how sequences are split over "cp".
        micro_batches: number of micro-batches in a part of the batch.
        accumulate: number of parts of the batch that a step runs one after the other.
        pipeline: `Pipeline` that runs the parts, or None with pp = 1.
    """

    def __init__(
        self,
        parts: Sequence[GPT | BERT | T5],
        split: SequenceSplit,
        micro_batches: int,
        data: Data,
        pipeline: Pipeline | None,
        activations_on_cpu: bool,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        for name, number in {"micro_batches": micro_batches, "accumulate": accumulate}.items():
            if number < 1:
                raise ValueError(f"{name} must be positive; got {number}")
        self.parts: list[Any] = list(parts)
        self._held = nn.ModuleList(parts)
        self.split, self.meshes = split, split.meshes
        self.micro_batches, self.accumulate, self.pipeline = micro_batches, accumulate, pipeline
        self.data: Data = data
        self.activations_on_cpu = activations_on_cpu

    def step(self, tokens: Inputs, targets: Tensor, scale: float = 1.0) -> Losses:
        """Run forward and backward of a batch, and synchronise gradients. All ranks call it.

        Gradients must be None or zero before. The step computes the gradients of the mean loss over micro-batches and
        data ranks. `clip_grad_norm_` and the optimizer come next.

        Args:
            tokens: this data rank's part of the batch, int64 [B, S], with B a multiple of `micro_batches` times
                `accumulate`. Ranks along "pp", "cp" and "tp" give the same. For a BERT or T5 it may be a tuple of
                the model's inputs: a T5 takes what encoder and decoder read, [B, M] and [B, S], and masks if there is
                padding. None in the tuple leaves an input out.
            targets: token after each one, or that a BERT has to find, int64 [B, S]. -100 leaves a position out.
            scale: factor of the gradients, for float16: ``scaler.get_scale()`` of a `GradScaler`. 1 by default.

        Returns:
            Mean losses over this data rank's micro-batches, not scaled, equal on all ranks along "pp", "cp" and "tp".

        Raises:
            ValueError: a batch that does not split into micro-batches, sequences that do not split over "cp", or inputs
                and targets of a wrong number, shape or dtype.
        """
        check_batch(targets, self.micro_batches * self.accumulate)
        columns = self._columns(tokens, targets)
        with activations_on_cpu(self) if self.activations_on_cpu else nullcontext():
            losses = self._one_by_one(columns, scale) if self.pipeline is None else self._piped(columns, scale)
        sync_gradients(self, self.meshes)
        return losses

    @torch.no_grad()
    def evaluate(self, tokens: Inputs, targets: Tensor) -> Tensor:
        """Mean loss over the targets of a batch, without gradients. Call ``eval()`` before.

        Args:
            tokens: this data rank's part of the batch, as for `step`, with any positive B.
            targets: as for `step`.

        Returns:
            Mean loss in nats, a scalar in float64, equal on all ranks along "pp", "cp" and "tp".
        """
        columns = self._columns(tokens, targets)
        if self.pipeline is not None:
            mean = self.pipeline.evaluate(columns[:-1], targets)
        else:
            mean = torch.zeros((), dtype=torch.float64, device=targets.device)
            for *x, y in pieces(columns, self.micro_batches):  # all ranks run the model, for the others' tokens
                loss = self.split.loss(self.parts[0](*x), y)
                if weight := share(y, targets):
                    mean += loss * weight
        reshard(self)
        return mean

    @torch.no_grad()
    def logits(self, tokens: Inputs) -> Tensor | None:
        """Logits of a batch, without gradients, on ranks that have the last pipeline stage. Call ``eval()`` before.

        Args:
            tokens: this data rank's part of the batch, as for `evaluate`.

        Returns:
            Logits [B, S, vocab], or None on ranks without the last stage. With "tp" they are a DTensor. With "cp" they
            are of this rank's part of the sequences.
        """
        inputs = checked(self.parts[0], tokens)
        found = [self.parts[0](*inputs)] if self.pipeline is None else self.pipeline.logits(inputs)
        reshard(self)
        return torch.cat(found) if found else None

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that the norm over the whole model is at most `max_norm`; returns the norm before."""
        if self.pipeline is not None:
            return self.pipeline.clip_grad_norm_(max_norm)
        return clip_grad_norm_(self, max_norm)

    def _one_by_one(self, columns: Sequence[Tensor | None], scale: float) -> Losses:
        """Run the micro-batches of inputs and targets one after the other, on the whole model."""
        m, (model,) = self.micro_batches * self.accumulate, self.parts
        seen = []
        for number, (*x, y) in enumerate(pieces(columns, m), 1):
            begin_micro_batch(model, self.data, last=number == m)
            logits = model(*x, targets=y) if isinstance(model, GPT) else model(*x)
            task = self.split.loss(logits, y)
            aux = aux_loss(model)
            ((task + aux) * (scale / m)).backward()
            seen.append(torch.stack([task.detach().double(), aux.detach().double()]))
        return Losses(*torch.stack(seen).mean(0).unbind())

    def _piped(self, columns: Sequence[Tensor | None], scale: float) -> Losses:
        """Run the parts of the batch through the pipeline, one after the other."""
        assert self.pipeline is not None
        n = self.accumulate
        losses = [self.pipeline.step(tuple(x), y, scale / n) for *x, y in pieces(columns, n)]
        return Losses(*(torch.stack(each).mean(0) for each in zip(*losses, strict=True)))

    def _columns(self, tokens: Inputs, targets: Tensor) -> tuple[Tensor | None, ...]:
        """Inputs and targets, which have a row for each sequence, after checks that need no other rank."""
        inputs = checked(self.parts[0], tokens, len(targets))
        check_targets(self.parts[0], inputs, targets)
        self.split.own(targets)  # raises if they do not split over "cp"
        return *inputs, targets
