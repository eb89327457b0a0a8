"""`MoETrainer`: transformers' `Trainer` for models whose experts are spread over ranks."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (Trainer's attributes are typed as what they may be: None, DeepSpeed's, wrapped.)

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer

from ...dispatch import mesh as axes
from ...dispatch.mesh import Meshes
from ...moe.adapters.lora import lora_parameters
from ...moe.experts.sharded import local
from ...moe.parallel.gradients import sync_gradients
from ..checkpoint import store as checkpoint
from ..checkpoint.together import on_first, together
from .adapters import has_peft_layers, save_adapters
from .bridged import bridged_layers
from .saving import restored

SCHEDULER = "scheduler.pt"  # as Trainer calls it


class MoETrainer(Trainer):
    """A `transformers.Trainer` for a model after `replace_moe` and `parallelize`.

    Gradients are synchronised once a step, by `sync_gradients` in place of DDP, and clipped by their exact norm. Every
    rank calls `save_model`, and rank 0 writes the whole model in the family's format (`restored`). If there are
    adapters (LoRA) that are not merged, only these are written (`save_adapters`). A checkpoint also has the tensors of
    model and optimizer (`turnout.models.checkpoint`), with which any number of ranks can resume. To combine this class
    with another Trainer, derive from both, this one first.

    These are not supported:

    - DeepSpeed, and FSDP by Accelerate. Call `fully_shard_experts` and `fully_shard` before the Trainer instead.
    - float16.
    - ``even_batches=False``, because a rank without a batch would not take part in the exchange.
    - ``save_on_each_node``, and ``save_only_model`` with ``load_best_model_at_end``.

    Args:
        mesh: mesh that `parallelize` got.
        args, options: arguments of `transformers.Trainer`.

    Raises:
        ValueError: a setting that is not supported, a model without bridged layers, or another number of ranks than
            Trainer knows of.
    """

    def __init__(self, *args: Any, mesh: DeviceMesh | Meshes, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mesh = mesh
        bridged_layers(self.model)
        frozen = [not p.requires_grad for p in lora_parameters(self.model).values()]
        if frozen and all(frozen) and has_peft_layers(self.model):
            raise ValueError(
                "PEFT has frozen the adapters of experts: call get_peft_model first, and add_lora afterwards"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "MoETrainer goes with neither DeepSpeed nor Accelerate's FSDP: leave them out, and shard the model by "
                "fully_shard_experts and fully_shard before"
            )
        if self.args.fp16:
            raise ValueError("MoETrainer does not scale losses for float16: set bf16=True in place of fp16=True")
        if not self.args.accelerator_config.even_batches:
            raise ValueError(
                "even_batches=False leaves ranks without a last batch, and the others wait for them: leave it True"
            )
        if self.args.save_on_each_node:
            raise ValueError(
                "save_on_each_node=True: rank 0 alone gets the whole model; save to a folder all nodes share"
            )
        if self.args.save_only_model and self.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end=True reads what save_only_model=True leaves out: drop one of them")
        if self.args.world_size != dist.get_world_size():
            raise ValueError(
                f"Trainer knows of {self.args.world_size} ranks, and there are {dist.get_world_size()}: start the job "
                "with torchrun, and make the TrainingArguments before the mesh"
            )
        self._start_alike()

    def create_accelerator_and_postprocess(self) -> None:
        """See `Trainer`. Accelerate does not wrap the model in DDP, which refuses DTensors."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """See `Trainer`. Groups without parameters are left out, because checkpoints cannot hold them."""
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch. After the last one of a step, gradients are synchronised."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            sync_gradients(self.model, self.mesh)
        return loss

    @torch.no_grad()
    def _start_alike(self) -> None:
        """Give all ranks the first rank's values of replicated parameters, as DDP does: new heads may differ."""
        edp = axes.axis(axes.of_experts(self.mesh), axes.EDP)
        everyone, copies = axes.token_group(self.mesh), None if edp is None else edp.get_group()
        for p in self.model.parameters():
            spread = set(axes.names(p.device_mesh)) if isinstance(p, DTensor) else set()
            if not spread and everyone is not None:
                dist.broadcast(p, group=everyone, group_src=0)
            elif spread & {axes.EP, axes.NODE} and axes.EDP not in spread and copies is not None:
                dist.broadcast(local(p), group=copies, group_src=0)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if has_peft_layers(self.model) or any(layer.experts.adapts for _, _, layer in bridged_layers(self.model)):
            save_adapters(self.model, output_dir or self.args.output_dir)
            return
        save = partial(super()._save, output_dir, state_dict)  # of `save_model`: what it pushes to the hub comes later
        with restored(self.model):
            together(save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, step = Path(output_dir), self.state.global_step
        on_first(lambda: shutil.rmtree(folder / f"step-{step}", ignore_errors=True))  # of a run before, as Trainer does
        checkpoint.save(folder, self.model, self.optimizer.optimizer, step)
        on_first(lambda: torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        pass  # `_load_optimizer_and_scheduler` loads it, because the optimizer is made later

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_spread(checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_spread(self.state.best_model_checkpoint)

    def _load_spread(self, folder: str) -> None:
        if checkpoint.load_newest(Path(folder), self.model, self.optimizer.optimizer) is None:
            raise ValueError(
                f"{folder} holds nothing that MoETrainer can go on with: was it saved with save_only_model=True, or by "
                "another Trainer? Its weights can be had by from_pretrained"
            )
