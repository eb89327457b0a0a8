"""What `Swin` computes, written slowly and plainly in float64: every token beside every other of its image.

Nothing of the package is imported here. Parameters come as the model's `state_dict`.
"""

import math
from fractions import Fraction

import torch


def _linear(x, state, name):
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def _norm(x, state, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if name is None else y * state[f"{name}.weight"] + state[f"{name}.bias"]


def _part(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _spaced(offset, side):
    offset = 8 * offset / (side - 1) if side > 1 else 8.0 * offset
    return math.copysign(math.log(1 + abs(offset), 8), offset)


def attention(x, state, heads, window, shifted, pretrained=0):
    """x [B, height, width, D]: a token sees those of its window that are less than a window away."""
    _, height, width, dim = x.shape
    size = dim // heads
    sides = [min(window, height), min(window, width)]
    shift = [s // 2 if shifted and s < side else 0 for s, side in zip(sides, (height, width), strict=True)]
    places = [(row, column) for row in range(height) for column in range(width)]

    def home(place):
        return [(p - by) % side // s for p, by, side, s in zip(place, shift, (height, width), sides, strict=True)]

    def bias(query, key):
        by = [_spaced(q - k, pretrained or s) for q, k, s in zip(query, key, sides, strict=True)]
        hidden = _linear(torch.tensor(by, dtype=x.dtype), state, "position_bias.up").clamp(min=0)
        return 16 / (1 + (-_linear(hidden, state, "position_bias.down")).exp())  # [heads]

    q, k, v = (_linear(x, state, name).flatten(1, 2).unflatten(-1, (heads, size)) for name in ("query", "key", "value"))
    scale = state["log_scale"].exp().clamp(max=100)
    rows = []
    for i, here in enumerate(places):
        near = [
            j
            for j, there in enumerate(places)
            if home(there) == home(here) and all(abs(a - b) < s for a, b, s in zip(here, there, sides, strict=True))
        ]
        scores = []
        for j in near:
            cosine = (q[:, i] * k[:, j]).sum(-1) / (q[:, i].norm(dim=-1) * k[:, j].norm(dim=-1))
            scores.append(cosine * scale + bias(here, places[j]))
        share = torch.stack(scores).softmax(0)  # [near, B, heads]
        rows.append((share[..., None] * torch.stack([v[:, j] for j in near])).sum(0).flatten(1))
    return _linear(torch.stack(rows, 1), state, "out").unflatten(1, (height, width))


def experts(x, state, config):
    """Tokens x [T, D] of the whole batch, routed by cosines, the most certain first -> [T, D]."""
    T, (E, k) = len(x), (config.num_experts, config.top_k)
    token = x @ state["gate.projection"].T
    token = token / token.norm(dim=-1, keepdim=True)
    router = state["gate.weight"] / state["gate.weight"].norm(dim=-1, keepdim=True)
    score = (token @ router.T / state["gate.temperature"].clamp(min=0.01)).softmax(-1)
    factor = getattr(config.capacity, "factor", config.capacity)
    room = [T if factor is None else math.ceil(Fraction(str(factor)) * k * T / E)] * E
    best = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    out = [torch.zeros_like(x[0]) for _ in range(T)]
    certain = sorted(range(T), key=lambda t: -float(score[t].max()))
    for choice in range(k):
        for t in certain:
            e = int(best[t, choice])
            if not room[e]:
                continue
            room[e] -= 1
            weight = score[t, e] / (score[t, best[t]].sum() if k > 1 else 1)
            hidden = _gelu(x[t] @ state["experts.w_up"][e] + state["experts.b_up"][e])
            y = hidden @ state["experts.w_down"][e] + state["experts.b_down"][e]
            out[t] = out[t] + weight * _norm(y, state, None, config.norm_eps)
    return torch.stack(out)


def swin(images, state, config):
    """Images [B, C, height, width] -> logits [B, classes]."""
    p = config.patch
    height, width = (side // p for side in images.shape[2:])
    patches = [
        images[:, :, p * row : p * row + p, p * column : p * column + p].flatten(1)
        for row in range(height)
        for column in range(width)
    ]
    x = _norm(_linear(torch.stack(patches, 1), state, "embed"), state, "embed_norm", 1e-5)
    x = x.unflatten(1, (height, width))
    for stage, depth in enumerate(config.depths):
        if stage:
            four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            here = _part(state, f"stages.{stage}.merge")
            x = _norm(_linear(torch.cat(four, -1), here, "reduce"), here, "norm", 1e-5)
        for index in range(depth):
            here = _part(state, f"stages.{stage}.blocks.{index}")
            pretrained = (config.pretrained_windows or [0] * len(config.depths))[stage]
            inside = _part(here, "attention")
            y = attention(x, inside, config.heads[stage], config.window, index % 2 == 1, pretrained)
            x = x + _norm(y, here, "attention_norm", config.norm_eps)
            inside = _part(here, "feed_forward")
            if "gate.projection" in inside:
                y = experts(x.flatten(0, 2), inside, config).view_as(x)
                x = x + y * here["feed_forward_norm.weight"] + here["feed_forward_norm.bias"]
            else:
                y = _linear(_gelu(_linear(x, inside, "up")), inside, "down")
                x = x + _norm(y, here, "feed_forward_norm", config.norm_eps)
    return _linear(_norm(x, state, "norm", config.norm_eps).mean((1, 2)), state, "head")
