"""Balanced assignments of tokens to experts: the exact one with the largest score, and Sinkhorn's soft one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# Scores become integers from 0 to GRID, so that all sums are exact. UNREACHABLE, as a distance, is far above them.
GRID, UNREACHABLE = 2**40, 2**61


def assign(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Assign one expert to each token, with balanced loads and the largest possible sum of scores.

    The CPU computes it, so other devices wait. Each expert gets a price, and each token the expert with the highest
    score - price. For the loads that result, no assignment has a larger sum. Prices come from Sinkhorn's iteration and
    make the loads nearly even. Then tokens move, one step at a time, along a shortest path from an overfull expert to
    one with room. Each step keeps the sum the largest for its loads.

    Args:
        scores: scores [T, E]. They are rounded to 2^-40 of their range. NaN counts as the lowest.
        mask: bool [T], False for tokens that get no expert. None, the default, assigns all.

    Returns:
        Expert ids int64 [T], -1 where `mask` is False. Loads are T / E, rounded up or down.

    References:
        Successive shortest paths: Ahuja, Magnanti and Orlin 1993, Network Flows, section 9.7.

    >>> assign(torch.tensor([[3.0, 1.0], [9.0, 2.0], [5.0, 4.0], [8.0, 0.0]])).tolist()
    [1, 0, 1, 0]
    """
    return _assign(scores.detach(), mask)


@torch.library.custom_op("turnout::assign", mutates_args=())
def _assign(scores: Tensor, mask: Tensor | None) -> Tensor:
    host = scores.cpu()
    real = torch.arange(len(host), device="cpu") if mask is None else mask.cpu().nonzero().squeeze(1)
    expert = torch.full((len(host),), -1, device="cpu")
    expert[real] = _assigned(_on_grid(host[real]))
    return expert.to(scores.device)


@_assign.register_fake
def _(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape[:1], dtype=torch.int64)


def sinkhorn(logits: Tensor, iterations: int, mask: Tensor | None = None) -> Tensor:
    """Sinkhorn's iteration: scale rows and columns of exp(logits) in turn until both have nearly equal sums.

    Args:
        logits: [T, E]. Rows and columns that hold only -inf stay as they are.
        iterations: number of times that rows and columns are scaled.
        mask: bool [T], False for tokens that do not count in column sums. None, the default, counts all.

    Returns:
        Logarithm of the transport plan [T, E], whose columns sum to 1. For T counted tokens, rows sum to nearly E / T.
    """
    outside = None if mask is None else ~mask.unsqueeze(1)
    for _ in range(iterations):
        logits = logits - _log_total(logits, 1)
        real = logits if outside is None else logits.masked_fill(outside, -torch.inf)
        logits = logits - _log_total(real, 0)
    return logits


def _log_total(logits: Tensor, dim: int) -> Tensor:
    total = logits.logsumexp(dim, keepdim=True)
    return total.masked_fill(total.isneginf(), 0)  # -inf less -inf is NaN


def _on_grid(scores: Tensor) -> Tensor:
    """Round scores [T, E] to integers [T, E] from 0 to GRID."""
    scores = scores.double() / 2  # so that the largest minus the smallest cannot overflow
    finite = scores[scores.isfinite()]
    if not len(finite):
        return torch.zeros_like(scores, dtype=torch.int64)
    low, high = (float(each) for each in finite.aminmax())
    scores = scores.nan_to_num(low, high, low)
    return ((scores - low) / max(high - low, torch.finfo(scores.dtype).tiny) * GRID).round().long()


def _assigned(value: Tensor) -> Tensor:
    """The assignment for integer scores: [T, E] -> expert ids int64 [T]."""
    (T, E), price = value.shape, _prices(value)
    expert = (value - price).argmax(1)
    # Each expert has ceil(T / E) seats, and E * seats - T stay free: at most one per expert, cheapest experts first.
    seats = -(-T // E)
    free = torch.zeros_like(price, dtype=torch.bool)
    free[price.argsort()[: E * seats - T]] = True
    over = torch.bincount(expert, minlength=E) + free - seats
    loss, token = (torch.stack(each) for each in zip(*(_moves(value, expert, e) for e in range(E)), strict=True))
    while (over > 0).any():  # each round lowers the excess of one overfull expert by one
        passed = free.unsqueeze(1) & ~free & (loss > 0)  # passing a free seat from e to f costs nothing
        path = _path(torch.where(passed, 0, loss), over)
        for e, f in pairwise(path):
            if passed[e, f]:
                free[e], free[f] = False, True
            else:
                expert[token[e, f]] = f
        over[path[0]] -= 1
        over[path[-1]] += 1
        for e in path:
            loss[e], token[e] = _moves(value, expert, e)
    return expert


def _prices(value: Tensor) -> Tensor:
    """Price of each expert, int64 [E], at which the experts attract nearly equal numbers of tokens."""
    if not len(value):
        return value.new_zeros(value.shape[1])
    plan, sharpness = value / GRID * 8, 8
    for _ in range(3):  # a sharper plan gives more even loads, but converges only from a nearly even start
        plan, sharpness = sinkhorn(4 * plan, iterations=8), 4 * sharpness
    return value[0] - (plan[0] / sharpness * GRID).long()  # any row gives the same prices, up to a constant


def _moves(value: Tensor, expert: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """Cheapest token of expert e to move to each other expert: the loss of score and the token, both int64 [E]."""
    mine = (expert == e).nonzero().squeeze(1)
    if not len(mine):
        return value.new_full(value.shape[1:], UNREACHABLE), value.new_full(value.shape[1:], -1)
    loss, place = (value[mine, e : e + 1] - value[mine]).min(0)
    return loss, mine[place]


def _path(loss: Tensor, over: Tensor) -> list[int]:
    """Experts on the cheapest path from an overfull expert to one with room (Bellman-Ford)."""
    distance, before = torch.where(over > 0, 0, UNREACHABLE), torch.arange(len(over), device=over.device)
    while True:
        through, last = (distance.unsqueeze(1) + loss).min(0)
        nearer = through < distance
        if not nearer.any():
            break
        distance, before = torch.where(nearer, through, distance), torch.where(nearer, last, before)
    path = [int(torch.where(over < 0, distance, UNREACHABLE).argmin())]
    while (e := int(before[path[-1]])) != path[-1]:
        path.append(e)
    return path[::-1]
