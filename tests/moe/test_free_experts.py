"""Free and residual experts, weights on the input, several balance losses: the layer against the reference."""

import pytest
import ranks
import reference
import reference_gates
import torch
from reference import close
from routed import drawn
from torch.distributed.device_mesh import init_device_mesh
from turnout.moe import Balance, MoE, Residual, aux_loss, parallelize, sync_gradients

D, H, E, T = 6, 5, 3, 13
KINDS = ["identity", "constant", "null", "constant"]


def built(**options):
    layer = MoE(D, H, E, 2, seed=0, **options)
    with torch.no_grad():
        layer.gate.weight.copy_(drawn(*layer.gate.weight.shape, seed=7))
    return layer.double()


def by_hand(layer, x, limit=None, on_input=False):
    """Token by token, with free experts where the layer has any."""
    kinds = [] if layer.free is None else layer.free.kinds
    expert, weight, _, _ = reference.route_topk(x, layer.gate.weight, 2)
    computed = torch.where(expert < E, expert, -1)
    if limit is not None:
        computed, _ = reference.drop(computed, weight, limit, "score")
    tensors, rows = dict(layer.experts.named_parameters()), []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for j in range(2):
            e, w = int(expert[t, j]), weight[t, j]
            if e >= E:
                own = [i for i, kind in enumerate(kinds) if kind == kinds[e - E]].index(e - E)
                constant = (layer.free.constant[own], layer.free.mix[own]) if kinds[e - E] == "constant" else ()
                y = y + w * reference_gates.free_expert(kinds[e - E], x[t], *constant)
            elif int(computed[t, j]) >= 0:
                into = w * x[t] if on_input else x[t]
                y = y + (1 if on_input else w) * reference.expert_ffn(into, tensors, e, layer.experts.activation)
        rows.append(y)
    return torch.stack(rows), expert, computed


def same(layer, x, wanted):
    y = layer(x)
    leaves = (x, *layer.parameters())
    seed = drawn(*wanted.shape, seed=1)
    grads = [torch.autograd.grad((v * seed).sum(), leaves, retain_graph=True) for v in (y, wanted)]
    return close(y, wanted, 1e-11) and all(close(a, w, 1e-10) for a, w in zip(*grads, strict=True))


@pytest.mark.parametrize("capacity_factor", [None, 0.2])
def test_free_experts_as_in_the_reference(capacity_factor):
    layer, x = built(free=KINDS, capacity=capacity_factor), drawn(T, D).requires_grad_()
    limit = None if capacity_factor is None else reference.capacity_limit(capacity_factor, 2, T, E)
    wanted, expert, computed = by_hand(layer, x, limit)
    assert same(layer, x, wanted)
    chosen = layer.stats.tokens_per_expert
    assert chosen.tolist() == [int((expert == e).sum()) for e in range(E + len(KINDS))]
    assert (chosen[E:] > 0).all()
    lost = int(((expert < E) & (computed < 0)).sum())
    assert close(layer.stats.dropped, torch.tensor(lost / (2 * T)), 1e-6)
    assert (lost > 0) == (capacity_factor is not None)


def test_padding_visits_no_free_expert():
    layer, x, mask = built(free=KINDS), drawn(T, D), torch.arange(T) % 3 > 0
    y = layer(x, mask)
    assert not y[~mask].any()
    assert close(y[mask], layer(x[mask]), 1e-12)


def test_free_experts_of_unknown_kinds():
    for kinds in (["zero"], "null"):
        with pytest.raises(ValueError, match="free must be a list of kinds, each one of null, identity, constant; got"):
            MoE(D, H, E, free=kinds)


@pytest.mark.parametrize("experts", ["swiglu", "gelu"])
def test_weights_on_the_input(experts):
    layer, x = built(experts=experts, balance=0), drawn(T, D).requires_grad_()
    layer.experts.weight_on = "input"
    wanted = by_hand(layer, x, on_input=True)[0]
    assert same(layer, x, wanted)
    assert not close(by_hand(layer, x)[0], wanted, 1e-2)
    layer.experts.recompute = True
    assert same(layer, x, wanted)
    with pytest.raises(ValueError, match="got 'both'"):
        layer.experts.weight_on = "both"


def test_several_balance_losses():
    layer, x = built(balance=Balance(over={"local": 1.0, "sequence": 0.25})), drawn(3, T, D)
    layer(x)
    expert, _, scores, _ = reference.route_topk(x.flatten(0, 1), layer.gate.weight, 2)
    local = reference.balance_loss(scores, expert, E)
    wanted = local + 0.25 * reference.balance_loss_sequence(scores, expert, E, 3)
    assert close(aux_loss(layer), 1e-2 * wanted, 1e-12)
    assert not close(aux_loss(layer), 1e-2 * local, 1e-2)
    with pytest.raises(ValueError, match=r"over must be one of local, global, sequence; got \{'all': 1\}"):
        Balance(over={"all": 1})


@pytest.mark.parametrize("options", [{"shared": Residual(2)}, {"shared": Residual(1), "free": KINDS}], ids=str)
def test_residual_experts_as_in_the_reference(options):
    layer, x = built(balance=0, **options), drawn(T, D).requires_grad_()
    mix, plain = layer.shared.coefficient, by_hand(layer, x)[0]
    branch = layer.shared.branch(x)
    rows = [reference_gates.residual(*each, mix.weight, mix.bias) for each in zip(x, plain, branch, strict=True)]
    assert same(layer, x, torch.stack(rows))
    assert not close(plain + branch, torch.stack(rows), 1e-2)
    share = torch.stack(rows) - branch
    assert close(share.norm(dim=1) / (plain - branch).norm(dim=1), (x @ mix.weight.T + mix.bias).softmax(1)[:, 0], 1e-9)
    given = MoE(D, H, E, gate=layer.gate, experts=layer.experts, shared=Residual(layer.shared.branch))
    given.shared.coefficient, given.free = mix, layer.free
    assert torch.equal(given(x), layer(x))


def test_residual_coefficients_are_float32_under_autocast():
    layer, x = MoE(8, 8, E, shared=Residual(1), seed=0), drawn(T, 8, dtype=torch.float32)
    seen = []
    layer.shared.branch.register_forward_hook(lambda _, args, y: seen.append((args[0].dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert y.dtype == torch.float32
    assert close(y, layer(x), 2e-2)


def _spread(options, weight_on="output"):
    rank, halves = torch.distributed.get_rank(), drawn(2, T, D)
    one, many = (MoE(D, H, 4, 2, seed=0, balance=Balance(over="global"), **options).double() for _ in range(2))
    one.experts.weight_on = many.experts.weight_on = weight_on
    many.load_state_dict(one.state_dict())
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    parallelize(many, mesh, dispatcher="flat", overlap=2)
    whole, mine = one(halves), many(halves[rank])
    ((whole * whole).sum() / 2 + aux_loss(one)).backward()
    ((mine * mine).sum() + aux_loss(many)).backward()
    sync_gradients(many, mesh)
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in many.parameters()]
    return close(mine, whole[rank], 1e-12) and all(
        close(g, p.grad, 1e-10) for g, p in zip(grads, one.parameters(), strict=True)
    )


@pytest.mark.parametrize("options", [({"free": KINDS},), ({}, "input"), ({"shared": Residual(1)},)], ids=str)
def test_many_ranks_equal_one(options):
    torch.manual_seed(0)
    assert ranks.run(2, _spread, *options) == [True, True]
