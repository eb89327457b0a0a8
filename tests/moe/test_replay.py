"""Router replay: recorded tokens go to the same experts again, and the router learns from weights of its own."""

import copy

import numpy as np
import pytest
import torch
from ranks import errors, run
from reference import close
from routed import built, drawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from turnout.models import GPT, GPTConfig
from turnout.moe import Capacity, Gate, MoE, Routing, parallelize
from turnout.moe.gates import GATES, HierarchicalGate, SigmoidGate, TopKGate
from turnout.moe.replay import Routings, record, replay

D, E, T = 6, 4, 12


def layer(gate="topk", seed=0, **options):
    made = MoE(D, 5, E, gate=gate, seed=seed, balance=0, **options)
    built(made.gate)
    return made.double()


def moved(model):
    """A copy whose routers choose otherwise."""
    other = copy.deepcopy(model)
    for part in other.modules():
        if isinstance(part, Gate):
            for i, p in enumerate(part.parameters()):
                p.data = drawn(*p.shape, seed=50 + i).abs()
    return other


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_the_same_router_gives_the_same_output(name, training):
    """Also where a gate draws: the draws are in the record."""
    model, x, ids = layer(name).train(training), drawn(T, D), torch.arange(T)
    if name in ("switch", "noisy_topk"):
        model.eval()  # their noise is in their weights, and a replay has none
    with record(model) as routings:
        y = model(x, ids=ids)
    torch.manual_seed(1)
    with replay(model, routings):
        again = model(x, ids=ids)
    assert close(again, y, 1e-12)


@pytest.mark.parametrize("name", GATES)
def test_another_router_sends_tokens_where_they_went_and_learns(name):
    model, x, ids = layer(name).eval(), drawn(T, D), torch.arange(T)
    with record(model) as routings:
        model(x, ids=ids)
    other = moved(model)
    with record(other) as own:
        other(x, ids=ids)
    with replay(other, routings):
        y = other(x, ids=ids)
    assert torch.equal(other._last[0], routings.by_layer[""])
    if GATES[name].learned:
        assert not torch.equal(own.ids, routings.ids)
        (y * drawn(T, D, seed=1)).sum().backward()
        assert other.gate.weight.grad.any()


def weights(logits, ids, rule):
    """By the formula, token by token."""
    rows = []
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        values = rule(torch.tensor(row, dtype=torch.float64), chosen)
        rows.append([values[e] if e >= 0 else 0.0 for e in chosen])
    return torch.tensor(rows, dtype=torch.float64)


def softmax_over_chosen(row, chosen):
    real = [e for e in chosen if e >= 0]
    return dict(zip(real, row[real].softmax(0).tolist(), strict=True))


def sigmoid_share(row, chosen):
    real = [e for e in chosen if e >= 0]
    return dict(zip(real, (2.5 * row[real].sigmoid() / row[real].sigmoid().sum()).tolist(), strict=True))


@pytest.mark.parametrize(
    ("gate", "rule"),
    [(TopKGate(D, E, 2), softmax_over_chosen), (SigmoidGate(D, E, 2, scale=2.5), sigmoid_share)],
)
def test_weights_are_those_of_the_formula(gate, rule):
    built(gate)
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:2] for t in range(T)])
    ids[3, 1] = -1
    x = drawn(T, D)
    assert close(torch.where(ids < 0, 0, gate.weigh(gate(x), ids)), weights(x @ gate.weight.T, ids, rule), 1e-12)


@pytest.mark.parametrize(("k", "top_groups"), [(2, 1), (2, 2), (4, 2)])
def test_weights_of_two_levels(k, top_groups):
    gate = built(HierarchicalGate(D, 8, k, groups=4, top_groups=top_groups))
    routing = gate(drawn(T, D))
    assert close(gate.weigh(routing, routing.expert), routing.weight, 1e-12)
    fewer = routing.expert.roll(1, 0)
    assert close(gate.weigh(routing, fewer).sum(1) <= 1 + 1e-12, torch.ones(T), 1e-12)


def test_a_gshard_token_whose_second_expert_was_left_out():
    model, x = layer("gshard").train(), drawn(200, D)
    with record(model) as routings:
        y = model(x)
    assert (routings.ids < 0).any()
    with replay(model, routings):
        assert close(model(x), y, 1e-12)


class Twice(nn.Module):
    """Two mixtures, computed again in the backward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([layer(seed=1), layer("sigmoid", seed=2)])

    def forward(self, x):
        for each in self.layers:
            x = x + checkpoint(each, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_recomputed_forwards_take_their_own_rows(together, inside):
    """Two micro-batches whose backward runs in the other order, also after the context."""
    model, xs = Twice(), (drawn(T, D), drawn(T + 3, D, seed=1))
    with record(model) as routings:
        for x in xs:
            model(x)
    assert routings.ids.shape == (2, 2 * T + 3, 2)

    def grads(model):
        model.zero_grad()
        with replay(model, routings):
            ys = [model(x).square().sum() for x in xs]
            if together and inside:
                sum(ys).backward()
        if together and not inside:
            sum(ys).backward()
        if not together:
            for y in reversed(ys):
                y.backward()
        return [p.grad for p in model.parameters()]

    other = moved(model)
    again = grads(other)
    for each in other.layers:
        each.tap = None
    other.forward = lambda x: x2 + other.layers[1](x2) if (x2 := x + other.layers[0](x)) is not None else x
    plain = grads(other)
    assert all(close(a, b, 1e-10) for a, b in zip(again, plain, strict=True) if b is not None)


def test_recomputed_forwards_know_tokens_of_the_same_sizes_apart():
    """Normalised tokens are all as large; the second micro-batch must not take the rows of the first."""
    model, x = Twice().layers[0], drawn(T, D)
    ids = torch.stack([torch.tensor([e, (e + 1) % E]) for e in range(E)] * (2 * T // E)).roll(1, 0)[None]
    ids[:, T:] = (ids[:, T:] + 1) % E

    def grads(forward):
        model.zero_grad()
        with replay(model, ids):
            for each in (x, -x):
                forward(each).square().sum().backward()
        return [p.grad for p in model.parameters()]

    again, plain = grads(lambda x: checkpoint(model, x, use_reentrant=False)), grads(model)
    assert all(close(a, b, 1e-12) for a, b in zip(again, plain, strict=True))


def test_a_plain_forward_after_a_replay_is_its_own():
    model, x = Twice(), drawn(T, D)
    with record(model) as routings:
        model(x)
    other = moved(model)
    with replay(other, routings):
        first = other(x)
    second = other(drawn(T, D, seed=3))
    (first.sum() + second.sum()).backward()
    grads = [p.grad for p in other.parameters()]
    fresh = moved(model)
    with replay(fresh, routings):
        fresh(x).sum().backward()
    fresh(drawn(T, D, seed=3)).sum().backward()
    assert all(close(a, b.grad, 1e-10) for a, b in zip(grads, fresh.parameters(), strict=True) if a is not None)


def test_padding_free_experts_and_capacity():
    options = {"free": ("identity",), "capacity": Capacity(0.7)}
    model, x, mask = layer(**options), drawn(T, D), torch.arange(T) % 3 > 0
    with record(model) as routings:
        y = model(x, mask)
    assert (routings.ids[0][~mask] == -1).all()
    filled = torch.where(routings.ids < 0, torch.arange(2), routings.ids)  # another program may know of no padding
    for each in (routings, filled):
        with replay(model, each):
            assert torch.equal(model(x, mask), y)


def test_to_numpy_and_back():
    model, x = nn.Sequential(layer(), layer(seed=1)), drawn(T, D)
    with record(model) as routings:
        y = model(x)
    ids = routings.numpy()
    assert ids.shape == (2, T, 2)
    assert ids.dtype == np.int64
    for given in (ids.astype(np.int16), torch.from_numpy(ids), dict(zip("01", ids, strict=True)), routings):
        with replay(model, given):
            assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.zeros(2, T, 2, dtype=torch.int64), r"\[layers, tokens, k\] for 1 MoE layers; got \(2, 12, 2\)"),
        (torch.full((1, T, 1), E), "layer '' name experts from 4 to 4, but the layer has 0 to 3"),
        (torch.zeros(1, T, 2, dtype=torch.int64), "name an expert twice for one token"),
        (torch.zeros(1, T, 0, dtype=torch.int64), r"must be integers \[tokens, k\], k of at least 1; got torch.int64"),
        (torch.zeros(1, T, 1), r"must be integers \[tokens, k\], k of at least 1; got torch.float32"),
        ({"other": torch.zeros(T, 1)}, "have no layer ''; they have 'other'"),
        (torch.zeros(1, T - 1, 1, dtype=torch.int64), "have 11 tokens, of which 0 are replayed; this forward has 12"),
        (torch.zeros(1, T + 1, 1, dtype=torch.int64), "have 13 tokens, but only 12 were replayed"),
    ],
)
def test_what_does_not_fit_is_named(ids, says):
    model = layer()
    with pytest.raises(ValueError, match=says), replay(model, ids):
        model(drawn(T, D))
    assert model(drawn(T, D)).shape == (T, D)


def test_more_that_is_refused():
    class Own(Gate):
        def forward(self, x):
            logits = self.logits(x)
            weight, expert = logits.softmax(-1).topk(1)
            return Routing(expert, weight, logits.softmax(-1))

    model = MoE(D, 5, E, gate=Own(D, E))
    with record(model) as routings:
        model(drawn(T, D).float())
    with pytest.raises(TypeError, match=r"must be Routings, a mapping .* got list"), replay(model, [[[0]] * T]):
        pass
    with pytest.raises(TypeError, match=r"Own cannot weigh .* define weigh"), replay(model, routings):
        model(drawn(T, D).float())
    with pytest.raises(ValueError, match="Linear has no MoE layer"), record(nn.Linear(2, 2)):
        pass
    with record(model), pytest.raises(RuntimeError, match="recorded or replayed already"), replay(model, routings):
        pass
    with pytest.raises(ValueError, match="layers saw different numbers of tokens"):
        Routings({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}).ids.sum()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, after a graph break
def test_compiled():
    model, x = layer().float(), drawn(T, D).float()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with record(model) as routings:
        y = compiled(x)
    with replay(model, routings):
        assert close(compiled(x), y, 1e-6)
    assert close(compiled(x), y, 1e-6)
    torch.compiler.reset()  # or later tests begin with a layer whose graph is broken


CONFIG = GPTConfig(vocab=32, dim=16, layers=2, heads=2, seq_len=8, hidden=16, num_experts=4, moe_every=1)


def text():
    return torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0))


def gpt(seed):
    torch.manual_seed(seed)
    return GPT(CONFIG).double()


def replayed_over_ranks(ids, wanted):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    rank = torch.distributed.get_rank()
    model = parallelize(gpt(1), mesh)
    mine = ids.unflatten(1, (4, 8))[:, 2 * rank : 2 * rank + 2].flatten(1, 2)
    with replay(model, mine):
        logits = model(text()[2 * rank : 2 * rank + 2])
    assert close(logits, wanted[2 * rank : 2 * rank + 2], 1e-10)


def refused(ids):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = parallelize(gpt(1), mesh)
    with replay(model, ids[:, : 16 - torch.distributed.get_rank()]):
        model(text()[:2])


def test_over_ranks_as_on_one():
    with record(sampler := gpt(0)) as routings:
        sampler(text())
    learner = gpt(1)
    with replay(learner, routings):
        wanted = learner(text()).detach()
    run(2, replayed_over_ranks, routings.ids, wanted)
    first, second = errors(2, refused, routings.ids)
    assert "rank 1 of the expert group raised an error" in first
    assert "this forward has 16 more" in second
