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
from turnout.moe import MoE, parallelize, sync_gradients
from turnout.moe.adapters import add_lora

KINDS = pytest.mark.parametrize("experts", ["swiglu", perceptron])


def spread_over(ranks: int, *names: str):
    shape = (ranks,) if len(names) < 2 else (ranks // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names or ("ep",))


def layer(seed: int = 0, **options) -> MoE:
    torch.manual_seed(seed)
    return MoE(WIDTH, 12, EXPERTS, seed=seed, **{"bias": True, **options}).double()


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
        ("outside", "w_up of layer 1 is the same tensor as 1.shared.weight outside the experts"),
        ("experts", f"num_experts={EXPERTS + 1} of layer 1 does not split over ep=2 ranks"),
        ("alone", f"num_experts={EXPERTS + 1} of layer 1 does not split over ep=2 ranks"),
    ],
)
def test_what_is_refused_is_left_as_it_was(case, message):
    for error in errors(2, refused, case):
        assert error.startswith("ValueError")
        assert message in error


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
    if how in ("lora", "frozen"):
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
    for error in errors(ranks, changed, "gelu", how):
        assert "modified by an inplace operation" in error, error
