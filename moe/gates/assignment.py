"""Even assignments of tokens to experts: of the largest score, and the soft one of Sinkhorn's iteration."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

GRID, FAR = 2**40, 2**61  # scores become integers up to GRID, so that all sums are exact and far below FAR


def assign(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """One expert a token, equally many tokens an expert, the largest sum of scores: [T, E] -> int64 [T].

    Loads are T / E, rounded up or down. Where `mask`, bool [T], is False, a token gets -1 and takes no place. Exact for
    scores rounded to 2^-40 of their range; NaN counts as the least. Computed by the host: on any other device it waits.

    A token goes where score - price is highest. Whatever the prices, no assignment of these loads has a larger sum;
    those of Sinkhorn's iteration make the loads nearly even. Then tokens move, one at a time along a shortest path from
    an expert that has too many to one that has too few, which leaves the sum the largest for its loads (successive
    shortest paths: Ahuja, Magnanti and Orlin 1993, Network Flows, section 9.7). It ends when no expert has too many.

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
    """Logits [T, E] -> logarithm of the plan [T, E], up to a constant: columns sum to 1, rows nearly to E / T.

    Rows and columns of -inf alone stay as they are.
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
    """Scores [T, E] -> integers [T, E] from 0 to GRID."""
    scores = scores.double() / 2  # the largest minus the least is finite then
    finite = scores[scores.isfinite()]
    if not len(finite):
        return torch.zeros_like(scores, dtype=torch.int64)
    low, high = (float(each) for each in finite.aminmax())
    scores = scores.nan_to_num(low, high, low)
    return ((scores - low) / max(high - low, torch.finfo(scores.dtype).tiny) * GRID).round().long()


def _assigned(value: Tensor) -> Tensor:
    """Integers [T, E] -> expert int64 [T]."""
    (T, E), price = value.shape, _prices(value)
    expert = (value - price).argmax(1)
    seats = -(-T // E)  # an expert's; E * seats - T stay free, at most one of an expert, at first where it costs least
    free = torch.zeros_like(price, dtype=torch.bool)
    free[price.argsort()[: E * seats - T]] = True
    over = torch.bincount(expert, minlength=E) + free - seats
    loss, token = (torch.stack(each) for each in zip(*(_moves(value, expert, e) for e in range(E)), strict=True))
    while (over > 0).any():  # each time one token fewer
        passed = free.unsqueeze(1) & ~free & (loss > 0)  # a free seat goes from e to f for nothing
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
    """Of each expert, int64 [E]: with them nearly equally many tokens gain most from each."""
    if not len(value):
        return value.new_zeros(value.shape[1])
    plan, sharpness = value / GRID * 8, 8
    for _ in range(3):  # the sharper, the more even, and the slower without a start that is nearly even
        plan, sharpness = sinkhorn(4 * plan, iterations=8), 4 * sharpness
    return value[0] - (plan[0] / sharpness * GRID).long()  # the same from every row, up to a constant


def _moves(value: Tensor, expert: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """Of the tokens of expert e: the least loss in moving one to each expert, and which, int64 [E] both."""
    mine = (expert == e).nonzero().squeeze(1)
    if not len(mine):
        return value.new_full(value.shape[1:], FAR), value.new_full(value.shape[1:], -1)
    loss, place = (value[mine, e : e + 1] - value[mine]).min(0)
    return loss, mine[place]


def _path(loss: Tensor, over: Tensor) -> list[int]:
    """Experts on the way of least loss from one that has too many to one that has too few (Bellman and Ford)."""
    distance, before = torch.where(over > 0, 0, FAR), torch.arange(len(over), device=over.device)
    while True:
        through, last = (distance.unsqueeze(1) + loss).min(0)
        nearer = through < distance
        if not nearer.any():
            break
        distance, before = torch.where(nearer, through, distance), torch.where(nearer, last, before)
    path = [int(torch.where(over < 0, distance, FAR).argmin())]
    while (e := int(before[path[-1]])) != path[-1]:
        path.append(e)
    return path[::-1]
