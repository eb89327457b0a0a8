"""What the layer computes, written slowly and plainly: loops over tokens and choices, in float64.

Nothing of the package is imported here. Everything is differentiable through autograd. Tests compare
with `close`, and show for each tolerance that a wrong result would not pass.
"""

import math
from fractions import Fraction

import torch


def close(actual, expected, tol):
    """Whether the largest difference is at most `tol` of the largest value expected. NaN is never close."""
    if actual.shape != expected.shape:
        return False
    if expected.numel() == 0:
        return True
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = max(float(expected.abs().max()), 1e-3)
    return float((actual - expected).abs().max()) <= tol * scale


def _stack(rows, width, like):
    return torch.stack(rows) if rows else like.new_zeros(0, width)


def route_topk(x, gate_weight, k, normalize=None, order="softmax_first"):
    """Tokens x [T, D] -> expert int64 [T, k], weight [T, k], scores [T, E], logits [T, E]."""
    E = len(gate_weight)
    normalize = k > 1 if normalize is None else normalize
    experts, weights, scores, logits = [], [], [], []
    for token in x:
        logit = torch.stack([(token * router).sum() for router in gate_weight])
        power = (logit - logit.detach().max()).exp()
        score = power / power.sum()
        best = sorted(range(E), key=lambda e: (-float(logit.detach()[e]), e))[:k]
        chosen = torch.stack([score[e] for e in best])
        if order == "choose_first":
            chosen = torch.stack([power[e] for e in best])
        if normalize or order == "choose_first":
            chosen = chosen / chosen.sum()
        experts.append(best)
        weights.append(chosen)
        scores.append(score)
        logits.append(logit)
    expert = torch.tensor(experts, dtype=torch.int64).reshape(len(x), k)
    return expert, _stack(weights, k, x), _stack(scores, E, x), _stack(logits, E, x)


def _best(logit, k):
    """The k largest, and softmax over those (over all if k is 1)."""
    places = sorted(range(len(logit)), key=lambda e: (-float(logit.detach()[e]), e))[:k]
    power = (logit - logit.detach().max()).exp()
    total = power.sum() if k == 1 else sum(power[e] for e in places)
    return places, [power[e] / total for e in places]


def route_noisy(x, gate_weight, noise_weight, noise, k, floor=1e-2, mask=None):
    """With given noise [T, E] (None: eval) -> expert, weight, scores, importance loss, load loss."""
    E = len(gate_weight)
    experts, weights, scores = [], [], []
    importance, load = [x.new_zeros(()) for _ in range(E)], [x.new_zeros(()) for _ in range(E)]
    for t, token in enumerate(x):
        clean = torch.stack([(token * router).sum() for router in gate_weight])
        scale = torch.stack([(1 + (token * router).sum().exp()).log() + floor for router in noise_weight])
        noisy = clean if noise is None else clean + noise[t] * scale
        places, chosen = _best(noisy, k)
        experts.append(places)
        weights.append(torch.stack(chosen))
        scores.append((clean - clean.detach().max()).exp() / (clean - clean.detach().max()).exp().sum())
        if mask is not None and not bool(mask[t]):
            continue
        for e, weight in zip(places, chosen, strict=True):
            importance[e] = importance[e] + weight
        for e in range(E):
            if noise is None or k == E:
                load[e] = load[e] + (1 if e in places else 0)
            else:
                others = sorted((i for i in range(E) if i != e), key=lambda i: -float(noisy.detach()[i]))
                rival = noisy[others[k - 1]]
                load[e] = load[e] + (1 + torch.erf((clean[e] - rival) / scale[e] / math.sqrt(2))) / 2
    expert = torch.tensor(experts, dtype=torch.int64).reshape(len(x), k)
    return expert, _stack(weights, k, x), _stack(scores, E, x), cv_squared(importance), cv_squared(load)


def cv_squared(amounts):
    """Variance over mean^2, 0 where all are 0."""
    mean = sum(amounts) / len(amounts)
    variance = sum((a - mean) ** 2 for a in amounts) / len(amounts)
    return variance / mean**2 if float(mean.detach()) else variance


def route_hierarchical(x, group_weight, gate_weight, top_groups, each):
    """-> expert [T, top_groups * each], heaviest first, weight, scores [T, E]."""
    groups, E = len(group_weight), len(gate_weight)
    size = E // groups
    experts, weights, scores = [], [], []
    for token in x:
        outer = torch.stack([(token * router).sum() for router in group_weight])
        pairs, score = [], []
        inner = [torch.stack([(token * gate_weight[g * size + i]).sum() for i in range(size)]) for g in range(groups)]
        for g, share in zip(*_best(outer, top_groups), strict=True):
            for i, weight in zip(*_best(inner[g], each), strict=True):
                pairs.append((g * size + i, share * weight))
        for g in range(groups):
            score += [
                outer.exp()[g] / outer.exp().sum() * inner[g].exp()[i] / inner[g].exp().sum() for i in range(size)
            ]
        pairs.sort(key=lambda pair: -float(pair[1].detach()))
        experts.append([e for e, _ in pairs])
        weights.append(torch.stack([w for _, w in pairs]))
        scores.append(torch.stack(score))
    k = top_groups * each
    expert = torch.tensor(experts, dtype=torch.int64).reshape(len(x), k)
    return expert, _stack(weights, k, x), _stack(scores, E, x)


def capacity_limit(cf, k, T, E, least=1):
    """ceil(cf * k * T / E), exactly, at least so much where there are tokens."""
    if T == 0:
        return 0
    return max(least, math.ceil(Fraction(str(cf)) * k * T / E))


def drop(expert, weight, limit, policy, scores=None):
    """expert [T, k] with -1 for those an expert turns away, and the weights, 0 for those. "priority" wants scores."""
    T, k = expert.shape
    order = [(t, j) for j in range(k) for t in range(T)]  # all first choices before any second one
    if policy == "score":
        order.sort(key=lambda place: -float(weight.detach()[place]))  # stable: ties stay in the order of position
    elif policy == "priority":  # tokens by their best score, still all first choices before any second one
        order.sort(key=lambda place: (place[1], -max(float(score) for score in scores[place[0]].detach())))
    kept, taken = torch.zeros(T, k, dtype=torch.bool), {}
    for t, j in order:
        e = int(expert[t, j])
        if e >= 0 and taken.get(e, 0) < limit:
            taken[e] = taken.get(e, 0) + 1
            kept[t, j] = True
    return torch.where(kept, expert, -1), torch.where(kept, weight, 0.0)


def _gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_tanh(x):
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _relu(x):
    return torch.where(x > 0, x, 0.0)


def _silu(x, slope=1.0):
    return x / (1 + (-slope * x).exp())


def _clamped(x, low, high):
    return torch.where(x < low, low, torch.where(x > high, high, x))


ACTIVATIONS = {  # up, gate -> hidden
    "gelu": lambda up, _: _gelu(up),
    "gelu_tanh": lambda up, _: _gelu_tanh(up),
    "relu": lambda up, _: _relu(up),
    "relu2": lambda up, _: _relu(up) ** 2,
    "swiglu": lambda up, gate: _silu(gate) * up,
    "geglu": lambda up, gate: _gelu(gate) * up,
    "geglu_tanh": lambda up, gate: _gelu_tanh(gate) * up,
    "reglu": lambda up, gate: _relu(gate) * up,
    "clamped_swiglu": lambda up, gate: _silu(_clamped(gate, -math.inf, 7.0), 1.702) * (_clamped(up, -7.0, 7.0) + 1),
}


def expert_ffn(x, tensors, e, activation):
    """One token x [D] through expert e -> [D]."""

    def linear(name, v):
        y = (v.unsqueeze(1) * tensors[f"w_{name}"][e]).sum(0)
        return y + tensors[f"b_{name}"][e] if tensors.get(f"b_{name}") is not None else y

    gate = linear("gate", x) if "w_gate" in tensors else None
    hidden = ACTIVATIONS[activation](linear("up", x), gate)
    return linear("down", hidden)


def moe(
    x,
    gate_weight,
    tensors,
    activation,
    k,
    capacity_factor=None,
    policy="score",
    shards=None,
    normalize=None,
    order="softmax_first",
    mask=None,
    min_capacity=1,
):
    """x [T, D] -> y [T, D]. Capacity holds for each shard: `shards` are the token counts of the ranks.

    Padding (`mask` False) goes nowhere, and counts as a token where capacity is made from T.
    """
    expert, weight, scores, _ = route_topk(x, gate_weight, k, normalize, order)
    if mask is not None:
        expert = torch.where(mask.unsqueeze(1), expert, -1)
        weight = torch.where(mask.unsqueeze(1), weight, 0.0)
    if capacity_factor is not None:
        parts, first = [], 0
        for T in [len(x)] if shards is None else shards:
            limit, shard = (
                capacity_limit(capacity_factor, k, T, len(gate_weight), min_capacity),
                slice(first, first + T),
            )
            parts.append(drop(expert[shard], weight[shard], limit, policy, scores[shard]))
            first += T
        assert first == len(x), "shards must cover the tokens"
        expert, weight = torch.cat([e for e, _ in parts]), torch.cat([w for _, w in parts])
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for j in range(k):
            e = int(expert[t, j])
            if e >= 0:
                y = y + weight[t, j] * expert_ffn(x[t], tensors, e, activation)
        rows.append(y)
    return _stack(rows, x.shape[1], x)


def balance_loss(scores, expert, E, mask=None, choices=None):
    """E * sum over e of f_e * P_e, f from so many of a token's choices."""
    tokens = [t for t in range(len(scores)) if mask is None or bool(mask[t])]
    chosen = [int(e) for t in tokens for e in expert[t][:choices] if int(e) >= 0]
    total = scores.sum() * 0
    for e in range(E):
        f = chosen.count(e) / max(len(chosen), 1)
        P = sum((scores[t, e] / scores[t].sum() for t in tokens), scores.new_zeros(())) / max(len(tokens), 1)
        total = total + E * f * P
    return total


def balance_loss_sequence(scores, expert, E, sequences, mask=None, choices=None):
    """The mean of `balance_loss` over the sequences that have a token."""
    S = len(scores) // max(sequences, 1)
    terms = []
    for s in range(sequences):
        part = slice(s * S, (s + 1) * S)
        if S and (mask is None or bool(mask[part].any())):
            terms.append(balance_loss(scores[part], expert[part], E, None if mask is None else mask[part], choices))
    return sum(terms, scores.sum() * 0) / max(len(terms), 1)


def balance_loss_documents(scores, expert, E, documents, mask=None):
    """The sum of `balance_loss` over documents by their share of all tokens; `documents`: of each token."""
    total = scores.sum() * 0
    for document in set(documents):
        own = [t for t in range(len(scores)) if documents[t] == document and (mask is None or bool(mask[t]))]
        total = total + len(own) * balance_loss(scores[own], expert[own], E) if own else total
    return total / max(len(scores), 1)


def z_loss(logits, mask=None):
    """Mean over tokens of log(sum of exp(logits)) squared."""
    tokens = [t for t in range(len(logits)) if mask is None or bool(mask[t])]
    total = logits.sum() * 0
    for t in tokens:
        top = logits[t].detach().max()
        total = total + (top + (logits[t] - top).exp().sum().log()) ** 2
    return total / max(len(tokens), 1)


def load_stats(chosen, kept, E):
    """The figures of `Stats`, by name, from lists of expert ids."""
    before = [int(e) for e in chosen.flatten() if int(e) >= 0]
    after = [int(e) for e in kept.flatten() if int(e) >= 0]
    counts = [before.count(e) for e in range(E)]
    total = max(len(before), 1)
    shares = [c / total for c in counts]
    return {
        "tokens_per_expert": counts,
        "dropped": (len(before) - len(after)) / total,
        "entropy": -sum(p * math.log(p) for p in shares if p) / math.log(max(E, 2)),
        "imbalance": max(shares) * E,
    }


def turned(vector, position, base=10_000.0):
    """Rotary positions: pair (i, i + size / 2) as a complex number, turned by position * base^(-2 i / size)."""
    half = len(vector) // 2
    pairs = torch.complex(vector[:half], vector[half:])
    angles = [position * base ** (-2 * i / len(vector)) for i in range(half)]
    pairs = pairs * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
    return torch.cat([pairs.real, pairs.imag])


def attention(x, memory, weights, heads, kv_heads, allowed=None, bias=None, rotary=False):
    """x [S, D] reads memory [M, D] -> [S, D]; weights: query, key, value, out as [out, in] matrices.

    `allowed(i, j)`: whether query i may attend to key j. `bias(h, i, j)`: what is added to their score.
    """
    q, k, v = x @ weights["query"].T, memory @ weights["key"].T, memory @ weights["value"].T
    size = q.shape[1] // heads
    rows = []
    for i in range(len(x)):
        parts = []
        for h in range(heads):
            of = slice((h * kv_heads // heads) * size, (h * kv_heads // heads + 1) * size)
            query, score = q[i, h * size : (h + 1) * size], {}
            for j in range(len(memory)):
                if allowed is None or allowed(i, j):
                    key = k[j, of]
                    a, b = (turned(query, i), turned(key, j)) if rotary else (query, key)
                    score[j] = (a * b).sum() / math.sqrt(size) + (0 if bias is None else bias(h, i, j))
            total = sum(s.exp() for s in score.values())
            parts.append(sum(s.exp() / total * v[j, of] for j, s in score.items()))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ weights["out"].T
