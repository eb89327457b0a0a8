"""Pipeline engine: runs a batch through the stages of a model in micro-batches, by a schedule of torch's.

torch.distributed.pipelining runs the schedules. This file adds the balance losses of stages that never see the task's
loss, the parameters that stages share, and losses that all ranks get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ...moe.parallel.gradients import clip_grad_norm_
from ...moe.parallel.parallelize import moe_layers
from ..blocks import Hidden
from ..gpt import GPTConfig
from ..loss import next_token_loss
from ..t5 import T5Config
from .boundary import Boundary
from .checks import check_sizes
from .inputs import Inputs, check_batch, check_targets, checked, pieces, share
from .partition import Model, Stages
from .shared_parameters import SharedParameters
from .stage import Stage, keep_gathered, nothing_left

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved1f1b": ScheduleInterleaved1F1B,
    "interleaved_zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
Loss = Callable[[Tensor, Tensor], Tensor]


class Losses(NamedTuple):
    """Losses of one step: means over its micro-batches, scalars in float64, equal on all ranks of the pipeline."""

    task: Tensor  # loss of the task
    aux: Tensor  # sum of the weighted balance losses of all stages


class Pipeline:
    """Trains a GPT, BERT or T5 in stages over the ranks of a pipeline; each rank makes one with its own stages.

    A step computes the gradients of the mean of ``loss_fn + aux_loss`` over micro-batches, as one rank would get them.
    The whole batch at once would give the same gradients, except for balance losses over "local" and "global". These
    are taken over one micro-batch, and are not linear in it::

        cut = Stages.of(config, "1f1b", ranks=dist.get_world_size(group))
        parts = cut.build(dist.get_rank(group))      # now `parallelize`, FSDP and the optimizer, as for any model
        pipeline = Pipeline(parts, cut, group, micro_batches=8)
        losses = pipeline.step(tokens, targets)

    Args:
        parts: this rank's stages, from `Stages.build`. FSDP and others must wrap them in place.
        stages: partition of the model.
        group: ranks of the pipeline, in the order of the stages.
        micro_batches: number m of micro-batches that a batch is cut into. All schedules but gpipe need at least as
            many as ranks P, and interleaved ones a multiple of m // P. More of them leave less idle time
            (docs/explanations/pipeline.md).
        loss_fn: function (logits of the last stage, targets) -> mean over the micro-batch, a scalar. None, the default,
            is `next_token_loss`.
        boundary: how hidden states travel if several ranks split a stage. None, the default, is for one rank a stage.
        dtype: dtype of hidden states between stages. None, the default, is the dtype of the parameters.

    Raises:
        ValueError: stages, a group or a number of micro-batches that do not fit each other.
    """

    def __init__(
        self,
        parts: Sequence[Model],
        stages: Stages,
        group: ProcessGroup,
        micro_batches: int,
        loss_fn: Loss | None = None,
        boundary: Boundary | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(stages, group, micro_batches)
        self.parts = nn.ModuleList(parts)
        self.stages, self.group, self.micro_batches = stages, group, micro_batches
        self.indices = stages.of_rank(dist.get_rank(group))
        if len(parts) != len(self.indices):
            raise ValueError(
                f"this rank runs stages {self.indices}, but was given {len(parts)} parts; use stages.build"
            )
        self.loss_fn = next_token_loss if loss_fn is None else loss_fn
        self.boundary = Boundary(stages.config.dim) if boundary is None else boundary
        parameter = next(self.parts.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype if dtype is None else dtype
        self._schedule: tuple[Any, Any, list[Stage]] | None = None
        self._losses: list[Tensor] = []  # task loss of each micro-batch of the current step, detached
        self._weight = 1.0  # weight of a micro-batch in their mean

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        memo |= {id(group): group for group in (self.group, self.boundary.group)}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__ = deepcopy({**self.__dict__, "_schedule": None, "_losses": []}, memo)
        return copied

    def step(self, tokens: Inputs, targets: Tensor, scale: float = 1.0) -> Losses:
        """Run forward and backward of a batch, and add the gradients to those that are there. All ranks call it.

        `stats` of MoE layers then belong to the last micro-batch.

        Args:
            tokens: token ids, int64 [B, S], the same on all ranks, with B a multiple of `micro_batches`; or a tuple of
                the model's inputs, which all have B rows. None in it leaves an input out.
            targets: token after each one, or that a BERT has to find, int64 [B, S].
            scale: factor of the gradients, for float16: ``scaler.get_scale()`` of a `GradScaler`. 1 by default.

        Returns:
            Mean losses over the micro-batches, not scaled.

        Raises:
            ValueError: a batch that does not split into `micro_batches`, or inputs or targets that do not fit.
        """
        check_batch(targets, self.micro_batches)
        self._check_backward()
        inputs = self._inputs(tokens, targets)
        schedule, stages = self._prepare(len(targets) // self.micro_batches, _lengths(inputs))
        self._losses, self._weight = [], scale / self.micro_batches
        for stage in stages:
            stage.aux, stage.weight = [], self._weight
        shared = self._shared()
        earlier = [(p, p.grad) for p in shared.parameters()]
        for p, _ in earlier:
            p.grad = None  # copies of a parameter exchange the gradient of this step alone
        config = self.stages.config
        if isinstance(config, GPTConfig) and (config.mtp or config.z_loss):
            inputs = (*inputs, targets)
        named = {f"input_{number}": x for number, x in enumerate(inputs)}  # torch sends keyword arguments to all stages
        schedule.step(inputs[0], **named, target=targets, return_outputs=False)
        shared.sum_gradients()
        for p, grad in earlier:
            if grad is not None and p.grad is not None:
                p.grad += grad
        task, aux = self._everywhere(self._losses, [aux for stage in stages for aux in stage.aux])
        return Losses(task / self.micro_batches, aux / self.micro_batches)

    @torch.no_grad()
    def evaluate(self, tokens: Inputs, targets: Tensor) -> Tensor:
        """Mean loss over a batch's targets, without gradients. All ranks call it. Set the parts to eval mode before.

        Args:
            tokens: token ids, int64 [B, S], or a tuple of the model's inputs, as for `step`, with any positive B.
            targets: as for `step`.

        Returns:
            Mean loss, a scalar in float64, equal on all ranks of the pipeline.
        """
        logits = self._logits(self._inputs(tokens, targets))
        parts = pieces((targets,), self.micro_batches)
        shares = [(x, y, share(y, targets)) for x, (y,) in zip(logits, parts, strict=False)]
        return self._everywhere([self.loss_fn(x, y) * weight for x, y, weight in shares if weight])[0]

    @torch.no_grad()
    def logits(self, tokens: Inputs) -> list[Tensor]:
        """Logits of each micro-batch of a batch, on the rank of the last stage. Other ranks return an empty list.

        All ranks call it, with the same inputs as `evaluate`.
        """
        return self._logits(self._inputs(tokens))

    def _logits(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        cut = pieces(inputs, self.micro_batches)
        sends: list[dist.Work] = []
        handed: list[Any] = []  # outputs of the stage before, if it is on this rank
        for index, part in zip(self.indices, self.parts, strict=True):
            last, outputs = index + 1 == len(self.stages.blocks), []
            for number, piece in enumerate(cut):
                hidden: Hidden = ()
                if index > 0:
                    received = handed[number] if index - 1 in self.indices else self._receive(index - 1, piece)
                    hidden = tuple(map(self.boundary.arrive, received))
                y = part(*piece, hidden=hidden)
                outputs.append(y if last else tuple(map(self.boundary.leave, y)))
                if not last and index + 1 not in self.indices:
                    peer = self.stages.rank_of(index + 1)
                    sends += [cast(dist.Work, dist.isend(x, group=self.group, group_dst=peer)) for x in outputs[-1]]
            handed = outputs
        for work in sends:
            work.wait()
        return handed if len(self.stages.blocks) - 1 in self.indices else []

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the whole model to a norm of `max_norm`, and return the norm before.

        As `turnout.moe.clip_grad_norm_`, but a parameter that several stages have counts once.
        """
        return clip_grad_norm_(self.parts, max_norm, self.group, self._shared().copies())

    def _shared(self) -> SharedParameters:
        return SharedParameters(self.stages, dict(zip(self.indices, self.parts, strict=True)), self.group)

    def _inputs(self, tokens: Inputs, targets: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The model's inputs, which are checked on all ranks before any rank waits for another."""
        inputs = checked(self.parts[0], tokens, None if targets is None else len(targets))
        if targets is not None and self.loss_fn is next_token_loss:  # others may take other targets
            check_targets(self.parts[0], inputs, targets)
        for stage in range(len(self.stages.blocks)):
            for length in self.stages.lengths(stage, _lengths(inputs)):
                self.boundary.shape(1, length)  # raises if it does not split
        return inputs

    def _receive(self, stage: int, inputs: Sequence[Any]) -> Hidden:
        """Hidden states of a micro-batch from a stage on another rank."""
        received = []
        for length in self.stages.lengths(stage, _lengths(inputs)):
            shape = self.boundary.shape(len(inputs[0]), length)
            received.append(torch.empty(shape, dtype=self.dtype, device=self.device))
            dist.recv(received[-1], group=self.group, group_src=self.stages.rank_of(stage))
        return tuple(received)

    def _prepare(self, batch: int, lengths: list[int]) -> tuple[Any, list[Stage]]:
        """Schedule and stages for micro-batches [batch, length]; new sizes need new ones, with other buffers."""
        if self._schedule is None or self._schedule[0] != (batch, lengths):
            keep_gathered(self.parts)
            config, last = self.stages.config, len(self.stages.blocks) - 1

            def meta(*shape: int, **options: Any) -> Tensor:
                return torch.empty(*shape, device="meta", **options)

            def returned(stage: int) -> Hidden:
                found = self.stages.lengths(stage, lengths)
                shapes = [self.boundary.shape(batch, length) for length in found]
                if stage == last:
                    shapes = [(batch, found[0] // self.boundary.parts, config.vocab)]
                return tuple(meta(*shape, dtype=self.dtype, requires_grad=True) for shape in shapes)

            stages = [
                Stage(
                    part,
                    index,
                    last + 1,
                    self.device,
                    # without shapes torch would run the model once to find them
                    input_args=returned(index - 1) if index else meta(batch, lengths[0], dtype=torch.int64),
                    output_args=returned(index),
                    group=self.group,
                    dw_builder=nothing_left if isinstance(config, T5Config) else None,
                )
                for index, part in zip(self.indices, self.parts, strict=True)
            ]
            for stage in stages:
                stage.boundary = self.boundary
            looped = self.stages.schedule not in ("gpipe", "1f1b")
            schedule = SCHEDULES[self.stages.schedule](
                stages if looped else stages[0],
                self.micro_batches,
                loss_fn=self._weighted,
                scale_grads=False,
            )
            self._schedule = (batch, lengths), schedule, stages
        return self._schedule[1:]

    def _weighted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of a micro-batch, times its weight in the mean over all of them."""
        loss = self.loss_fn(logits, targets)
        self._losses.append(loss.detach())
        return loss * self._weight

    def _check_backward(self) -> None:
        """Refuse experts that are gathered where the backward is in halves, on all ranks, whose stages may differ.

        torch computes gradients of weights by groups, and takes weights that meet in one node for one group (2.13).
        A gather joins all weights of the experts; their nodes then follow one another, and torch runs some twice.
        """
        if self.stages.schedule not in ("interleaved_zb", "zbv"):
            return
        gathers = [not (layer.weights is None or layer.weights.idle) for layer in moe_layers(self.parts).values()]
        (found,) = self._everywhere([torch.tensor(float(any(gathers)))])
        if found:
            raise ValueError(
                f"schedule {self.stages.schedule!r} takes the backward in halves, which does not get through experts "
                "that are gathered: leave layer.parallelism and layer.shadow as parallelize sets them, or take "
                "interleaved1f1b"
            )

    def _everywhere(self, *losses: list[Tensor]) -> list[Tensor]:
        """Sum of each list of scalars, over all ranks of the pipeline."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.stack([sum((x.detach().double() for x in part), zero) for part in losses])
        dist.all_reduce(sums, group=self.group)
        return list(sums.unbind())


def _lengths(inputs: Sequence[Tensor | None]) -> list[int]:
    return [x.shape[1] for x in inputs if x is not None]
