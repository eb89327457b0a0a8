"""More gates, written as `reference` is: slowly, in float64, importing nothing of the package."""

import torch
from reference import _stack


def route_sigmoid(x, gate_weight, bias, k, normalize=True, scale=1.0, groups=1, top_groups=1):
    """-> expert, weight, scores. Groups by the sum of their best k / top_groups biased scores."""
    E = len(gate_weight)
    size, experts, weights, scores = E // groups, [], [], []
    for token in x:
        score = torch.stack([1 / (1 + (-(token * router).sum()).exp()) for router in gate_weight])
        biased = [float(score.detach()[e] + bias[e]) for e in range(E)]
        value = [
            sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[: max(k // top_groups, 1)])
            for g in range(groups)
        ]
        allowed = sorted(range(groups), key=lambda g: -value[g])[:top_groups]
        best = sorted((e for e in range(E) if e // size in allowed), key=lambda e: -biased[e])[:k]
        chosen = torch.stack([score[e] for e in best])
        experts.append(best)
        weights.append(scale * (chosen / chosen.sum() if normalize else chosen))
        scores.append(score)
    expert = torch.tensor(experts, dtype=torch.int64).reshape(len(x), k)
    return expert, _stack(weights, k, x), _stack(scores, E, x)


def route_softmax_in_groups(x, gate_weight, k, normalize, groups, top_groups):
    """-> expert, weight, scores. Groups by their best score."""
    E = len(gate_weight)
    experts, weights, scores = [], [], []
    for token in x:
        power = torch.stack([(token * router).sum() for router in gate_weight]).exp()
        score = power / power.sum()
        of_group = [max(float(score[e].detach()) for e in range(E) if e * groups // E == g) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -of_group[g])[:top_groups]
        best = sorted((e for e in range(E) if e * groups // E in allowed), key=lambda e: -float(score[e].detach()))[:k]
        chosen = torch.stack([score[e] for e in best])
        experts.append(best)
        weights.append(chosen / chosen.sum() if normalize else chosen)
        scores.append(score)
    expert = torch.tensor(experts, dtype=torch.int64).reshape(len(x), k)
    return expert, _stack(weights, k, x), _stack(scores, E, x)


def choose_tokens(scores, limit, mask=None):
    """Scores [T, E] -> the set of pairs (token, expert) in which each expert has its `limit` best tokens."""
    real = [t for t in range(len(scores)) if mask is None or bool(mask[t])]
    pairs = set()
    for e in range(scores.shape[1]):
        pairs |= {(t, e) for t in sorted(real, key=lambda t: -float(scores[t, e]))[:limit]}
    return pairs


def sinkhorn(logits, iterations, mask=None):
    """The plan [T, E]: rows and columns of exp(logits) scaled to 1 in turn, columns over the real tokens."""
    plan = logits.exp().clone()
    T, E = plan.shape
    for _ in range(iterations):
        for t in range(T):
            plan[t] = plan[t] / plan[t].sum()
        for e in range(E):
            plan[:, e] = plan[:, e] / sum(plan[t, e] for t in range(T) if mask is None or bool(mask[t]))
    return plan


def free_expert(kind, x, vector=None, mix=None):
    """One token x [D] through a zero-computation expert."""
    if kind == "null":
        return 0 * x
    if kind == "identity":
        return x
    power = [(row * x).sum().exp() for row in mix]
    return (power[0] * x + power[1] * vector) / (power[0] + power[1])


def best_even(scores):
    """The largest sum of scores [T, E] of any assignment whose loads are T / E rounded up or down; all are tried."""
    T, E = scores.shape
    sums = {(0,) * E: 0.0}  # by loads so far
    for t in range(T):
        longer = {}
        for loads, total in sums.items():
            for e in range(E):
                key = (*loads[:e], loads[e] + 1, *loads[e + 1 :])
                longer[key] = max(longer.get(key, -float("inf")), total + float(scores[t, e]))
        sums = longer
    return max(total for loads, total in sums.items() if min(loads) >= T // E and max(loads) <= -(-T // E))


def residual(x, routed, branch, weight, bias):
    """One token: softmax(weight x + bias) mixes what its experts and what a dense branch made of it."""
    power = [((row * x).sum() + b).exp() for row, b in zip(weight, bias, strict=True)]
    return (power[0] * routed + power[1] * branch) / (power[0] + power[1])
