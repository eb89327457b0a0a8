"""Router arithmetic: from logits to scores, top-k experts and their weights, with one CUDA kernel each way."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...cuda.launch import available, backends, launch
from ...dispatch.torch_internals import transformed
from .gate import chosen_scores, normalised

SCORES = ("softmax", "sigmoid")


def route(
    logits: Tensor, k: int, score: str = "softmax", normalize: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k experts with the highest scores for each token, best first.

    Without a bias, experts are compared by logit, because rounding can make different scores equal. Between equal
    logits, a CUDA device takes the lowest expert id first, and a CPU takes any (`torch.topk`). A NaN logit gives its
    token a NaN weight.

    Args:
        logits: router logits [T, E], float32 or float64.
        k: number of experts that a token picks, 1 to E.
        score: ``"softmax"`` over all E (the default), or ``"sigmoid"`` of each logit (DeepSeek-V3).
        normalize: whether each token's k weights are divided by their sum; False by default.
        bias: expert bias [E], added to the scores only when they are compared, without a gradient (DeepSeek-V3,
            eq. 16). None, the default, adds none.

    Returns:
        expert: ids int64 [T, k].
        weight: [T, k] in the dtype of the logits, differentiable.
        scores: [T, E] in the dtype of the logits, differentiable.

    References:
        DeepSeek-V3, arXiv:2412.19437.

    >>> expert, weight, _ = route(torch.tensor([[0.0, 3.0, 1.0]]), 2, "sigmoid", bias=torch.tensor([9.0, 0.0, 0.0]))
    >>> expert.tolist(), weight.tolist()
    ([[0, 1]], [[0.5, 0.9525741338729858]])
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"logits must be [T, E] with k={k} at least 1 and at most E; got {tuple(logits.shape)}")
    if bias is not None:
        if bias.shape != logits.shape[1:]:
            raise ValueError(f"bias must be [E] with E={logits.shape[1]}; got {tuple(bias.shape)}")
        bias = bias.detach().to(logits.dtype)
    kernel = torch.compiler.is_compiling() or (logits.device.type in backends and _has_kernel(logits, k))
    step = _route if kernel and logits.dtype == torch.float32 and not transformed() else plain
    weight, scores, expert = step(logits, bias, k, score == "sigmoid", normalize)
    return expert, weight, scores


def route_in_groups(
    logits: Tensor,
    k: int,
    groups: int,
    top_groups: int,
    best: int,
    score: str = "softmax",
    normalize: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k best experts as `route` does, but only from each token's `top_groups` best groups.

    Groups are compared by the sum of their `best` highest scores, and experts by their scores, both with the bias.
    Group g of G is experts [g*E/G, (g+1)*E/G). Other arguments and the result are as in `route`.

    >>> route_in_groups(torch.tensor([[3.0, 0.0, 2.0, 2.0]]), 2, groups=2, top_groups=1, best=1)[0].tolist()
    [[0, 1]]
    >>> route_in_groups(torch.tensor([[3.0, 0.0, 2.0, 2.0]]), 2, 2, 1, best=2, score="sigmoid")[0].tolist()
    [[2, 3]]
    """
    if top_groups == groups:
        return route(logits, k, score, normalize, bias)
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    compared = scores.detach() if bias is None else scores.detach() + bias
    by_group = compared.unflatten(1, (groups, -1))  # [T, G, E/G]
    check_room(k, scores.shape[1], groups, top_groups)
    value = by_group.topk(best).values.sum(-1)  # [T, G]
    chosen = torch.zeros_like(value).scatter(1, value.topk(top_groups).indices, 1.0) > 0
    expert = torch.where(chosen.unsqueeze(2), by_group, -torch.inf).flatten(1).topk(k).indices
    weight = scores.gather(1, expert)
    return expert, normalised(weight) if normalize else weight, scores


def check_groups(num_experts: int, groups: int, top_groups: int | None) -> int:
    """Number of groups that a token may visit, where `top_groups` None means all. ValueError if they do not fit."""
    top_groups = groups if top_groups is None else top_groups
    if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(
            f"groups={groups} must divide num_experts={num_experts}, and top_groups={top_groups} must be between 1 and "
            f"groups={groups}"
        )
    return top_groups


def check_room(k: int, num_experts: int, groups: int, top_groups: int) -> None:
    """Raise ValueError if `top_groups` groups hold fewer than k experts."""
    if k > (room := top_groups * (num_experts // groups)):
        raise ValueError(f"top_k={k}, but top_groups={top_groups} have only {room} experts: raise top_groups")


def picks(k: int, num_experts: int, groups: int, top_groups: int | None) -> tuple[int, int]:
    """Number of groups that a token picks, and of experts in each. ValueError if k does not split evenly.

    With `top_groups` None, it is the divisor of k nearest to sqrt(k) among those that fit.
    """
    size = num_experts // groups
    fit = [g for g in range(1, groups + 1) if k % g == 0 and k // g <= size]
    wanted = fit if top_groups is None else [g for g in fit if g == top_groups]
    if not wanted:
        raise ValueError(
            f"top_k={k} with top_groups={top_groups}: a token picks top_groups of groups={groups}, and top_k / "
            f"top_groups of the {size} experts in each; "
            + (f"use top_groups from {fit}" if fit else "use another top_k or other groups")
        )
    top_groups = sorted(wanted, key=lambda g: abs(g - math.sqrt(k)))[0]  # min(key=) breaks torch.compile's graph
    return top_groups, k // top_groups


def weighed_in_groups(scores: Tensor, expert: Tensor, groups: int, top_groups: int, each: int) -> Tensor:
    """Weights of a two-level routing: the weight of an expert's group times its weight within the group, [T, k].

    Each is a softmax over the choices at that level, or over all if a token makes only one choice there.

    Args:
        scores: product of both levels' softmax over all, [T, E].
        expert: expert ids int64 [T, k], -1 for none.
        groups: number of groups G.
        top_groups: number of groups that a token picks.
        each: number of experts that a token picks in each group.
    """
    chosen = torch.zeros_like(scores).scatter_add(1, expert.clamp(min=0), (expert >= 0).to(scores.dtype))
    by_group, chosen = scores.unflatten(1, (groups, -1)), chosen.unflatten(1, (groups, -1))  # [T, G, E/G]
    group, tiny = by_group.sum(2, keepdim=True), torch.finfo(scores.dtype).tiny
    within = by_group / group.clamp(min=tiny)
    if each > 1:
        within = within / (within * chosen).sum(2, keepdim=True).clamp(min=tiny)
    if top_groups > 1:
        group = group / (group * chosen.amax(2, keepdim=True)).sum(1, keepdim=True).clamp(min=tiny)
    return chosen_scores((group * within).flatten(1), expert)


def plain(logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`route` in plain PyTorch, in any dtype and twice differentiable. Tests compare the kernels with it.

    It returns weight, scores, expert in this order, because `torch.library.opcheck` sums the first outputs' gradients.
    """
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    expert = highest(logits if bias is None else scores + bias, k)
    weight = scores.gather(1, expert)
    return normalised(weight) if normalize else weight, scores, expert


def highest(scores: Tensor, k: int) -> Tensor:
    """Ids of the k highest scores of each token, best first: scores [T, E] -> int64 [T, k]. NaN is the highest."""
    if scores.device.type != "cpu" or k != 2 or scores.shape[1] > 64:
        return scores.topk(k).indices
    scores = scores.detach()  # two maxima take half as long as torch's topk of 2 on a CPU
    first = scores.max(1, keepdim=True).indices
    rest = scores.clamp(min=torch.finfo(scores.dtype).min).scatter(1, first, -torch.inf)  # below any other score
    return torch.cat([first, rest.max(1, keepdim=True).indices], 1)


def plain_backward(
    grad_weight: Tensor | None,
    grad_scores: Tensor | None,
    expert: Tensor,
    scores: Tensor,
    sigmoid: bool,
    normalize: bool,
) -> Tensor:
    """Gradient of the logits, from gradients of weight [T, k] and scores [T, E]. None stands for zeros."""
    grad = torch.zeros_like(scores) if grad_scores is None else grad_scores
    if grad_weight is not None:
        if normalize:  # weight = score / total
            score, tiny = scores.gather(1, expert), torch.finfo(scores.dtype).tiny
            total = score.sum(-1, keepdim=True)
            mean = (grad_weight * score).sum(-1, keepdim=True) / total.clamp(min=tiny)
            grad_weight = (grad_weight - torch.where(total < tiny, 0, mean)) / total.clamp(min=tiny)
        grad = grad.scatter_add(1, expert, grad_weight)
    if sigmoid:
        return grad * scores * (1 - scores)
    return scores * (grad - (grad * scores).sum(-1, keepdim=True))


# Limits of `router.cu`: each token has a warp, whose lanes write one choice each, and keeps E floats in shared memory.
# A block may take 96 KiB of it: all devices since sm_80 have 99 KiB, of which a kernel must request more than 48.
WARPS, MOST_CHOICES, SHARED_FLOATS = 4, 32, 24000


def _has_kernel(scores: Tensor, k: int) -> bool:
    return k <= MOST_CHOICES and scores.shape[1] <= SHARED_FLOATS and available(scores.device)


@torch.library.custom_op("turnout::route", mutates_args=())
def _route(
    logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_kernel(logits, k):
        return plain(logits, bias, k, sigmoid, normalize)
    (T, E), logits = logits.shape, logits.contiguous()
    expert = logits.new_empty(T, k, dtype=torch.int64)
    weight, scores = logits.new_empty(T, k), logits.new_empty(T, E)
    warps = min(WARPS, SHARED_FLOATS // E)
    args = logits, None if bias is None else bias.contiguous(), expert, weight, scores, T, E, k, sigmoid, normalize
    launch("route", (-(-T // warps),), (32 * warps,), args, 4 * warps * E)
    return weight, scores, expert


@torch.library.custom_op("turnout::route_backward", mutates_args=())
def _route_backward(
    grad_weight: Tensor | None,
    grad_scores: Tensor | None,
    expert: Tensor,
    scores: Tensor,
    sigmoid: bool,
    normalize: bool,
) -> Tensor:
    (T, E), k = scores.shape, expert.shape[1]
    if not _has_kernel(scores, k):
        return plain_backward(grad_weight, grad_scores, expert, scores, sigmoid, normalize)
    grad_logits = scores.new_empty(T, E)
    args = grad_weight, grad_scores, expert, scores, grad_logits, T, E, k, sigmoid, normalize
    launch("route_backward", (-(-T // WARPS),), (32 * WARPS,), args)
    return grad_logits


@_route.register_fake
def _(logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[0], k
    return logits.new_empty(shape), logits.new_empty(logits.shape), logits.new_empty(shape, dtype=torch.int64)


@_route_backward.register_fake
def _(grad_weight, grad_scores, expert, scores, sigmoid, normalize) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, scores, expert = output
    ctx.sigmoid, ctx.normalize = inputs[3:]
    ctx.save_for_backward(expert, scores)
    ctx.set_materialize_grads(False)  # without a balance loss, scores have no gradient: make no zeros [T, E]


def _backward(ctx, grad_weight: Tensor | None, grad_scores: Tensor | None, _):
    to_weight, to_scores = (None if grad is None else grad.contiguous() for grad in (grad_weight, grad_scores))
    step = plain_backward if torch.is_grad_enabled() else _route_backward  # create_graph=True needs a derivative of it
    expert, scores = ctx.saved_tensors
    return step(to_weight, to_scores, expert, scores, ctx.sigmoid, ctx.normalize), None, None, None, None


_route.register_autograd(_backward, setup_context=_setup_context)
