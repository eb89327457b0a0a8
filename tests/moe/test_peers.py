"""The layers of docs/guides/migration.md, with converted weights, against other libraries' rules from their formulas.

The rules are loops in float64 that import nothing of the package; the layers, gates and converters are the page's own.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from reference import close
from routed import drawn, same
from test_readme import blocks
from turnout.moe import Capacity, MoE, aux_loss
from turnout.moe.capacity import capacity_limit

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "migration.md"
T, D, H, E = 14, 16, 32, 4


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's blocks define."""
    namespace: dict[str, Any] = {"__name__": PAGE.stem}
    with torch.random.fork_rng():
        for code in blocks(PAGE, "python"):
            exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def best(values, k):
    """Places of the k largest."""
    return sorted(range(len(values)), key=lambda e: -float(values[e].detach()))[:k]


def counted(choices, tokens):
    """How often each expert is among the choices, per token."""
    return [sum(e == chosen for chosen in choices) / tokens for e in range(E)]


def uneven(scores, share):
    """E * sum over e of share_e times the mean score of e."""
    return E * sum(share[e] * scores[:, e].mean() for e in range(E))


def in_order(choices, rows):
    """Those of the pairs (token, expert) that find room with their expert, `rows` each, first come first served."""
    taken, kept = dict.fromkeys(range(E), 0), []
    for t, e in choices:
        if taken[e] < rows:
            taken[e] += 1
            kept.append((t, e))
    return kept


def summed(x, weights, expert):
    """y [T, D] of weights {(token, expert): weight}."""
    y = [torch.zeros_like(token) for token in x]
    for (t, e), weight in weights.items():
        y[t] = y[t] + weight * expert(e, x[t])
    return torch.stack(y)


# Each library: its state dict for one layer, and its rule, x -> y and the auxiliary loss without its coefficient.


def tutel_state():
    return {
        "gates.0.wg.weight": drawn(E, D),
        "_num_global_experts": torch.tensor(E),
        "experts.batched_fc1_w": drawn(E, H, D, seed=1),
        "experts.batched_fc2_w": drawn(E, H, D, seed=2),
        "experts.batched_fc1_bias": drawn(E, H, seed=3),
        "experts.batched_fc2_bias": drawn(E, D, seed=4),
    }


def tutel_rows(factor, k, tokens):
    return k * int(factor * math.ceil(tokens / E))


def tutel(x, s, factor=1.0, by_priority=False):
    def expert(e, token):
        hidden = (s["experts.batched_fc1_w"][e] @ token + s["experts.batched_fc1_bias"][e]).relu()
        return hidden @ s["experts.batched_fc2_w"][e] + s["experts.batched_fc2_bias"][e]

    scores = (x @ s["gates.0.wg.weight"].T).softmax(1)
    chosen = [best(score, 2) for score in scores]
    weight = {(t, e): scores[t, e] / scores[t, places].sum() for t, places in enumerate(chosen) for e in places}
    tokens = sorted(range(len(x)), key=lambda t: -float(scores[t].detach().max())) if by_priority else range(len(x))
    queue = [(t, chosen[t][j]) for j in range(2) for t in tokens]
    kept = in_order(queue, tutel_rows(factor, 2, len(x)))
    assert len(kept) < len(queue), "nothing is dropped: the test would not see the rule"
    y = summed(x, {place: weight[place] for place in kept}, expert)
    return y, uneven(scores, counted([places[0] for places in chosen], len(x)))


def fastmoe_state():
    state = {"gate.gate.weight": drawn(E, D), "gate.gate.bias": drawn(E, seed=9)}
    for e in range(E):
        state |= {
            f"experts.{e}.htoh4.weight": drawn(1, H, D, seed=10 + e),
            f"experts.{e}.htoh4.bias": drawn(1, H, seed=20 + e),
            f"experts.{e}.h4toh.weight": drawn(1, D, H, seed=30 + e),
            f"experts.{e}.h4toh.bias": drawn(1, D, seed=40 + e),
        }
    return state


def fastmoe(x, s):
    def expert(e, token):
        own = {
            name: s[f"experts.{e}.{name}"][0] for name in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias")
        }
        hidden = F.gelu(own["htoh4.weight"] @ token + own["htoh4.bias"])
        return own["h4toh.weight"] @ hidden + own["h4toh.bias"]

    weights = {}
    for t, logit in enumerate(x @ s["gate.gate.weight"].T + s["gate.gate.bias"]):
        places = best(logit, 2)
        weights |= {(t, e): w for e, w in zip(places, logit[places].softmax(0), strict=True)}
    return summed(x, weights, expert), x.new_zeros(())


def megablocks_state():
    return {
        "router.layer.weight": drawn(E, D),
        "experts.mlp.w1": drawn(E * H, D, seed=1),
        "experts.mlp.v1": drawn(E * H, D, seed=2),
        "experts.mlp.w2": drawn(E * H, D, seed=3),
    }


def megablocks(x, s):
    def expert(e, token):
        w1, v1, w2 = (s[f"experts.mlp.{name}"][e * H : (e + 1) * H] for name in ("w1", "v1", "w2"))
        return (F.silu(w1 @ token) * (v1 @ token)) @ w2

    scores, weights, chosen = (x @ s["router.layer.weight"].T).softmax(1), {}, []
    for t, score in enumerate(scores):
        places = best(score, 2)
        chosen += places
        weights |= {(t, e): score[e] / score[places].abs().sum() for e in places}
    # of 2 layers: experts / (layers * tokens * k) times the sum of tokens per expert times mean score
    return summed(x, weights, expert), uneven(scores, counted(chosen, len(x))) / 2 / 2


def deepspeed_state():
    state = {"deepspeed_moe.gate.wg.weight": drawn(E, D)}
    for e in range(E):
        name = f"deepspeed_moe.experts.deepspeed_experts.{e}"
        state |= {
            f"{name}.0.weight": drawn(H, D, seed=10 + e),
            f"{name}.0.bias": drawn(H, seed=20 + e),
            f"{name}.2.weight": drawn(D, H, seed=30 + e),
            f"{name}.2.bias": drawn(D, seed=40 + e),
        }
    return state


def deepspeed(x, s, k=2, least=4):
    def expert(e, token):
        name = f"deepspeed_moe.experts.deepspeed_experts.{e}"
        hidden = F.gelu(s[f"{name}.0.weight"] @ token + s[f"{name}.0.bias"])
        return s[f"{name}.2.weight"] @ hidden + s[f"{name}.2.bias"]

    scores = (x @ s["deepspeed_moe.gate.wg.weight"].T).softmax(1)
    chosen = [best(score, k) for score in scores]
    rows = math.ceil(len(x) / E * k)
    queue = [(t, chosen[t][j]) for j in range(k) for t in range(len(x))]
    if k > 2:
        queue.sort(key=lambda place: -float(scores.detach()[place]))
    kept = in_order(queue, max(rows, least))
    assert kept != in_order(queue, min(rows, least)), "the test would not see the rule"
    weights = {}
    for t, e in kept:
        weights[t, e] = scores[t, e] / sum(scores[u, f] for u, f in kept if u == t)
    counting = [e for places in chosen for e in (places if k > 2 else places[:1])]
    return summed(x, weights, expert), uneven(scores, counted(counting, len(x))) * len(x) / len(counting)


def megatron_state(bias=False):
    state = {"router.weight": drawn(E, D)} | ({"router.expert_bias": 0.3 * drawn(E, seed=5).float()} if bias else {})
    for e in range(E):
        state[f"experts.linear_fc1.weight{e}"] = drawn(2 * H, D, seed=10 + e)
        state[f"experts.linear_fc2.weight{e}"] = drawn(D, H, seed=20 + e)
    return state


def megatron_expert(s):
    def run(e, token):
        gate, up = (s[f"experts.linear_fc1.weight{e}"] @ token).chunk(2)
        return s[f"experts.linear_fc2.weight{e}"] @ (F.silu(gate) * up)

    return run


def megatron(x, s):
    logits = x @ s["router.weight"].T
    chosen, weight = [], {}
    for t, logit in enumerate(logits):
        places = best(logit, 2)
        chosen += places
        weight |= {(t, e): w for e, w in zip(places, logit[places].softmax(0), strict=True)}
    queue = sorted(weight, key=lambda place: -float(weight[place].detach()))
    kept = in_order(queue, math.ceil(len(x) * 2 / E * 1.0))
    assert len(kept) < len(queue), "nothing is dropped: the test would not see the rule"
    y = summed(x, {place: weight[place] for place in kept}, megatron_expert(s))
    return y, uneven(logits.softmax(1), counted(chosen, len(x))) / 2


def deepseek(x, s):
    """Sigmoid, a bias on the choice, one group of two, factor 2.5."""
    weights = {}
    for t, score in enumerate((x @ s["router.weight"].T).sigmoid()):
        biased = (score + s["router.expert_bias"]).tolist()
        group = max(range(2), key=lambda g: sum(biased[2 * g : 2 * g + 2]))
        places = [2 * group, 2 * group + 1]
        weights |= {(t, e): 2.5 * score[e] / score[places].sum() for e in places}
    return summed(x, weights, megatron_expert(s)), x.new_zeros(())


def mixtral_state():
    return {
        "gate.weight": drawn(E, D),
        "experts.gate_up_proj": drawn(E, 2 * H, D, seed=1),
        "experts.down_proj": drawn(E, D, H, seed=2),
    }


def mixtral(x, s):
    def expert(e, token):
        gate, up = (s["experts.gate_up_proj"][e] @ token).chunk(2)
        return s["experts.down_proj"][e] @ (F.silu(gate) * up)

    scores = (x @ s["gate.weight"].T).softmax(1)
    chosen = [best(score, 2) for score in scores]
    weights = {(t, e): scores[t, e] / scores[t, places].sum() for t, places in enumerate(chosen) for e in places}
    loss = uneven(scores, counted([e for places in chosen for e in places], len(x)))
    return summed(x, weights, expert), loss


class Peer(NamedTuple):
    layer: str
    state: dict[str, torch.Tensor]
    rule: Callable
    coefficient: float
    convert: str
    more: tuple = (E,)
    rows: int | None = None  # an expert takes, where the page's factor gives another number
    policy: str | None = None  # who is dropped, where a rule has several


PEERS = [
    Peer("tutel", tutel_state(), tutel, 0.01, "from_tutel", (), tutel_rows(1.0, 2, T), "position"),
    Peer("tutel", tutel_state(), partial(tutel, factor=0.5, by_priority=True), 0.01, "from_tutel", (), 4, "priority"),
    Peer("fastmoe", fastmoe_state(), fastmoe, 0.0, "from_fastmoe"),
    Peer("megablocks", megablocks_state(), megablocks, 0.1, "from_megablocks"),
    Peer("deepspeed", deepspeed_state(), deepspeed, 0.01, "from_deepspeed"),
    Peer("megatron", megatron_state(), megatron, 0.01, "from_megatron"),
    Peer("deepseek", megatron_state(bias=True), deepseek, 0.0, "from_megatron"),
    Peer("huggingface", mixtral_state(), mixtral, 1e-3, "from_mixtral", ()),
]


def holds(layer, state, rule, coefficient, x):
    """Whether output and loss of a layer are those of a rule, and their gradients in x."""
    x = x.requires_grad_()
    y, loss = rule(x, state)
    ours = layer(x)
    whole = torch.cat([ours.flatten(), (100 * aux_loss(layer)).reshape(1)])
    wanted = torch.cat([y.flatten(), (100 * coefficient * loss).reshape(1)])
    return close(ours, y, 1e-10) and same(whole, wanted, [x], 1e-9)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.layer)
def test_the_mapping_computes_what_the_other_library_does(page, peer):
    layer = page[peer.layer].double().train()
    theirs = {f"blocks.3.moe.{name}": t for name, t in peer.state.items()} | {"head.weight": drawn(2, 2)}
    layer.load_state_dict(page[peer.convert](page["under"](theirs, "blocks.3.moe."), *peer.more))
    if peer.rows is not None:
        assert peer.rows != capacity_limit(1.0, 2, T, E)
        layer.capacity = Capacity(page["factor_for"](peer.rows, 2, T, E), drop=peer.policy)
    assert holds(layer, peer.state, peer.rule, peer.coefficient, drawn(T, D, seed=8))
    with torch.no_grad():
        layer.experts.get_parameter("w_down" if peer.layer != "deepspeed" else "module.2.weight")[1] *= 1.001
    assert not holds(layer, peer.state, peer.rule, peer.coefficient, drawn(T, D, seed=8)), "a wrong weight passes"


@pytest.mark.parametrize(("k", "tokens"), [(3, T), (2, 6)])  # 6: the least capacity
def test_deepspeed_drops_by_score_beyond_two_and_keeps_a_least_capacity(page, k, tokens):
    gate = page["DeepSpeedGate"](D, E, top_k=k)
    layer = MoE(D, H, E, gate=gate, experts=page["expert"]).double()
    state = deepspeed_state()
    layer.load_state_dict(page["from_deepspeed"](state, E))
    assert holds(layer, state, partial(deepspeed, k=k), 0.01, drawn(tokens, D, seed=8))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("experts", [4, 6, 64])
def test_factor_for_gives_any_rule_its_rows(page, k, experts):
    for tokens in (1, 7, 100, 4095):
        for rows in {1, 2, tokens // 3 + 1, tokens}:
            assert capacity_limit(page["factor_for"](rows, k, tokens, experts), k, tokens, experts) == rows


@pytest.mark.parametrize("policy", ["position", "score", "priority"])
def test_with_one_choice_position_is_megablocks_order_and_score_is_batch_priority_too(policy):
    layer, x = MoE(D, H, E, top_k=1, capacity=Capacity(1.0, drop=policy)).double(), drawn(T, D, seed=8)
    layer.load_state_dict(layer.state_dict() | {"gate.weight": drawn(E, D)})
    scores = (x @ drawn(E, D).T).softmax(1)
    order = range(T) if policy == "position" else sorted(range(T), key=lambda t: -float(scores[t].max()))
    kept = in_order([(t, best(scores[t], 1)[0]) for t in order], capacity_limit(1.0, 1, T, E))
    assert 0 < len(kept) < T
    assert layer(x).any(1).nonzero().flatten().tolist() == sorted(t for t, _ in kept)  # of others nothing comes back
