"""What a layer keeps between forwards, copies and saves, what its losses are, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from reference import close
from torch import nn
from torch.utils.checkpoint import checkpoint
from turnout.moe import Balance, Capacity, Gate, MoE, Residual, Routing, aux_loss
from turnout.moe.gates import TopKGate
from turnout.moe.losses import balance_loss, z_loss

D, H, E = 6, 5, 4


def tokens(*shape, seed=0):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**kwargs):
    return MoE(D, H, E, seed=1, **kwargs).double()


def loss_of(layer, x, sequences=1):
    routing = layer.gate(x.reshape(-1, D))
    return 1e-2 * balance_loss(routing, layer.balance.over, sequences) + layer.balance.z_loss * z_loss(routing)


def test_copy_after_forward():
    layer, x = built(shared=1, capacity=1.0), tokens(9)
    y = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(layer.parameters(), other.parameters(), strict=True))
    assert close(aux_loss(layer), loss_of(layer, x), 1e-12)  # the copy took nothing away
    with pytest.raises(RuntimeError, match="no statistics yet"):
        copy.deepcopy(layer).stats.dropped.item()


def test_copy_of_a_compiled_layer_is_its_own():
    layer, x = built(), tokens(9)
    layer.compile(backend="eager")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        nn.init.zeros_(other.experts.w_down)
        assert not other(x).any()


@pytest.mark.parametrize("experts", ["swiglu", lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))])
def test_state_dict(experts):
    layer, other, x = MoE(D, H, E, experts=experts, seed=1), MoE(D, H, E, experts=experts, seed=2), tokens(9).float()
    layer(x)
    layer.eval()
    other.eval()
    y = layer(x)
    assert not close(other(x), y, 1e-2)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), y)


def test_whole_layer_pickles():
    layer, x = built(), tokens(9)
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)


def test_seed_is_drawn_from_torch():
    torch.manual_seed(0)
    first, second = MoE(D, H, E), MoE(D, H, E)
    torch.manual_seed(0)
    again = MoE(D, H, E)
    assert torch.equal(first.experts.w_up, again.experts.w_up)
    assert torch.equal(first.gate.weight, again.gate.weight)
    assert not torch.equal(first.experts.w_up, second.experts.w_up)


@pytest.mark.parametrize("balance", ["local", "global", "sequence"])
def test_aux_loss_is_the_weighted_losses(balance):
    layer, x = built(balance=Balance(over=balance, z_loss=0.3)), tokens(3, 8)
    layer(x)
    assert close(aux_loss(layer), loss_of(layer, x, 3), 1e-12)
    assert not close(aux_loss(layer), loss_of(layer, x.flip(2), 3), 1e-3)
    mask = torch.arange(24).reshape(3, 8) % 3 > 0
    layer(x, mask)
    routing = layer.gate(x.reshape(-1, D)).masked(mask.flatten())
    assert close(aux_loss(layer), 1e-2 * balance_loss(routing, balance, 3) + 0.3 * z_loss(routing), 1e-12)


def test_aux_loss_without_weights():
    layer = built(balance=0)
    layer(tokens(9)).sum().backward()
    assert aux_loss(layer).item() == 0
    assert aux_loss(nn.Linear(2, 2)).item() == 0
    assert aux_loss(nn.Module()).item() == 0
    assert aux_loss(built()).item() == 0  # no forward yet


def test_aux_loss_of_a_gates_own_losses():
    class Own(Gate):
        def forward(self, x):
            logits = self.logits(x)
            weight, expert = logits.softmax(-1).topk(1)
            return Routing(expert, weight, logits.softmax(-1), losses={"own": logits.square().sum()})

    layer, x = built(gate=Own(D, E)), tokens(9)
    layer(x)
    routing = layer.gate(x)
    assert close(aux_loss(layer), 1e-2 * (balance_loss(routing) + routing.losses["own"]), 1e-12)
    layer.balance = Balance(z_loss=1.0)
    with pytest.raises(
        ValueError, match=r"Own, the gate of MoE\(dim=6, num_experts=4\), returns no logits, and .*: set z_loss=0"
    ):
        layer(x)


def test_aux_loss_sums_runs_and_layers():
    layer, other, x, z = built(), built(), tokens(9), tokens(7, seed=1)
    layer(x)
    layer(z)
    assert close(aux_loss(layer), loss_of(layer, x) + loss_of(layer, z), 1e-12)
    assert not close(aux_loss(layer), loss_of(layer, z), 1e-3)
    layer(x)
    other(z)
    assert close(aux_loss(nn.ModuleList([layer, other])), loss_of(layer, x) + loss_of(other, z), 1e-12)


def test_aux_loss_with_a_frozen_gate():
    layer = built()
    layer.gate.requires_grad_(False)
    layer(tokens(9))
    assert aux_loss(layer) > 0


def gradients(layer, x, run):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    loss = aux_loss(layer)
    (y.square().sum() + loss).backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("settings", [{}, {"capacity": 0.8}, {"capacity": Capacity(1.0, pad=True)}])
def test_checkpoint(settings):
    layer, x = built(balance=1.0, **settings), tokens(9)

    def block(x):  # what comes after the layer needs its output: recomputation runs all of the layer
        return layer(x).sin()

    plain = gradients(layer, x, block)
    for _ in range(2):  # a second step starts afresh: what recomputation ran has not been counted
        recomputed = gradients(layer, x, lambda x: checkpoint(block, x, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(recomputed, plain, strict=True))
    assert plain[0] > 0.5
    layer.balance = 0.0
    assert not close(gradients(layer, x, block)[2], plain[2], 1e-3)  # the gate's gradient has the loss in it


@pytest.mark.parametrize(
    ("of", "arguments", "message"),
    [
        (Capacity, {"factor": 0.0}, "factor must be a positive number"),
        (Capacity, {"factor": "1"}, "factor must be a positive number or 'as needed'; got '1'"),
        (Capacity, {"factor": None}, "factor=None needs an eval_factor"),
        (Capacity, {"factor": None, "eval_factor": 1.0, "pad": True}, "pad=True fills every expert up to its capacity"),
        (Capacity, {"factor": 1.0, "eval_factor": float("nan")}, "eval_factor must be a positive number"),
        (Capacity, {"factor": 1.0, "minimum": 0}, "minimum must be a positive integer; got 0"),
        (Capacity, {"factor": 1.0, "drop": "last"}, "drop must be one of score, position, priority; got 'last'"),
        (Capacity, {"factor": 1.0, "pad": 1}, "pad must be True or False; got 1"),
        (Balance, {"weight": -1}, "weight must be a number, 0 or more; got -1"),
        (Balance, {"z_loss": float("inf")}, "z_loss must be a number, 0 or more; got inf"),
        (Balance, {"over": "all"}, "over must be one of local, global, sequence; got 'all'"),
        (Balance, {"over": {"local": -1.0}}, "over must be one of local, global, sequence; got {'local': -1.0}"),
        (Balance, {"over": {}}, "over must be one of local, global, sequence; got {}"),
        (Balance, {"over": None}, "over must be one of local, global, sequence; got None"),
        (Balance, {"choices": 0}, "choices must be a positive integer or None; got 0"),
    ],
)
def test_bad_rules(of, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        of(**arguments)


def test_a_number_changes_a_rule_in_one_field():
    layer = built(capacity=Capacity(1.25, 2.0, minimum=3, drop="position", pad=True), balance=Balance(over="global"))
    layer.capacity, layer.balance = 1, 0.5
    assert layer.capacity == Capacity(1.0, 2.0, minimum=3, drop="position", pad=True)
    assert layer.balance == Balance(0.5, over="global")
    layer.capacity, layer.balance = Capacity(1.5), Balance(z_loss=0.1)
    assert (layer.capacity, layer.balance) == (Capacity(1.5), Balance(z_loss=0.1))
    layer.capacity = None
    assert layer.capacity is None
    for value in (-1.0, "1"):
        with pytest.raises((ValueError, TypeError), match="capacity must be a positive number"):
            layer.capacity = value
        with pytest.raises((ValueError, TypeError), match="balance must be a number, 0 or more"):
            layer.balance = value
    assert (layer.capacity, layer.balance) == (None, Balance(z_loss=0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be a positive integer; got 0"),
        ({"hidden": -1}, "hidden must be a positive integer; got -1"),
        ({"num_experts": 2.0}, "num_experts must be a positive integer; got 2.0"),
        ({"capacity": "all"}, "capacity must be a positive number or 'as needed'; got 'all'"),
        ({"capacity": True}, "capacity must be a positive number or 'as needed'; got True"),
        ({"capacity": 0.0}, "capacity must be a positive number"),
        ({"balance": -0.1}, "balance must be a number, 0 or more; got -0.1"),
        ({"balance": "global"}, "balance must be a number, 0 or more; got 'global'"),
        ({"shared": -1}, "shared must be a number of experts, 0 or more"),
        ({"shared": "one"}, "shared must be a number of experts, 0 or more"),
        ({"shared": Residual(0)}, r"shared=Residual\(shared=0\) has no shared expert to weigh"),
        ({"gate": "best"}, "gate must be one of topk, .*hash or a Gate; got 'best'"),
        ({"experts": "tanh"}, "experts must be one of gelu, .*clamped_swiglu or a factory; got 'tanh'"),
        ({"top_k": 5}, "top_k=5 must be between 1 and num_experts=4"),
        ({"top_k": 0}, "top_k=0 must be between"),
        ({"top_k": 2.0}, "top_k must be an integer or None; got 2.0"),
        ({"gate": TopKGate}, "gate must be a name or a Gate, not a class: pass TopKGate"),
        ({"experts": nn.Linear(D, D)}, "experts must be a name or a factory, not a module: pass lambda: Linear"),
        ({"gate": "switch", "top_k": 2}, "switch gate needs top_k=1"),
        ({"gate": "gshard", "top_k": 1}, "gshard gate needs top_k=2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MoE(**{"dim": D, "hidden": H, "num_experts": E, **arguments})


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.zeros(3, 5), None, ValueError, r"x must be \(..., 6\).*got \(3, 5\)"),
        (torch.tensor(1.0), None, ValueError, r"x must be \(..., 6\).*got \(\)"),
        (torch.zeros(3, D, dtype=torch.int64), None, TypeError, "x must be float32.*got torch.int64"),
        (torch.zeros(3, D), None, TypeError, "tokens are torch.float32 and expert weights are torch.float64"),
        (tokens(3), torch.ones(2, dtype=torch.bool), ValueError, r"mask must be bool \(3,\); got torch.bool \(2,\)"),
        (tokens(3), torch.ones(3), ValueError, r"mask must be bool \(3,\); got torch.float32"),
    ],
)
def test_bad_inputs(x, mask, error, message):
    with pytest.raises(error, match=message):
        built()(x, mask)


def test_sequences_need_an_axis():
    with pytest.raises(ValueError, match=r'Balance\(over="sequence"\) needs x'):
        built(balance=Balance(over="sequence"))(tokens())


@pytest.mark.parametrize("settings", [{}, {"capacity": 1.0}, {"capacity": Capacity(1.0, pad=True)}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(settings, bad):
    layer, x = built(**settings), tokens(9)
    x[4, 2] = bad
    with pytest.raises(ValueError, match="NaN among the gate's weights"):
        layer(x)
    assert layer(x, torch.arange(9) != 4).isfinite().all()  # not where it is padding


def test_nan_in_padding_reaches_no_gradient():
    layer, x = built(), tokens(9)
    real = torch.arange(9) != 4
    x[4] = float("nan")
    y = layer(x, real)
    (y[real].square().sum() + aux_loss(layer)).backward()
    for name, p in layer.named_parameters():
        assert p.grad.isfinite().all(), name
