"""Muon for models that are spread over ranks: tensor parallelism, stacked experts, expert tensor parallelism, FSDP2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Optimizer

from ..moe.experts.base import Experts
from ..moe.experts.sharded import local
from ..moe.parallel.param_groups import param_groups
from .blocks import Block

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of a x + b x^3 + c x^5, as in torch.optim.Muon
STEPS = 5
TOGETHER = 1 << 24  # numbers that a rank orthogonalises at a time, if a matrix has no more


class Muon(Optimizer):
    """Muon for hidden matrices and AdamW for all other parameters, in one optimizer.

    Muon moves a matrix by its momentum with all singular values brought near 1. `torch.optim.Muon` does so for plain
    matrices. This one also takes stacks of matrices [E, A, B], such as experts, and DTensors. Every matrix is
    orthogonalised as a whole, so the update is the one-rank update on any mesh. Ranks that hold parts of the same
    matrices exchange them, and each orthogonalises some. Ranks that hold different experts exchange nothing.

    An update is scaled by 0.2 sqrt(max(A, B)). Its root mean square is then 0.2, near that of AdamW's updates, so that
    both may share a learning rate and weight decay. The products run in bfloat16 on a GPU, and in float32 or wider on a
    CPU.

    Args:
        params: groups from `muon_groups`, or others. Groups with ``muon=False`` are stepped by AdamW.
        lr: learning rate, 1e-3 by default.
        weight_decay: decoupled weight decay, 0.1 by default.
        momentum: decay of the average of gradients, 0.95 by default.
        nesterov: whether to orthogonalise the average as it would be after one more such step; True by default.
        muon: whether groups that do not say so are stepped by Muon; True by default.
        betas: decays of AdamW's two averages, (0.9, 0.95) by default.
        eps: number that AdamW adds to the root of the second, 1e-8 by default.

    Raises:
        ValueError: a parameter for Muon that is no matrix [A, B] and no stack of matrices [E, A, B].

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. The scale: Liu et al. 2025, arXiv:2502.16982.

    >>> from turnout.models import GPT, GPTConfig
    >>> optimizer = Muon(muon_groups(GPT(GPTConfig(layers=2)), weight_decay=0.1), lr=1e-3)
    >>> [(len(group["params"]), group["muon"], group["weight_decay"]) for group in optimizer.param_groups]
    [(14, True, 0.1), (2, False, 0.1), (5, False, 0.0)]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        muon: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "muon": muon}
        super().__init__(params, defaults | {"betas": betas, "eps": eps})
        for p in (p for group in self.param_groups if group["muon"] for p in group["params"]):
            if p.ndim not in (2, 3):
                raise ValueError(
                    f"Muon takes matrices [A, B] and stacks of matrices [E, A, B]; got {tuple(p.shape)}: put it into a "
                    "group with muon=False, as muon_groups does"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step. All ranks call it. A parameter whose gradient is None on all of them is left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if others := [{**group} for group in self.param_groups if not group["muon"]]:
            adamw = AdamW(others)  # with copies of the groups: it adds options of its own to them
            adamw.state = self.state
            adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                for alike in _alike(p for p in group["params"] if p.grad is not None):
                    self._move(alike, group)
        return loss

    def _move(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Step parameters of one shape, spread in one way."""
        lr, momentum, updates = float(group["lr"]), group["momentum"], []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            average, grad = local(self.state[p]["momentum_buffer"]), _gradient(p)
            average.lerp_(grad, 1 - momentum)
            updates.append(grad.lerp(average, momentum) if group["nesterov"] else average)
        if not lr:
            return  # nothing moves, so nothing is sent: checkpoints make such a step to get the state
        scale = 0.2 * math.sqrt(max(params[0].shape[-2:]))
        for p, update in zip(params, _orthogonalised(updates, params[0]), strict=True):
            local(p).mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)


def muon_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: hidden matrices for Muon itself, all others for AdamW.

    Hidden matrices are those of attention, dense feed-forward networks and experts. Queries, keys and values are a
    matrix each, of all heads. Embeddings and the head are not hidden, and neither are routers: each row of these
    belongs to one token id or expert, and learns at a rate of its own.

    Args:
        model: `GPT`, `BERT`, `T5`, a pipeline stage, or a `ParallelModel`.
        options: options for all groups, and ``decay_embeddings``, as for `turnout.moe.param_groups`.

    Returns:
        Groups for `Muon`. Each says ``muon=True`` or ``muon=False``.
    """
    hidden = set(_hidden(model))
    groups = []
    for group in param_groups(model, **options):
        for muon in (True, False):
            if params := [p for p in group["params"] if (p in hidden) == muon]:
                groups.append({**group, "params": params, "muon": muon})
    return groups


def newton_schulz(x: Tensor) -> Tensor:
    """Bring the singular values of matrices [..., A, B] near 1, to between 0.7 and 1.2 for most, by five steps.

    >>> x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    >>> bool((torch.linalg.svdvals(newton_schulz(x)) - 1).abs().max() < 0.35)
    True
    """
    a, b, c = COEFFICIENTS
    flat = x if x.shape[-2] <= x.shape[-1] else x.mT
    y = flat.reshape(flat.shape[:-2].numel(), *flat.shape[-2:])
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):  # `baddbmm` adds while it multiplies, so no sum takes a pass of its own
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.reshape(flat.shape)
    return y if x.shape[-2] <= x.shape[-1] else y.mT


def _hidden(model: nn.Module) -> Iterator[Tensor]:
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield module.weight
            elif isinstance(module, Experts):
                yield from (p for p in module.parameters() if p.ndim == 3)


def _alike(params: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Lists of matrices of one shape that are spread in one way, and each stack of matrices by itself."""
    lists: dict[Any, list[nn.Parameter]] = {}
    for p in params:
        place = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        lists.setdefault(p if p.ndim == 3 else (p.shape, p.dtype, p.device, place), []).append(p)
    for each in lists.values():
        ranks = each[0].device_mesh.size() if isinstance(each[0], DTensor) else 1
        many = ranks * max(1, TOGETHER // max(1, each[0].numel()))
        yield from (each[i : i + many] for i in range(0, len(each), many))


def _gradient(p: nn.Parameter) -> Tensor:
    """This rank's part of a gradient, split as its parameter."""
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local(grad)


def _orthogonalised(updates: list[Tensor], p: nn.Parameter) -> Iterable[Tensor]:
    """Orthogonalise updates of parameters that are like p: the parts on this rank -> the parts on this rank.

    Single matrices are stacked on a new last axis, so that their own axes keep their numbers.
    """
    single = p.ndim == 2
    part = torch.stack(updates, -1) if single else updates[0]
    part = part.to(torch.bfloat16 if part.is_cuda else torch.promote_types(part.dtype, torch.float32))
    part = _spread(part, p, stack=2) if single else _spread(part, p, stack=0)
    return part.unbind(-1) if single else [part]


def _spread(part: Tensor, p: nn.Parameter, stack: int) -> Tensor:
    """Orthogonalise this rank's part of matrices that are stacked on an axis, together with ranks of other parts."""
    split = [axis for axis, placed in enumerate(p.placements) if _cuts(placed, stack)] if isinstance(p, DTensor) else []
    if not split:  # whole matrices
        return newton_schulz(part.movedim(stack, 0)).movedim(0, stack)
    assert isinstance(p, DTensor)
    mesh, names = p.device_mesh, p.device_mesh.mesh_dim_names
    if names is not None and len(split) < mesh.ndim:  # leave out axes that split the stack, or nothing
        mesh = mesh[tuple(names[axis] for axis in split)]
    sizes = [part.shape[axis] if axis == stack else size for axis, size in enumerate(p.shape)]
    shape = torch.Size([*sizes, *part.shape[len(sizes) :]])
    how = {"run_check": False, "shape": shape, "stride": (shape[1] * shape[2], shape[2], 1)}
    cut = [p.placements[axis] for axis in split]
    parts = DTensor.from_local(part, mesh, cut, **how)
    some = parts.redistribute(placements=[Shard(stack)] * len(split))  # of the stack, as whole matrices
    done = newton_schulz(some.to_local().movedim(stack, 0)).movedim(0, stack).contiguous()
    return DTensor.from_local(done, mesh, some.placements, **how).redistribute(placements=cut).to_local()


def _cuts(placed: Any, stack: int) -> bool:
    """Whether a placement cuts through matrices. `is_shard` is False for the strided shards of FSDP2 (torch 2.13)."""
    return not placed.is_replicate() and placed.dim != stack
