"""What properties are tested on: assignments of tokens to experts, ragged and degenerate ones among them."""

import torch
from hypothesis import strategies as st
from turnout.moe import Routing


@st.composite
def assignments(draw, max_tokens=9, max_experts=6, drops=True):
    """(expert int64 [T, k], E): distinct experts for each token, -1 = dropped; T may be 0, k may be E."""
    E = draw(st.integers(1, max_experts))
    k = draw(st.one_of(st.integers(1, E), st.just(E)))
    T = draw(st.integers(0, max_tokens))
    kind = draw(st.sampled_from(["any", "one", "few"]))
    rows = []
    for _ in range(T):
        if kind == "one":  # all to the same ones, the others stay empty
            row = list(range(E))[-k:]
        elif kind == "few":
            row = draw(st.permutations(range(min(E, k + 1))))[:k]
        else:
            row = draw(st.permutations(range(E)))[:k]
        if drops:
            row = [e if draw(st.integers(0, 3)) else -1 for e in row]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(T, k), E


@st.composite
def routings(draw, max_tokens=9, max_experts=6):
    """A `Routing` whose weights tie, and are 0, often."""
    expert, E = draw(assignments(max_tokens, max_experts))
    T, k = expert.shape
    some = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75]) | st.floats(0, 1, width=32)
    weight = torch.tensor([draw(some) for _ in range(T * k)], dtype=torch.float32).reshape(T, k)
    scores = torch.tensor([draw(st.floats(0.125, 1, width=32)) for _ in range(T * E)]).reshape(T, E)
    scores = scores / scores.sum(1, keepdim=True)
    return Routing(expert, torch.where(expert < 0, 0.0, weight), scores, scores.log())
