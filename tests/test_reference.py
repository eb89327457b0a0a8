"""The oracle against numbers worked out on paper: whoever judges must be judged first."""

import math

import pytest
import torch
from reference import (
    balance_loss,
    balance_loss_sequence,
    capacity_limit,
    close,
    drop,
    expert_ffn,
    load_stats,
    moe,
    route_topk,
    z_loss,
)

# One number a token, two experts. The router's logits are (x log 3, 0): scores 3^x / (3^x + 1) and 1 / (3^x + 1).
X = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
ROUTER = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64)
SCORES = [[0.75, 0.25], [0.9, 0.1], [0.25, 0.75]]
# Expert 0 is relu(2 x), expert 1 is 10 relu(-x).
RELU = {"w_up": torch.tensor([[[2.0]], [[-1.0]]]).double(), "w_down": torch.tensor([[[1.0]], [[10.0]]]).double()}


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_routing():
    expert, weight, scores, logits = route_topk(X, ROUTER, 1)
    assert expert.tolist() == [[0], [0], [1]]
    assert close(weight, column(0.75, 0.9, 0.75), 1e-15)
    assert close(scores, torch.tensor(SCORES), 1e-7)
    assert close(logits, torch.cat([X * math.log(3), 0 * X], 1), 1e-15)
    expert, weight, *_ = route_topk(X, ROUTER, 2)
    assert expert.tolist() == [[0, 1], [0, 1], [1, 0]]
    assert close(weight[:, 1:], column(0.25, 0.1, 0.25), 1e-15)
    assert close(route_topk(X, ROUTER, 1, order="choose_first")[1], column(1, 1, 1), 1e-15)
    assert close(route_topk(X, ROUTER, 1, normalize=True)[1], column(1, 1, 1), 1e-15)


@pytest.mark.parametrize(
    ("settings", "y"),
    [
        ({"k": 1}, (1.5, 3.6, 7.5)),  # 0.75 * 2, 0.9 * 4, 0.75 * 10
        ({"k": 2}, (1.5, 3.6, 7.5)),  # the second choices compute 0
        ({"k": 1, "mask": torch.tensor([True, False, True])}, (1.5, 0, 7.5)),
        ({"k": 1, "capacity_factor": 0.1}, (0, 3.6, 7.5)),  # one row each: the higher weight stays
        ({"k": 1, "capacity_factor": 0.1, "policy": "position"}, (1.5, 0, 7.5)),  # the first one stays
        ({"k": 1, "capacity_factor": 0.1, "shards": [1, 2]}, (1.5, 3.6, 7.5)),  # one row each from each shard
        ({"k": 1, "capacity_factor": 0.1, "shards": [0, 2, 1]}, (0, 3.6, 7.5)),
        ({"k": 1, "capacity_factor": 1.0}, (1.5, 3.6, 7.5)),  # ceil(3 / 2) rows
    ],
    ids=str,
)
def test_three_tokens(settings, y):
    assert close(moe(X, ROUTER, RELU, "relu", **settings), column(*y), 1e-14)


def test_experts():
    x, two = torch.tensor([3.0]).double(), torch.full((1, 1, 1), 2.0).double()
    one = {f"b_{name}": torch.ones(1, 1).double() for name in ("up", "gate", "down")}
    weights = {"w_up": two, "w_gate": -two, "w_down": 5 * two}
    for activation, hidden, biased in [
        ("relu", 6, 7),
        ("gelu", 6 * 0.5 * (1 + math.erf(6 / 2**0.5)), 7 * 0.5 * (1 + math.erf(7 / 2**0.5))),
        ("gelu_tanh", *(x / (1 + math.exp(-((8 / math.pi) ** 0.5) * (x + 0.044715 * x**3))) for x in (6, 7))),
        ("swiglu", -6 / (1 + math.exp(6)) * 6, -5 / (1 + math.exp(5)) * 7),
    ]:
        assert expert_ffn(x, weights, 0, activation).item() == pytest.approx(10 * hidden, rel=1e-14)
        assert expert_ffn(x, weights | one, 0, activation).item() == pytest.approx(10 * biased + 1, rel=1e-14)


def test_capacity():
    assert [capacity_limit(1.1, 1, 100, 10), capacity_limit(1, 2, 3, 4), capacity_limit(0.01, 1, 3, 4)] == [11, 2, 1]
    assert capacity_limit(1.0, 1, 0, 4) == 0
    expert, weight = torch.tensor([[1, 0], [0, 1], [0, -1]]), torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.5, 0.0]])
    assert drop(expert, weight, 1, "position")[0].tolist() == [[1, -1], [0, -1], [-1, -1]]
    assert drop(expert, weight, 2, "position")[0].tolist() == [[1, -1], [0, 1], [0, -1]]
    assert drop(expert, weight, 1, "score")[0].tolist() == [[1, -1], [0, -1], [-1, -1]]
    scores = torch.tensor([[0.3, 0.4], [0.9, 0.2], [0.5, 0.5]])  # tokens 1, 2, 0
    assert drop(expert, weight, 1, "priority", scores)[0].tolist() == [[1, -1], [0, -1], [-1, -1]]
    assert drop(expert, weight, 2, "priority", scores)[0].tolist() == [[1, -1], [0, 1], [0, -1]]
    assert drop(torch.tensor([[0], [0], [0]]), weight[:, :1], 1, "priority", scores)[0].tolist() == [[-1], [0], [-1]]
    kept, left = drop(expert, weight, 2, "score")  # of equal weights, first choices before second ones
    assert kept.tolist() == [[1, -1], [0, 1], [0, -1]]
    assert torch.equal(left, torch.tensor([[0.5, 0.0], [0.6, 0.4], [0.5, 0.0]]))


def test_losses():
    scores, expert = torch.tensor(SCORES).double(), torch.tensor([[0], [0], [1]])
    # f = 2/3, 1/3 and P = 1.9/3, 1.1/3
    assert balance_loss(scores, expert, 2).item() == pytest.approx(2 * (2 * 1.9 + 1.1) / 9)
    mask = torch.tensor([True, False, True])  # f = 1/2, 1/2
    assert balance_loss(scores, expert, 2, mask).item() == pytest.approx(1)
    # sequences of one token: 2 * 0.75, 2 * 0.9, 2 * 0.75
    assert balance_loss_sequence(scores, expert, 2, 3).item() == pytest.approx(1.6)
    assert balance_loss_sequence(scores, expert, 2, 3, mask).item() == pytest.approx(1.5)
    assert balance_loss(torch.full((4, 4), 0.25), torch.arange(4).unsqueeze(1), 4).item() == 1
    assert balance_loss(torch.eye(4)[[2, 2]], torch.full((2, 1), 2), 4).item() == 4
    assert z_loss(torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])).item() == pytest.approx(
        (math.log(2) ** 2 + math.log(4) ** 2) / 2
    )


def test_load():
    chosen, kept = torch.tensor([[0, 1], [0, 2], [0, -1]]), torch.tensor([[0, 1], [-1, 2], [-1, -1]])
    stats = load_stats(chosen, kept, 4)
    assert stats["tokens_per_expert"] == [3, 1, 1, 0]
    assert stats["dropped"] == pytest.approx(2 / 5)
    assert stats["imbalance"] == pytest.approx(4 * 3 / 5)
    assert stats["entropy"] == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2)) / math.log(4))


def test_close_can_say_no():
    one = torch.ones(2, 2)
    assert close(one, one + 1e-4, 1e-3)
    assert not close(one, one + 1e-2, 1e-3)
    assert not close(one, one * float("nan"), 1.0)
    assert not close(one * float("nan"), one, 1.0)
    assert not close(one, one[:1], 1.0)
