"""torch.compile: one graph, few compilations, the results of the layer as it is."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from turnout.moe import Balance, Capacity, MoE, aux_loss
from turnout.moe.experts.grouped_mm import grouped_mm
from turnout.moe.gates import GATES, TopKGate

LAYERS = {
    "ragged": {},
    "ragged, capped": {
        "capacity": Capacity(1.1, minimum=15, drop="priority"),
        "gate": TopKGate(16, 8, 2, groups=4, top_groups=2, bias=True),
    },
    "padded": {"capacity": Capacity(1.25, pad=True)},
    "padded, gelu, by position": {"capacity": Capacity(0.7, drop="position", pad=True), "experts": "gelu"},
    "shared": {"experts": "gelu_tanh", "shared": 1, "bias": True, "balance": Balance(z_loss=1e-3)},
    "sequence": {"balance": Balance(over="sequence", choices=1)},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**options) -> MoE:
    torch.manual_seed(0)
    return MoE(16, 32, 8, 2, **options)


def step(layer, forward, x):
    """Output, loss of balance, gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    balance = aux_loss(layer)
    (y.square().mean() + balance).backward()
    return [y.detach(), balance.detach(), x.grad, *(p.grad for p in layer.parameters())]


def tokens(T: int) -> torch.Tensor:
    return torch.randn(2, T, 16, generator=torch.Generator().manual_seed(T))


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_one_graph_equal_to_the_layer_and_no_recompilation_storm(options):
    layer, counter = build(**options), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for T in (32, 48, 20, 33):  # the second size makes the length dynamic, no later one compiles again
        for ours, same in zip(step(layer, compiled, tokens(T)), step(layer, layer, tokens(T)), strict=True):
            torch.testing.assert_close(ours, same)
    assert counter.frame_count <= 2
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(tokens(32)), layer.eval()(tokens(32)))


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        *({"gate": gate} for gate in ("sigmoid", "expert_choice", "cosine", "sinkhorn")),
        {"free": ["null", "identity", "constant"]},
    ],
    ids=str,
)
def test_further_gates_in_one_graph(options):
    layer, counter = build(**options), CompileCounterWithBackend("aot_eager")
    layer.experts.weight_on = "input" if layer.free else "output"
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for ours, same in zip(step(layer, compiled, tokens(32)), step(layer, layer, tokens(32)), strict=True):
        torch.testing.assert_close(ours, same)
    assert counter.frame_count == 1
    if options.get("gate") == "sigmoid":
        assert layer.gate.load.sum() == 2 * 2 * 2 * 32  # of both steps


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_no_gate_breaks_the_graph(gate):
    layer, x = MoE(16, 32, 4, gate=gate, seed=0), tokens(8)
    options = {"mask": torch.arange(16).reshape(2, 8) % 3 > 0, "ids": torch.arange(16).reshape(2, 8)}
    results = []
    for forward in (torch.compile(layer, backend="eager", fullgraph=True), layer):
        torch.manual_seed(0)
        results.append(forward(x, **options))
    torch.testing.assert_close(*results)


def test_20_steps_of_other_loads_and_lengths_take_two_graphs():
    layer, counter = build(), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    loads = []
    for seed in range(20):
        with torch.no_grad():
            layer.gate.weight.normal_(generator=torch.Generator().manual_seed(seed))
        step(layer, compiled, tokens((32, 32, 48, 20)[seed % 4]))
        loads.append(tuple(layer.stats.tokens_per_expert.tolist()))
    assert len(set(loads)) == 20
    assert counter.frame_count == 2


def test_what_is_set_between_steps():
    layer = build(**LAYERS["padded"])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for layer.capacity, layer.top_k in [(1.25, 2), (0.9, 2), (0.7, 1), (1.25, 2)]:
        for ours, same in zip(step(layer, compiled, tokens(32)), step(layer, layer, tokens(32)), strict=True):
            torch.testing.assert_close(ours, same)


@pytest.mark.parametrize("over", ["local", {"local": 1.0, "sequence": 0.5}], ids=str)
def test_weights_of_losses_change_without_compiling_again(over):
    layer, counter = build(balance=Balance(0.3, over=over, z_loss=0.2)), CompileCounterWithBackend("eager")
    compiled, losses = torch.compile(layer, backend=counter, fullgraph=True), []
    for weight, z_loss in [(0.3, 0.2), (0.1, 0.05), (0.7, 1e-3), (1.0, 1.0)]:
        layer.balance = Balance(weight, over=over, z_loss=z_loss)
        ours, same = step(layer, compiled, tokens(32)), step(layer, layer, tokens(32))
        for a, b in zip(ours, same, strict=True):
            torch.testing.assert_close(a, b)
        losses.append(float(ours[1]))
    assert len(set(losses)) == 4
    layer.balance = 0.01
    step(layer, compiled, tokens(32))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("half_units")
def test_a_sum_of_products_compiles():
    """It has an expanded gradient, which torch's grouped_mm refuses."""
    rows, weight = torch.randn(6, 16).bfloat16().requires_grad_(), torch.randn(3, 16, 8).bfloat16().requires_grad_()
    ends, results = torch.tensor([2, 2, 6], dtype=torch.int32), []
    for product in (torch.compile(grouped_mm, backend="aot_eager", fullgraph=True), grouped_mm):
        results.append(torch.autograd.grad(product(rows, weight, ends).sum(), [rows, weight]))
    for ours, same in zip(*results, strict=True):
        torch.testing.assert_close(ours, same)


@pytest.mark.slow
@pytest.mark.usefixtures("half_units")
@pytest.mark.parametrize("pad", [True, False], ids=["padded", "ragged"])
def test_recomputed_under_autocast_with_a_length_marked_as_dynamic(pad):
    """One graph from the first step on. That it is a whole one says, too, that nobody waits for numbers on the host."""
    layer, counter = build(**LAYERS["padded" if pad else "ragged"]), CompileCounterWithBackend("aot_eager")
    layer.experts.recompute = True
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for T in (32, 20, 33):
        x, results = tokens(T), []
        torch._dynamo.mark_dynamic(x, 1)
        for forward in (compiled, layer):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(x).square().mean() + aux_loss(layer)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in layer.parameters())])
        for ours, same in zip(*results, strict=True):
            torch.testing.assert_close(ours, same, atol=1e-3, rtol=2e-2)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on its first use of inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("options", [LAYERS["ragged"], LAYERS["padded"]], ids=["ragged", "padded"])
def test_inductor_gives_the_same(options):
    layer = build(**options)
    compiled = torch.compile(layer, fullgraph=True)
    for ours, same in zip(step(layer, compiled, tokens(32)), step(layer, layer, tokens(32)), strict=True):
        torch.testing.assert_close(ours, same)
