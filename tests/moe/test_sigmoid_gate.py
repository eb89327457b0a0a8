"""The sigmoid gate against the reference, and the bias that balances it."""

import ranks
import reference
import reference_gates
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close
from routed import built, drawn, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from turnout.moe import Balance, MoE, aux_loss, parallelize, update_expert_biases
from turnout.moe.gates import GATES, SigmoidGate

D, H, E, T = 6, 5, 6, 13


@settings(max_examples=15)
@given(st.data())
def test_sigmoid_as_in_the_reference(data):
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    top_groups = data.draw(st.integers(1, groups))
    k, T = data.draw(st.integers(1, top_groups * size)), data.draw(st.integers(1, 5))
    options = {"normalize": data.draw(st.booleans()), "scale": data.draw(st.sampled_from([1.0, 2.5]))}
    options |= {"groups": groups, "top_groups": top_groups}
    if k // top_groups > size:
        return
    gate = built(SigmoidGate(D, groups * size, k, **options))
    gate.expert_bias.copy_(drawn(groups * size, seed=data.draw(st.integers(0, 9))))
    x = drawn(T, D, seed=data.draw(st.integers(0, 99))).requires_grad_()
    routing = gate(x)
    expert, weight, scores = reference_gates.route_sigmoid(x, gate.weight, gate.expert_bias, k, **options)
    assert torch.equal(routing.expert, expert)
    assert same(routing.weight, weight, (x, gate.weight))
    assert same(routing.scores, scores, (x, gate.weight))


def test_the_bias_moves_the_choice_and_nothing_else():
    gate, x = built(SigmoidGate(D, E, 2, normalize=False)), drawn(T, D)
    before = gate(x)
    gate.expert_bias[4] = 9.0
    after = gate(x)
    assert (after.expert[:, 0] == 4).all()
    assert not torch.equal(before.expert, after.expert)
    assert torch.equal(after.weight, after.scores.gather(1, after.expert))
    assert torch.equal(before.scores, after.scores)


def test_the_bias_follows_the_load():
    layer = MoE(D, H, E, gate=built(SigmoidGate(D, E, 2, rate=0.1)), seed=0).double()
    layer(drawn(T, D))
    load = layer.stats.tokens_per_expert
    assert torch.equal(layer.gate.load, load)
    layer(drawn(T, D, seed=1))  # another micro-batch of the step
    load = load + layer.stats.tokens_per_expert
    update_expert_biases(layer)
    mean = 2 * 2 * T / E
    wanted = [0.1 * ((n < mean) - (n > mean)) for n in load.tolist()]
    assert close(layer.gate.expert_bias, torch.tensor(wanted), 1e-6)
    assert layer.gate.expert_bias.any()
    assert not layer.gate.load.any()


def test_neither_evaluation_nor_padding_nor_recomputation_counts():
    layer = MoE(D, H, E, gate="sigmoid", seed=0).double()
    x, mask = drawn(T, D).requires_grad_(), torch.arange(T) % 3 > 0
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert not layer.gate.load.any()
    layer(x, mask)
    assert layer.gate.load.sum() == 2 * mask.sum()
    layer.gate.load.zero_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.gate.load.sum() == 2 * T


def test_the_bias_evens_out_loads_without_a_loss():
    layer = MoE(D, H, E, gate=built(SigmoidGate(D, E, 2, rate=0.02)), seed=0).double()
    with torch.no_grad():
        layer.gate.weight[0] += 1.0  # and all tokens lean that way
    x = drawn(200, D) + 1.0
    loads = []
    for _ in range(150):
        layer(x)
        loads.append(float(layer.stats.imbalance))
        update_expert_biases(layer)
    assert aux_loss(layer) == 0
    assert loads[0] > 1.8
    assert loads[-1] < 1.25


def test_the_bias_is_saved_and_stays_float32():
    gate = SigmoidGate(D, E, 2)
    gate.expert_bias += 0.001
    assert gate.state_dict().keys() == {"weight", "expert_bias"}
    half = gate.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert half.expert_bias.dtype == torch.float32
    assert torch.equal(half.expert_bias, torch.full((E,), 0.001))
    with torch.device("meta"):
        empty = SigmoidGate(D, E, 2)
    empty.to_empty(device="cpu").reset_parameters()
    assert not empty.expert_bias.any()
    assert not empty.load.any()


def halved(layer):
    return {name: t.bfloat16() if t.is_floating_point() else t for name, t in layer.state_dict().items()}


def test_the_bias_is_float32_however_the_layer_came_to_be():
    def one(device="cpu") -> MoE:
        with torch.device(device):
            return MoE(D, H, E, gate="sigmoid")

    made = {}
    try:
        torch.set_default_dtype(torch.bfloat16)
        made["under a default of bfloat16"] = one()
    finally:
        torch.set_default_dtype(torch.float32)
    made["halved"] = one().half()
    made["by way of the meta device"] = one("meta").to(torch.bfloat16).to_empty(device="cpu")
    for name, assign in {"copied": False, "assigned": True}.items():
        made[f"{name} from a file in bfloat16"] = one()
        made[f"{name} from a file in bfloat16"].load_state_dict(halved(one()), assign=assign)
    made["assigned to the meta device"] = one("meta")
    made["assigned to the meta device"].load_state_dict(halved(one()), assign=True)
    for how, layer in made.items():
        gate = layer.gate
        assert gate.expert_bias.dtype == torch.float32, how
        assert gate.load.dtype == torch.int64, how
        assert gate.expert_bias.device == gate.load.device == torch.device("cpu"), how
        assert set(gate._buffers) == {"expert_bias"}, how
        assert not gate.load.any(), how
        assert not gate.expert_bias.any(), how
        gate.load[0] += 1
        gate.update_bias()
        assert gate.expert_bias[0] < 0 < gate.expert_bias[1], how


def test_no_gate_has_another_state():
    """Buffers of other gates, if there will be any, want the same care."""
    with_buffers = {name for name, gate in GATES.items() if dict(gate(4, 4).named_buffers())}
    assert with_buffers == {"sigmoid"}


def test_with_a_balance_loss_if_asked_for():
    layer = MoE(
        D, H, E, gate=SigmoidGate(D, E, 2, balance_loss=True), seed=0, balance=Balance(over="sequence")
    ).double()
    x = drawn(2, T, D)
    layer(x)
    routing = layer.gate(x.flatten(0, 1))
    assert close(aux_loss(layer), 1e-2 * reference.balance_loss_sequence(routing.scores, routing.expert, E, 2), 1e-12)


def _biases():
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(MoE(D, H, 4, 2, gate="sigmoid", balance=Balance(over="global"), seed=i) for i in range(2))
    ).double()
    parallelize(layers, init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
    x = drawn(2 * T, D)[T * rank : T * (rank + 1)] if world > 1 else drawn(2 * T, D)
    for _ in range(3):
        layers(x)
        update_expert_biases(layers)
    return torch.stack([layer.gate.expert_bias for layer in layers])


def test_all_ranks_keep_the_bias_of_one():
    alone, many = ranks.run(1, _biases), ranks.run(2, _biases)
    assert alone[0].any()
    assert all(torch.equal(each, alone[0]) for each in many)
