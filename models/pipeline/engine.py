"""Pipeline engine: runs a batch through the stages of a GPT in micro-batches, by a schedule of torch's.

torch.distributed.pipelining runs the schedules. This file adds the balance losses of stages that never see the task's
loss, the embedding that two stages share, and losses that all ranks get.
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
from torch.distributed.tensor import DTensor

from ...moe.experts.sharded import local
from ...moe.parallel.gradients import clip_grad_norm_
from ...moe.parallel.parallelize import moe_layers
from ..gpt import GPT
from ..loss import next_token_loss
from .boundary import Boundary
from .checks import check_batch, check_sizes
from .partition import Stages
from .stage import Stage, keep_gathered

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
    """Trains a GPT whose stages are spread over the ranks of a pipeline; each rank makes one with its own stages.

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
        parts: Sequence[GPT],
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
        self._schedule: tuple[tuple[int, int], Any, list[Stage]] | None = None
        self._losses: list[Tensor] = []  # task loss of each micro-batch of the current step, detached
        self._weight = 1.0  # weight of a micro-batch in their mean

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        memo |= {id(group): group for group in (self.group, self.boundary.group)}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__ = deepcopy({**self.__dict__, "_schedule": None, "_losses": []}, memo)
        return copied

    def step(self, tokens: Tensor, targets: Tensor, scale: float = 1.0) -> Losses:
        """Run forward and backward of a batch, and add the gradients to those that are there. All ranks call it.

        `stats` of MoE layers then belong to the last micro-batch.

        Args:
            tokens: token ids, int64 [B, S], the same on all ranks, with B a multiple of `micro_batches`.
            targets: token after each one, int64 [B, S].
            scale: factor of the gradients, for float16: ``scaler.get_scale()`` of a `GradScaler`. 1 by default.

        Returns:
            Mean losses over the micro-batches, not scaled.

        Raises:
            ValueError: a batch that does not split into `micro_batches`.
        """
        check_batch(tokens, self.micro_batches)
        self._check_backward()
        schedule, stages = self._prepare(len(tokens) // self.micro_batches, tokens.shape[1])
        self._losses, self._weight = [], scale / self.micro_batches
        for stage in stages:
            stage.aux, stage.weight = [], self._weight
        earlier = [(p, p.grad) for p in self._embeddings()]
        for p, _ in earlier:
            p.grad = None  # the two copies of the embedding exchange the gradient of this step alone
        further = {"targets": targets} if self.stages.config.mtp or self.stages.config.z_loss else {}
        schedule.step(tokens, tokens=tokens, **further, target=targets, return_outputs=False)
        self._sum_embeddings()
        for p, grad in earlier:
            if grad is not None and p.grad is not None:
                p.grad += grad
        task, aux = self._everywhere(self._losses, [aux for stage in stages for aux in stage.aux])
        return Losses(task / self.micro_batches, aux / self.micro_batches)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, without gradients. All ranks call it. Set the parts to eval mode before.

        Args:
            tokens: token ids, int64 [B, S], the same on all ranks, with any positive B.
            targets: token after each one, int64 [B, S].

        Returns:
            Mean loss, a scalar in float64, equal on all ranks of the pipeline.
        """
        pieces = [(len(part), part) for part in tokens.tensor_split(self.micro_batches) if len(part)]
        sends: list[dist.Work] = []
        handed: list[Tensor] = []  # outputs of the stage before, if it is on this rank
        for index, part in zip(self.indices, self.parts, strict=True):
            outputs = []
            for number, (size, piece) in enumerate(pieces):
                if index == 0:
                    x = piece
                elif index - 1 in self.indices:
                    x = handed[number]
                else:
                    x = torch.empty(self.boundary.shape(size, piece.shape[1]), dtype=self.dtype, device=self.device)
                    dist.recv(x, group=self.group, group_src=self.stages.rank_of(index - 1))
                y = part(x if index == 0 else self.boundary.arrive(x), tokens=piece)
                if index + 1 < len(self.stages.blocks):
                    y = self.boundary.leave(y)
                    if index + 1 not in self.indices:
                        work = dist.isend(y, group=self.group, group_dst=self.stages.rank_of(index + 1))
                        sends.append(cast(dist.Work, work))
                outputs.append(y)
            handed = outputs
        for work in sends:
            work.wait()
        losses = []
        if len(self.stages.blocks) - 1 in self.indices:
            parts = targets.tensor_split(self.micro_batches)
            losses = [
                self.loss_fn(y, part) * (len(part) / len(tokens))
                for y, part in zip(handed, parts, strict=False)
                if len(part)
            ]
        return self._everywhere(losses)[0]

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the whole model to a norm of `max_norm`, and return the norm before.

        As `turnout.moe.clip_grad_norm_`, but the embedding counts once though two stages have it.
        """
        tied = self._embeddings()
        own_copy = tied[-1:] if self.stages.rank_of(len(self.stages.blocks) - 1) == dist.get_rank(self.group) else []
        return clip_grad_norm_(self.parts, max_norm, self.group, own_copy)

    def _prepare(self, batch: int, length: int) -> tuple[Any, list[Stage]]:
        """Schedule and stages for micro-batches [batch, length]; new sizes need new ones, with other buffers."""
        if self._schedule is None or self._schedule[0] != (batch, length):
            keep_gathered(self.parts)
            config, number = self.stages.config, len(self.stages.blocks)

            def meta(*shape: int, **options: Any) -> Tensor:
                return torch.empty(*shape, device="meta", **options)

            hidden = meta(*self.boundary.shape(batch, length), dtype=self.dtype, requires_grad=True)
            logits = meta(batch, length // self.boundary.parts, config.vocab, dtype=self.dtype, requires_grad=True)
            stages = [
                Stage(
                    part,
                    index,
                    number,
                    self.device,
                    # without shapes torch would run the model once to find them
                    input_args=(hidden if index else meta(batch, length, dtype=torch.int64),),
                    output_args=(hidden if index + 1 < number else logits,),
                    group=self.group,
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
            self._schedule = (batch, length), schedule, stages
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

    def _embeddings(self) -> list[nn.Parameter]:
        """This rank's copies of the embedding: the first stage has it, and the last for a tied head or for `mtp`."""
        if not self.stages.config.tied and not self.stages.config.mtp:
            return []
        last = len(self.stages.blocks) - 1
        ends = [part for index, part in zip(self.indices, self.parts, strict=True) if index in (0, last)]
        return [cast(GPT, part).embed.weight for part in ends] if last else []  # pyright: ignore

    def _sum_embeddings(self) -> None:
        """Give both copies of the embedding the sum of their gradients, so that they stay equal."""
        tied = [p for p in self._embeddings() if p.requires_grad]
        if not tied:
            return
        for p in tied:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if isinstance(p, DTensor):  # with tensor parallelism, embedding and head give gradients of two placements
                p.grad = cast(DTensor, p.grad).redistribute(placements=p.placements)
        grads = [local(cast(Tensor, p.grad)) for p in tied]
        if len(grads) == 2:
            grads[0].add_(grads[1])
            grads[1].copy_(grads[0])
            return
        peer = self.stages.rank_of(len(self.stages.blocks) - 1 if self.indices[0] == 0 else 0)
        mine, theirs = grads[0].contiguous(), torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        exchange = [
            dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        grads[0].add_(theirs)
