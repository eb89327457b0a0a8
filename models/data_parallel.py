"""Data parallelism: what each of the ranks that have parts of a batch keeps, and when they exchange gradients.

The stages are those of ZeRO (arXiv:1910.02054, section 5). FSDP2 runs all but the first; dense parameters are split
over the dense mesh's "dp", experts over "edp", on top of what "tp", "ep" and "etp" have split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ..dispatch import mesh as axes
from ..dispatch.mesh import Meshes
from ..moe.layer import MoE
from ..moe.parallel.parallelize import expert_parameters, fully_shard_experts
from .blocks import Block
from .gpt import GPT

Data = Literal["replicate", "zero1", "zero2", "fsdp"]


def data_parallel(model: GPT, meshes: Meshes, how: Data = "fsdp", bf16: bool = False, cpu_offload: bool = False) -> GPT:
    """Share a model between the ranks along "dp" (experts: "edp"), in place; call it on every rank.

    It comes last, after `tensor_parallel` and `parallelize`; then make the optimizer. On d ranks:

    - ``"replicate"``: each rank has all; `sync_gradients` all-reduces gradients once a step.
    - ``"zero1"``: the optimizer's state is split d ways. Parameters are whole during a step, gradients until the last
      micro-batch; a step has one all-gather and one reduce-scatter, together the bytes of the all-reduce.
    - ``"zero2"``: gradients are split as well, and so reduce-scattered after every micro-batch.
    - ``"fsdp"``: ZeRO-3, parameters as well: a block is gathered before its forward and again before its backward.

    Args:
        model: a `GPT` or a stage of one.
        meshes: those it was spread over.
        how: as above. In a pipeline "zero2" and "fsdp" do as "zero1": a stage stays gathered during a step, whose
            backwards come in halves.
        bf16: compute in bfloat16 from float32 parameters ("master weights"), with gradients summed in float32. With
            "replicate" by `torch.autocast`; else parameters, but those of routers, travel and are used in bfloat16.
        cpu_offload: parameters, gradients and the optimizer's state lie in the host's memory, and the optimizer steps
            there. Not with "replicate". On GPUs clipping wants a group that has both,
            ``init_process_group("cpu:gloo,cuda:nccl")``.

    Raises:
        ValueError: options that do not go together.
    """
    if how not in get_args(Data):
        raise ValueError(f"data parallelism must be one of {', '.join(get_args(Data))}; got {how!r}")
    if how == "replicate":
        if cpu_offload:
            raise ValueError('cpu_offload needs FSDP2: use "zero1", "zero2" or "fsdp" in place of "replicate"')
        return computed_in(torch.bfloat16, model, meshes.dense.device_type) if bf16 else model
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32 if bf16 else None, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else exact
    offload = CPUOffloadPolicy(meshes.dense.device_type == "cuda") if cpu_offload else OffloadPolicy()
    edp = axes.axis(meshes.experts, axes.EDP)
    if bf16 or cpu_offload or (edp is not None and edp.size() > 1):  # else FSDP2 has nothing to do for experts
        options = {"mp_policy": policy, "offload_policy": offload, "reshard_after_forward": how == "fsdp"}
        fully_shard_experts(model, meshes, **options)
    experts = set(expert_parameters(model).values())

    def shard(module: nn.Module, policy: MixedPrecisionPolicy = policy, free: bool = how == "fsdp") -> None:
        fully_shard(
            module,
            mesh=meshes.dense[axes.DP],
            reshard_after_forward=free,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=experts,
        )

    for block in model.blocks:
        if not isinstance(block, Block):
            continue  # of another stage
        if bf16 and isinstance(block.feed_forward, MoE) and len(list(block.feed_forward.gate.parameters())):
            shard(block.feed_forward.gate, exact, free=False)  # FSDP2 cannot tell when the backward of a routing begins
        shard(block)
    shard(model, free=False)  # the head: its backward follows at once
    return model


def begin_micro_batch(model: nn.Module, how: Data, last: bool) -> None:
    """Before the forward of a micro-batch: whether its backward reduces gradients, and frees gathered parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last or how != "zero1", recurse=False)
            module.set_reshard_after_backward(last or how == "fsdp", recurse=False)


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward has gathered: the next one shall see what was stepped or loaded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def computed_in(dtype: torch.dtype, model: GPT, device_type: str) -> GPT:
    """Run the forward of a model, or a stage of one, under autocast to `dtype`, in place; it returns float32.

    Not the whole step: a backward under autocast would round what it should not.
    """
    model.forward = partial(_cast, model.forward, dtype, device_type)  # which a copy of the model copies as well
    return model


def _cast(forward: Callable[..., Tensor], dtype: torch.dtype, device_type: str, *args: Any, **options: Any) -> Tensor:
    with torch.autocast(device_type, dtype):
        y = forward(*args, **options)
    return y.float()
