"""Data parallelism for MoE models: replicated, ZeRO-1, ZeRO-2 and FSDP (ZeRO-3), and bfloat16 compute.

The stages are those of ZeRO (arXiv:1910.02054, section 5). FSDP2 runs all but "replicate". Dense parameters are split
over the dense mesh's "dp" and "cp", experts over "edp". Splits over "tp", "ep" and "etp" come first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ..dispatch import mesh as axes
from ..dispatch.mesh import Meshes
from ..moe.layer import MoE
from ..moe.parallel.fsdp import fully_shard_experts
from ..moe.parallel.parallelize import expert_parameters
from .bert import BERT
from .blocks import Block
from .gpt import GPT
from .t5 import T5

Model = TypeVar("Model", bound=GPT | BERT | T5)
Data = Literal["replicate", "zero1", "zero2", "fsdp"]


def data_parallel(
    model: Model, meshes: Meshes, how: Data = "fsdp", bf16: bool = False, cpu_offload: bool = False
) -> Model:
    """Apply data parallelism to a model, in place. Call it on every rank.

    Call it after `tensor_parallel` and `parallelize`, and make the optimizer afterwards. On d ranks:

    - ``"replicate"``: each rank has all parameters. `sync_gradients` all-reduces gradients once a step.
    - ``"zero1"``: the optimizer's state is split d ways. Parameters are whole during a step, gradients until the last
      micro-batch. A step has one all-gather and one reduce-scatter, together the bytes of the all-reduce.
    - ``"zero2"``: gradients are split as well, and are reduce-scattered after every micro-batch.
    - ``"fsdp"``: ZeRO-3. Parameters are split as well, and gathered before a block's forward and before its backward.

    Args:
        model: `GPT`, `BERT`, `T5`, or a pipeline stage of one.
        meshes: meshes that the model was spread over.
        how: kind of data parallelism, as above; ``"fsdp"`` by default. In a pipeline "zero2" and "fsdp" act as
            "zero1": a stage stays gathered during a step, since its backward may come in two halves.
        bf16: whether to compute in bfloat16 from float32 parameters, with gradients summed in float32; False by
            default. "replicate" uses `torch.autocast`. The others gather and use parameters in bfloat16, routers apart.
        cpu_offload: whether parameters, gradients and optimizer state stay in host memory, where the optimizer then
            steps; False by default. Not with "replicate". On GPUs, clipping needs a group for both devices,
            ``init_process_group("cpu:gloo,cuda:nccl")``.

    Returns:
        The model.

    Raises:
        ValueError: options that do not go together.
        TypeError: another model.
    """
    if not isinstance(model, GPT | BERT | T5):
        raise TypeError(f"data_parallel shards a GPT, BERT or T5; got {type(model).__name__}: use fully_shard of FSDP2")
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
            mesh=meshes.replicas,
            reshard_after_forward=free,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=experts,
        )
        if meshes.dense[axes.CP].size() > 1:  # gradients are summed over cp, and averaged over dp
            wrapped = cast(FSDPModule, module)
            wrapped.set_gradient_divide_factor(float(meshes.dense[axes.DP].size()))
            wrapped.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if bf16 and isinstance(block.feed_forward, MoE) and len(list(block.feed_forward.gate.parameters())):
            shard(block.feed_forward.gate, exact, free=False)  # FSDP2 cannot tell when the backward of a routing begins
        shard(block)
    shard(model, free=False)  # embedding and head: the head's backward follows at once, so nothing is freed between
    return model


def begin_micro_batch(model: nn.Module, how: Data, last: bool) -> None:
    """Tell FSDP2, before a micro-batch, whether its backward reduces gradients and frees gathered parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last or how != "zero1", recurse=False)
            module.set_reshard_after_backward(last or how == "fsdp", recurse=False)


def reshard(model: nn.Module) -> None:
    """Free parameters that a forward without a backward has gathered, so that the next forward sees new values."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def computed_in(dtype: torch.dtype, model: Model, device_type: str) -> Model:
    """Run a model's forward under autocast to `dtype`, in place. Its output is float32.

    The backward stays outside: autocast would round values in it that must not be rounded.
    """
    model.forward = partial(_cast, model.forward, dtype, device_type)  # a partial: deepcopy of the model copies it
    return model


def _cast(forward: Callable[..., Any], dtype: torch.dtype, device_type: str, *args: Any, **options: Any) -> Any:
    with torch.autocast(device_type, dtype):
        y = forward(*args, **options)
    return tuple(x.float() for x in y) if isinstance(y, tuple) else y.float()
