"""What a gate must keep to: its first answer is checked, and so is every k it is asked for."""

import copy

import pytest
import torch
from ranks import run
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import DispatchError
from turnout.moe import Gate, MoE, Routing, parallelize
from turnout.moe.gates import GATES, SigmoidGate, TopKGate
from turnout.moe.routing import can_be_read

D, E = 8, 4


class Wrong(Gate):
    """A gate whose answer is changed before it is given."""

    def __init__(self, change, top_k=2) -> None:
        super().__init__(D, E, top_k)
        self.weight.data = torch.randn(E, D, generator=torch.Generator().manual_seed(1))  # every expert is chosen
        self.change, self.calls = change, 0

    def forward(self, x):
        self.calls += 1
        logits = self.logits(x)
        scores = logits.softmax(-1)
        weight, expert = scores.topk(self.top_k)
        return self.change(expert, weight, scores)


def doubled(expert, weight, scores):
    return Routing(expert[:, :1].repeat(1, 2), weight, scores)


def left_out(expert, weight, scores):
    return Routing(torch.where(expert == 0, -1, expert), weight, scores)


WRONG = {
    "numbered from 1": (
        lambda e, w, s: Routing(e + 1, w, s),
        "returned expert ids from 1 to 4: use 0 to E - 1 = 3",
    ),
    "below -1": (lambda e, w, s: Routing(e - 2, w, s), "returned expert ids from -2 to"),
    "twice": (doubled, "chose an expert twice for the same token"),
    "a weight where -1 is": (left_out, "gave a weight to an unused choice"),
    "NaN where -1 is": (lambda e, w, s: left_out(e, w * torch.nan, s), "gave a weight to an unused choice"),
    "a pair": (lambda e, w, s: (e, w), "returned a tuple: return a Routing"),
    "a token too few": (lambda e, w, s: Routing(e[1:], w[1:], s[1:]), r"returned expert of shape \(8, 2\) for 9"),
    "an expert too many": (
        lambda e, w, s: Routing(e, w, torch.cat([s, s[:, :1]], 1)),
        "returned scores for 5 experts, but the layer has 4",
    ),
}


def tokens(number=9):
    return torch.randn(number, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_gate_that_breaks_the_contract_is_told_at_its_first_forward(change, message, training):
    layer = MoE(D, 16, E, gate=Wrong(change)).train(training)
    with pytest.raises(ValueError, match=rf"Wrong, the gate of MoE\(dim=8, num_experts=4\), {message}"):
        layer(tokens())


def test_the_values_are_read_once_in_training_and_once_in_eval(monkeypatch):
    seen = []
    monkeypatch.setattr("turnout.moe.layer.wrong_values", lambda routing: seen.append(len(routing.expert)))
    layer = MoE(D, 16, E, balance=0)
    for _ in range(2):
        for training in (True, False):
            layer.train(training)
            layer(tokens(0))  # says nothing about a gate
            layer(tokens())
            layer(tokens(5))
    assert seen == [0, 9, 0, 9]
    copy.deepcopy(layer)(tokens())
    assert len(seen) == 4
    layer.gate = Wrong(Routing)  # another gate
    layer(tokens())
    assert len(seen) == 5


def test_what_has_no_values_is_not_read():
    assert can_be_read(torch.empty(2))
    assert not can_be_read(torch.empty(2, device="meta"))
    with FakeTensorMode():
        assert not can_be_read(torch.empty(2))
    gate = Wrong(doubled)
    compiled = torch.compile(MoE(D, 16, E, gate=gate), backend="eager")
    compiled(tokens())  # in a graph nothing waits
    with pytest.raises(ValueError, match="twice"):
        MoE(D, 16, E, gate=gate)(tokens())


@pytest.mark.parametrize("change", [WRONG["numbered from 1"][0], WRONG["a pair"][0], doubled])
def test_on_many_ranks_none_waits_for_the_one_that_raises(change):
    def work():
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
        rank = torch.distributed.get_rank()
        right = lambda e, w, s: Routing(e, w, s)  # noqa: E731
        layer = parallelize(MoE(D, 16, E, gate=Wrong(right), seed=0), mesh)
        layer.gate.change = right if rank else change
        with pytest.raises(DispatchError if rank else ValueError):
            layer(tokens())

    run(2, work)


# ---- k


TAKES = {  # of 8 experts, what each gate takes
    "switch": {1},
    "base": {1},
    "gshard": {2},
    "hierarchical": {1, 2, 3, 4, 6, 8},  # two groups of four
}


@pytest.mark.parametrize("name", GATES)
def test_the_setter_takes_what_the_constructor_takes(name):
    layer = MoE(D, 16, 8, gate=name)
    before, taken = layer.top_k, TAKES.get(name, set(range(1, 9)))
    for k in (-1, 0, *range(1, 10), 1.5, 2.0, None, "2"):
        if k in taken and isinstance(k, int):
            layer.top_k = before = k
            assert layer.top_k == layer.gate.top_k == MoE(D, 16, 8, k, gate=name).top_k == k
            assert layer(tokens(), ids=torch.arange(9)).shape == (9, D)
            continue
        for taker in (lambda k: setattr(layer, "top_k", k), lambda k: setattr(layer.gate, "top_k", k)):
            with pytest.raises((ValueError, TypeError), match=r"top_k|one expert|two experts"):
                taker(k)
        with pytest.raises((ValueError, TypeError), match=r"top_k|one expert|two experts"):
            GATES[name](D, 8, k)
        assert layer.top_k == before


@pytest.mark.parametrize("kind", [TopKGate, SigmoidGate])
def test_k_is_at_most_the_experts_of_the_groups(kind):
    gate = kind(D, 8, 4, groups=4, top_groups=2)
    with pytest.raises(ValueError, match="top_k=5, but top_groups=2 have only 4 experts"):
        gate.top_k = 5
    with pytest.raises(ValueError, match="top_k=5, but top_groups=2 have only 4 experts"):
        kind(D, 8, 5, groups=4, top_groups=2)
    for gate.top_k in (1, 4):
        assert gate(tokens()).expert.shape == (9, gate.top_k)


def test_free_experts_count():
    layer = MoE(D, 16, E, free=["null", "identity"])
    layer.top_k = 6
    assert layer(tokens()).shape == (9, D)
    with pytest.raises(ValueError, match="top_k=7 must be between 1 and num_experts=6"):
        layer.top_k = 7


def test_a_gate_of_ones_own_may_say_more():
    class Even(TopKGate):
        def check_top_k(self, top_k):
            super().check_top_k(top_k)
            if top_k % 2:
                raise ValueError(f"top_k={top_k} must be even")

    layer = MoE(D, 16, E, gate=Even(D, E, 2))
    with pytest.raises(ValueError, match="must be even"):
        layer.top_k = 3
    with pytest.raises(ValueError, match="must be even"):
        Even(D, E, 1)
