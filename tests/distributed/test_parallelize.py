"""What `parallelize` takes and leaves: ties, models that differ, state dicts, weights that change under a backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, perceptron, tokens, whole
from ranks import errors, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.moe import MoE, add_lora, aux_loss, fully_shard_experts, parallelize, sync_gradients
from turnout.moe.alike import checksum

KINDS = pytest.mark.parametrize("experts", ["swiglu", perceptron])


def spread_over(ranks: int, *names: str):
    shape = (ranks,) if len(names) < 2 else (ranks // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names or ("ep",))


def layer(seed: int = 0, **options) -> MoE:
    torch.manual_seed(seed)
    return MoE(WIDTH, 12, EXPERTS, seed=seed, bias=True, **options).double()


def tied(how: str) -> nn.Sequential:
    """Two layers that share all tensors of their experts, or the experts themselves."""
    model = nn.Sequential(layer(), layer(1))
    if how == "module":
        model[1].experts = model[0].experts
    else:
        for name in list(model[0].experts._parameters):
            setattr(model[1].experts, name, getattr(model[0].experts, name))
    return model


def trained_tied(how):
    mesh, one, model = spread_over(2), tied(how), parallelize(tied(how), spread_over(2))
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in one.named_parameters()]
    assert model[0].experts.w_up is model[1].experts.w_up
    x = tokens(8)
    for m, mine, scale in ((one, x, 1), (model, x.chunk(2)[dist.get_rank()], 2)):
        optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
        (m(mine).square().sum() * scale / len(x)).backward()
        if m is model:
            sync_gradients(model, mesh)
        optimizer.step()
    for name, p in one.named_parameters():
        close(whole(model.get_parameter(name)), p.detach(), 1e-12, name)


@pytest.mark.parametrize("how", ["module", "parameters"])
def test_experts_that_layers_share_stay_shared(how):
    run(2, trained_tied, how)


def refused(case):
    """What is refused after the first of two layers could have been spread leaves all as it was, on every rank."""
    mesh = spread_over(2)
    model = nn.Sequential(layer(), layer(1))
    if case == "outside":
        model[1].shared = nn.Linear(WIDTH, WIDTH)
        model[1].shared.weight = model[1].experts.w_up
    elif case == "experts":
        model[1] = MoE(WIDTH, 12, EXPERTS + 1)
    elif case == "alone" and dist.get_rank() == 1:
        parallelize(model[1], init_device_mesh("cpu", (1, 2), mesh_dim_names=("edp", "ep"))["edp"])
        model[1].num_experts = EXPERTS + 1  # a fault that only this rank sees
    before = {name: id(p) for name, p in model.named_parameters()}
    try:
        parallelize(model, mesh)
    except ValueError:
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert all(m.balance_group is None and not m.dispatcher.groups for m in model)
        raise


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("outside", "w_up of layer 1 is 1.shared.weight of the model as well"),
        ("experts", f"num_experts={EXPERTS + 1} of layer 1 does not split over ep=2 ranks"),
        ("alone", f"num_experts={EXPERTS + 1} of layer 1 does not split over ep=2 ranks"),
    ],
)
def test_what_is_refused_is_left_as_it_was(case, message):
    for error in errors(2, refused, case):
        assert error.startswith("ValueError")
        assert message in error


def other_seed(gate):
    """Built under other seeds, given the same weights: taken, and drawn alike from then on."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(MoE(WIDTH, 12, EXPERTS, gate=gate, seed=7 + dist.get_rank()))
    add_lora(model, 2)
    same = nn.Sequential(layer(3, gate=gate)).float()
    add_lora(same, 2)
    model.load_state_dict({k: v for k, v in same.state_dict().items() if "experts.b_" not in k})
    parallelize(model, spread_over(2))
    assert model[0].experts.seed == 7
    seeds = [None] * 2
    dist.all_gather_object(seeds, [m.seed for m in model.modules() if hasattr(m, "seed")])
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("gate", ["topk", "sigmoid"])
def test_equal_weights_under_other_seeds(gate):
    run(2, other_seed, gate)


def differs(what):
    """One number on one of three ranks."""
    gate = "hash" if what == "seed of the hash" else "sigmoid"
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(gate=gate, shared_experts=1))
    if dist.get_rank() == 1:
        moe = model[1]
        with torch.no_grad():
            if what == "bias":
                moe.gate.expert_bias[0] = 1.0
            elif what == "expert":
                moe.experts.w_up[3, 0, 0] += 1e-12
            elif what == "order":
                w = moe.experts.w_down
                w[[0, 1]] = w[[1, 0]]
            elif what == "shared":
                moe.shared.up.weight.neg_()
            elif what == "rate":
                moe.gate.rate = 0.5
            elif what == "activation":
                moe.experts.activation = "gelu"
            elif what == "counts":
                moe.gate.load += 5  # what a rank has counted is its own
            else:
                moe.gate.seed = 1
    parallelize(model, spread_over(3, "edp"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bias", "the values of buffer gate.expert_bias of layer 1 on rank 1 are not those on ranks 0, 2"),
        ("expert", "the values of parameter experts.w_up of layer 1 on rank 1 are not those on ranks 0, 2"),
        ("order", "the values of parameter experts.w_down of layer 1 on rank 1 are not those on ranks 0, 2"),
        ("shared", "the values of parameter shared.up.weight of layer 1 on rank 1 are not those on ranks 0, 2"),
        ("rate", "rate=0.5"),
        ("activation", "activation='gelu'"),
        ("seed of the hash", "seed=1"),
        ("counts", ""),
    ],
)
def test_layers_that_differ_are_told_apart(what, message):
    found = errors(3, differs, what)
    for error in found:
        assert error == found[0]
        assert message in error
        assert bool(error) == bool(message)


def on_meta(seed):
    with torch.device("meta"):
        model = nn.Sequential(MoE(WIDTH, 12, EXPERTS, seed=seed + dist.get_rank() * (seed > 0)))
    parallelize(model, spread_over(2))


def test_seeds_must_agree_where_there_are_no_weights_yet():
    assert errors(2, on_meta, 0) == ["", ""]
    for error in errors(2, on_meta, 1):
        assert "the seed of the experts of layer 0 is 1 on rank 0, 2 on rank 1" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_checksum_knows_values_and_their_order(dtype):
    x = torch.randn(700, 3).mul(9).to(dtype)
    seen = {checksum(x), checksum(x.flip(0)), checksum(x[:-1])}
    assert len(seen) == 3
    assert checksum(x.clone()) in seen
    if dtype.is_floating_point:
        assert checksum(-x) not in seen
        assert checksum(x, chunk=100) != checksum(torch.cat([x[100:200], x[:100], x[200:]]), chunk=100)


def no_layer(model):
    with pytest.warns(UserWarning, match="Linear has no MoE layer"):
        parallelize(nn.Linear(3, 3), spread_over(2))


def test_a_model_without_layers_is_warned_of():
    run(2, no_layer, None)


def itself():
    sync_gradients(layer(), spread_over(2))


def test_a_model_that_is_the_layer_has_a_name():
    for error in errors(2, itself):
        assert error.startswith("ValueError: the MoE layer itself is on one rank")


class Counting(nn.Module):
    """An expert with a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("factor", torch.rand(()) + 0.5)

    def forward(self, x):
        return self.linear(x) * self.factor


def loaded(experts, assign):
    """The whole state of another model: as on one process."""
    mesh = spread_over(4, "ep", "etp") if experts == "etp" else spread_over(4)
    kind = "gelu" if experts == "etp" else experts
    other = layer(1, experts=kind)
    many = parallelize(layer(experts=kind), mesh)
    many.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    for name, value in other.state_dict().items():
        assert torch.equal(whole(many.state_dict()[name]), value), name
    x = tokens(8)
    close(many(x).detach(), other(x).detach(), 1e-12)
    spread = many.state_dict()
    with torch.no_grad():
        again = parallelize(layer(experts=kind), mesh)
        again.load_state_dict(spread, assign=assign)
        assert torch.equal(again(x), many(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("experts", ["swiglu", Counting, "etp"])
def test_a_whole_state_dict_loads_after_parallelize(experts, assign):
    run(4, loaded, experts, assign)


def not_mine(path, how):
    many = parallelize(layer(), spread_over(2))
    if how == "saved":
        if dist.get_rank() == 0:
            torch.save(many.state_dict(), path)
        dist.barrier()
        state = torch.load(path, weights_only=False)
    else:
        state = parallelize(layer(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("edp", "ep"))).state_dict()
    try:
        many.load_state_dict(state, assign=True)
    except ValueError as error:
        return str(error)
    return ""


def test_a_state_dict_of_another_ranks_experts_is_refused(tmp_path):
    found = run(2, not_mine, tmp_path / "state.pt", "saved")
    assert found[0] == ""
    assert "was saved by the rank at [0] of the mesh, and holds its experts; rank 1 is at [1]" in found[1]
    for error in run(2, not_mine, None, "elsewhere"):
        assert "load with torch.distributed.checkpoint" in error


def changed(experts, how):
    """An error where one process raises one; none where nothing is changed."""
    names = ("ep", "etp") if how == "etp" else ("ep",)
    model = parallelize(nn.Sequential(layer(experts=experts)), spread_over(2 * len(names), *names))
    if how == "lora":
        add_lora(model, 2)
    many, weight = model[0], None
    if how == "unchanged":
        many(tokens(4)).square().sum().backward()
        return
    y = many(tokens(4).requires_grad_())
    weight = next(p for p in many.experts.parameters() if p.ndim == 3 and p.requires_grad == (how != "frozen"))
    with torch.no_grad():
        weight.mul_(2)
    y.square().sum().backward()


@KINDS
@pytest.mark.parametrize("how", ["trained", "unchanged"])
def test_weights_changed_before_the_backward_raise(experts, how):
    for error in errors(2, changed, experts, how):
        assert ("modified by an inplace operation" in error) == (how != "unchanged"), error


@pytest.mark.parametrize(("how", "ranks"), [("lora", 2), ("frozen", 2), ("etp", 4)])
def test_adapters_frozen_and_sliced_weights_too(how, ranks):
    for error in errors(ranks, changed, "gelu", "lora" if how == "frozen" else how):
        assert "modified by an inplace operation" in error, error


def sharded(hidden):
    """FSDP2 of experts with biases, their hidden width split over etp, as one process."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("edp", "ep", "etp"))
    x = tokens(8)
    one, many = (nn.Sequential(MoE(WIDTH, hidden, EXPERTS, bias=True, seed=0), nn.Softplus()).double() for _ in "12")
    many[0].gate.load_state_dict(one[0].gate.state_dict())
    parallelize(many, mesh)
    fully_shard_experts(many, mesh)
    fully_shard(many)
    (one(x).square().sum() / len(x) + aux_loss(one) * 0).backward()
    mine = x.chunk(4)[dist.get_rank()]
    (many(mine).square().sum() * 4 / len(x) + aux_loss(many) * 0).backward()
    for name, p in one.named_parameters():
        close(whole(many.get_parameter(name).grad), p.grad, 1e-12, name)
    other = MoE(WIDTH, hidden, EXPERTS, bias=True, seed=1).double()
    many[0].experts.load_state_dict(other.experts.state_dict())
    for name, p in other.experts.named_parameters():
        assert torch.equal(whole(many[0].experts.get_parameter(name)), p), name
    many[0].experts.reset_parameters()
    for name, p in many[0].experts.named_parameters():
        fresh = MoE(WIDTH, hidden, EXPERTS, bias=True, seed=0).double().experts
        assert torch.equal(whole(p), fresh.get_parameter(name)), name


def splits_nowhere():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("edp", "ep"))
    fully_shard_experts(parallelize(nn.Sequential(MoE(3, 5, 7, seed=0)), mesh), mesh)


def test_fsdp_of_sizes_that_split_nowhere_is_refused():
    for error in errors(2, splits_nowhere):
        assert error.startswith("ValueError: 0.experts.w_up, of which a rank has (7, 3, 5), does not split over edp=2")


@pytest.mark.parametrize("hidden", [12, 14, 2])
def test_fsdp_of_experts_split_inside_with_biases(hidden):
    run(4, sharded, hidden)
