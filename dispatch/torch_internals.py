"""All undocumented names of torch that the package uses, each with its reason. Tested with torch 2.11 and 2.13.

If a torch release moves one of them, only this file needs a change.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Base class of every backend's options. gloo's timeout is set with it, and torch exports it nowhere else.
from torch._C._distributed_c10d import Backend
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

# Tells whether `replicate` wraps a module, and which parameters it averages. No documented function does.
from torch.distributed._composable.contract import _get_registry as composed_by
from torch.distributed._composable.replicate import replicate

# The only all-to-all whose forward and backward `torch.compile` takes into a graph.
from torch.distributed._functional_collectives import all_to_all_single_autograd

# The store through which the ranks of a job found each other. Ranks can read it without a collective.
from torch.distributed.distributed_c10d import _get_default_store as default_store

# Tells which part of a DTensor this rank holds, for any placements.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Tells whether a tensor wraps other tensors, as a DTensor does, and can list them.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "Backend",
    "all_to_all_single_autograd",
    "composed_by",
    "compute_local_shape_and_global_offset",
    "default_store",
    "embedding_bag_weight_backward",
    "has_half_products",
    "has_slow_half_products",
    "in_backward",
    "is_traceable_wrapper_subclass",
    "mark_dynamic",
    "replicate",
    "scaled_grouped_mm",
    "skips_side_effects_in_recomputation",
    "transformed",
    "unscale",
]

# Marks an axis as dynamic if the compiler allows it. The documented `mark_dynamic` raises if it does not.
mark_dynamic = torch._dynamo.maybe_mark_dynamic

# <rows[i], grad[j]> for pairs (i, j), without a tensor of products. It is the backward of `F.embedding_bag`.
embedding_bag_weight_backward = torch.ops.aten._embedding_bag_per_sample_weights_backward

# Unscales gradients and finds infinities in one pass, as torch.amp.GradScaler does internally.
unscale = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_


def in_backward() -> bool:
    """Whether a backward is running. A forward that runs then recomputes activations."""
    return torch._C._current_graph_task_id() != -1


def transformed(*grads: Tensor) -> bool:
    """Whether PyTorch must see each operator: in `torch.func`, in forward mode, or with batched gradients.

    Our custom operators define a backward and nothing else. In forward mode they would silently return zero tangents.
    So callers use plain PyTorch in their place.

    Args:
        grads: gradients that may be batched (``torch.autograd.grad(..., is_grads_batched=True)``).
    """
    followed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return followed or any(is_legacy_batchedtensor(grad) for grad in grads)


@cache
def has_half_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply bfloat16 or float16 matrices on this CPU."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


@cache
def has_slow_half_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half precision, but float32 ones faster.

    Intel's cores since Sapphire Rapids, which the instructions for float16 tell apart, are made to multiply bfloat16 by
    AMX. Where a virtual machine hides AMX, oneDNN uses AVX-512: 85 GFLOP/s a core, and 150 in float32 (Xeon, family 6
    model 207, torch 2.13). AMD's cores and Cooper Lake have no AMX, and need none.
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may lack it
    amx_core = has.get("cpu_name", "").startswith("Intel") and has.get("avx512_fp16", False)
    return dtype == torch.bfloat16 and amx_core and not has.get("amx_bf16", False)


def scaled_grouped_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, ends: Tensor) -> Tensor:
    """Grouped GEMM in float8 on sm_90: (a a_scale) (b b_scale), bfloat16 [R, N]. Rows past ends[-1] are undefined.

    `F.scaled_grouped_mm` is documented, but has no rule for the meta device, on which a test compares layouts.

    Args:
        a: float8_e4m3fn [R, K], contiguous.
        b: float8_e4m3fn [L, K, N], each matrix transposed in memory. K and N are multiples of 16.
        a_scale: float32 [R].
        b_scale: float32 [L, N].
        ends: int32 [L], end of each expert's rows.
    """
    product = torch.ops.aten._scaled_grouped_mm
    return product(a, b, a_scale, b_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=False)


@torch.compiler.assume_constant_result
def skips_side_effects_in_recomputation() -> bool:
    """Whether a compiled backward skips side effects, such as recorded losses, in a recomputed forward (dynamo option).

    If it does not, `torch.compile` takes no recomputed MoE layer into its graph. Blocks that are compiled one by one
    would record everything twice, so they are not compiled.
    """
    return getattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", False)
