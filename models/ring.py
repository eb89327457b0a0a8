"""Ring attention (arXiv:2310.01889): queries stay, keys and values go round the ranks, and partial results are merged.

Sequences are cut in zig-zag: rank r of W has the parts r and 2 W - 1 - r of 2 W. Then causal attention gives each rank
the same work in every step (Llama 3, arXiv:2407.21783, section 3.3.2)::

    keys from rank    queries that see keys
    the same          all of them, causally
    an earlier one    all queries, the first half of the keys
    a later one       the second half of the queries, all keys

torch's own ring (torch.distributed.tensor.experimental) has no kernel for a CPU, and is switched on for the whole
process (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ..dispatch.failure import named
from ..dispatch.mesh import CP, Meshes
from ..dispatch.reorder import wide

aten: Any = torch.ops.aten


class Ring(nn.Module):
    """Core of causal attention of sequences that are split in zig-zag over "cp". It has no mask and no dropout.

    Args:
        meshes: meshes of the job.
    """

    splits_sequences = True  # `parallelize` asks for it

    def __init__(self, meshes: Meshes) -> None:
        super().__init__()
        self.meshes = meshes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attend as `Core`: q [B, heads, S / cp, size], k and v [B, kv_heads, S / cp, size] -> the shape of q."""
        if not options["causal"] or options["mask"] is not None or options["window"]:
            raise ValueError("ring attention is causal and has no mask and no window: use Ulysses, of cp <= heads / tp")
        if torch.is_autocast_enabled(q.device.type):  # attention of torch's casts as well
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        return _RingAttention.apply(q, k, v, self.meshes.dense[CP].get_group())  # pyright: ignore[reportReturnType]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, group):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        here = held = torch.stack([k, v])
        out, total = wide(torch.zeros_like(q)), wide(q.new_zeros(q.shape[:-1]))
        for step in range(ranks):
            travel = _Travel(held, group) if step + 1 < ranks else None  # while this rank computes
            queries, keys, causal = _visible(rank, (rank - step) % ranks, q.shape[2])
            part, part_total = _attend(q[:, :, queries], held[:, :, :, keys], causal)
            if step == 0:
                out, total = wide(part), part_total
            else:
                before = total[:, :, queries]
                now = torch.logaddexp(before, part_total)
                weights = [(each - now).exp().unsqueeze(-1) for each in (before, part_total)]
                out[:, :, queries] = out[:, :, queries] * weights[0] + part * weights[1]
                total[:, :, queries] = now
            held = held if travel is None else travel.wait()
        out = out.to(q.dtype)
        ctx.group = group
        ctx.save_for_backward(q, here, out, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, held, out, total = ctx.saved_tensors
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        to_q = wide(torch.zeros_like(q))
        returning: _Travel | None = None  # gradients of the keys and values that were here before
        for step in range(ranks):
            travel = _Travel(held, ctx.group) if step + 1 < ranks else None
            queries, keys, causal = _visible(rank, (rank - step) % ranks, q.shape[2])
            rows = [x[:, :, queries] for x in (grad, q, out, total)]
            own, others = _attend_backward(*rows, held=held[:, :, :, keys], causal=causal)
            to_q[:, :, queries] += own
            to_held = wide(torch.zeros_like(held)) if returning is None else returning.wait()
            to_held[:, :, :, keys] += others
            returning = _Travel(to_held, ctx.group)
            held = held if travel is None else travel.wait()
        assert returning is not None
        to_k, to_v = returning.wait()  # after as many hops as there are ranks they are at home
        return to_q.to(q.dtype), to_k.to(q.dtype), to_v.to(q.dtype), None


class _Travel:
    """A tensor under way to the next rank; `wait` returns the tensor of the rank before."""

    def __init__(self, x: Tensor, group: ProcessGroup) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group, self.came, self.sent = group, torch.empty_like(x.contiguous()), x.contiguous()
        send, recv = [0] * ranks, [0] * ranks
        send[(rank + 1) % ranks] = recv[(rank - 1) % ranks] = len(x)
        with named("keys and values of ring attention", group):
            self.work = dist.all_to_all_single(self.came, self.sent, recv, send, group=group, async_op=True)

    def wait(self) -> Tensor:
        assert self.work is not None
        with named("keys and values of ring attention", self.group):
            self.work.wait()
        return self.came


def _visible(rank: int, source: int, length: int) -> tuple[slice, slice, bool]:
    """Queries of a rank and keys of another that see each other, of `length` each, and whether causally."""
    half = length // 2
    if source == rank:
        return slice(None), slice(None), True
    if source < rank:
        return slice(None), slice(half), False
    return slice(half, None), slice(None), False


def _attend(q: Tensor, held: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [B, heads, S, size] to keys and values, and the logarithm of its normaliser, float32 [B, heads, S]."""
    k, v = _repeated(held, q)
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return aten._scaled_dot_product_flash_attention(_half(q), k, v, 0.0, causal)[:2]


def _attend_backward(
    grad: Tensor, q: Tensor, out: Tensor, total: Tensor, held: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of queries, and of keys and values; `out` and `total` are those over all keys, of all ranks."""
    rows = [x.contiguous() for x in (grad, q, *_repeated(held, q), out, total)]
    if q.device.type == "cpu":
        to_q, *others = aten._scaled_dot_product_flash_attention_for_cpu_backward(*rows, 0.0, causal)
    else:
        lengths = None, None, q.shape[2], held.shape[3]  # the first two are for batches of unequal lengths
        seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # of a dropout that there is not
        to_q, *others = aten._scaled_dot_product_flash_attention_backward(*rows, *lengths, 0.0, causal, seed, seed)
    return to_q, torch.stack(others).unflatten(2, (held.shape[2], -1)).sum(3)


def _repeated(held: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """Keys and values [2, B, kv_heads, S, size] with as many heads as queries."""
    return held.repeat_interleave(q.shape[1] // held.shape[2], dim=2).unbind()


def _half(q: Tensor) -> Tensor:
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"ring attention on a GPU needs bfloat16 or float16; got {q.dtype}: use bf16=True")
    return q
