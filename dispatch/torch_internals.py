"""Undocumented names of torch: all that the package uses, with the reason for each. Tried with torch 2.11 and 2.13.

A torch that moves one of them breaks this file and no other.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Base class of every backend's options: gloo's timeout is set in it, and it is named nowhere else.
from torch._C._distributed_c10d import Backend
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

# Whether `replicate` was given a module, and which of its parameters it averages: nothing documented tells.
from torch.distributed._composable.contract import _get_registry as composed_by
from torch.distributed._composable.replicate import replicate

# The only all-to-all that `torch.compile` takes into a graph together with its backward.
from torch.distributed._functional_collectives import all_to_all_single_autograd

# Which part of a DTensor lies on this rank, for any placements.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Whether a tensor wraps others, as a DTensor does, and can say which.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "Backend",
    "all_to_all_single_autograd",
    "composed_by",
    "compute_local_shape_and_global_offset",
    "embedding_bag_weight_backward",
    "has_half_products",
    "in_backward",
    "is_traceable_wrapper_subclass",
    "mark_dynamic",
    "replicate",
    "skips_side_effects_in_recomputation",
    "transformed",
    "unscale",
]

# Marks an axis as dynamic if the compiler can have it so; the documented `mark_dynamic` raises if it cannot.
mark_dynamic = torch._dynamo.maybe_mark_dynamic

# <rows[i], grad[j]> for pairs (i, j) without a tensor of the products: `F.embedding_bag` has it as its backward alone.
embedding_bag_weight_backward = torch.ops.aten._embedding_bag_per_sample_weights_backward

# Unscales gradients and finds infinities in one pass, as torch.amp.GradScaler does inside.
unscale = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_


def in_backward() -> bool:
    """Whether a backward is running, so that a forward is a recomputation of activations."""
    return torch._C._current_graph_task_id() != -1


def transformed(*grads: Tensor) -> bool:
    """Whether PyTorch follows each operator: in `torch.func`, in forward mode, or where gradients are batched.

    Operators of ours have a backward and nothing else; in forward mode a custom one would silently pass on tangents of
    zero. So plain PyTorch computes in their place.

    Args:
        grads: gradients that may be batched (``torch.autograd.grad(..., is_grads_batched=True)``).
    """
    followed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return followed or any(is_legacy_batchedtensor(grad) for grad in grads)


@cache
def has_half_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 or float16 on this CPU."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


@torch.compiler.assume_constant_result
def skips_side_effects_in_recomputation() -> bool:
    """Whether a compiled backward records no losses and loads in a forward that it recomputes (an option of dynamo).

    Otherwise `torch.compile` takes no recomputed mixture of experts into its graph. Blocks compiled by themselves
    would record a second time, so none of them is.
    """
    return getattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", False)
