"""The life of a layer's losses: which forwards `aux_loss` covers, whatever else the layer does in between."""

import copy
import warnings

import pytest
import torch
from reference import close
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from turnout.moe import Balance, MoE, aux_loss
from turnout.moe.losses import balance_loss

D, H, E = 6, 5, 4


def tokens(number, seed=0):
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**options):
    layer = MoE(D, H, E, seed=1, **options)
    if layer.gate.learned:
        nn.init.normal_(layer.gate.weight, generator=torch.Generator().manual_seed(3))
    return layer.double()


def loss_of(layer, *batches):
    return sum(1e-2 * balance_loss(layer.gate(x)) for x in batches)


def router_gradient(layer, loss):
    return torch.autograd.grad(loss, layer.gate.weight, retain_graph=True)[0]


def holds(layer, *batches):
    """Whether `aux_loss` is of these batches, and so is its gradient."""
    ours, wanted = aux_loss(layer), loss_of(layer, *batches)
    return close(ours, wanted, 1e-12) and close(router_gradient(layer, ours), router_gradient(layer, wanted), 1e-11)


X, Y, Z = tokens(9), tokens(7, seed=1), tokens(8, seed=2)


def test_the_batches_differ():
    layer = built()
    layer(X)
    assert not close(aux_loss(layer), loss_of(layer, Y), 1e-3)
    assert not close(loss_of(layer, Y), loss_of(layer, Z), 1e-3)


def evaluated(layer, x, grad):
    layer.eval()
    with torch.set_grad_enabled(grad):
        y = layer(x)
    layer.train()
    return y


@pytest.mark.parametrize("grad", [True, False])
def test_an_evaluation_changes_nothing_in_the_step_under_way(grad):
    layer = built()
    layer(X)
    evaluated(layer, Y, grad)
    assert holds(layer, X)
    layer(X)
    evaluated(layer, Y, grad)
    layer(Z)
    assert holds(layer, X, Z)
    layer(X)
    with torch.set_grad_enabled(grad):
        layer.eval()(Y)
        assert close(aux_loss(layer), loss_of(layer, Y), 1e-12)  # in eval mode it is the evaluation's
    layer.train()
    assert holds(layer, X)


@pytest.mark.parametrize("grad", [True, False])
def test_the_loss_of_an_evaluation_is_not_taken_for_that_of_a_step(grad):
    layer = built()
    (layer(X).sum() + aux_loss(layer)).backward()
    evaluated(layer, Y, grad)
    with pytest.raises(RuntimeError, match=r"of the MoE layer itself has no graph.*ran in eval mode"):
        aux_loss(layer)
    with torch.no_grad():
        assert close(aux_loss(layer), loss_of(layer, Y), 1e-12)  # to look at
    layer(Z)
    assert holds(layer, Z)


def test_an_evaluation_without_losses_is_no_mistake():
    layer = built(balance=0)
    evaluated(layer, X, grad=False)
    assert aux_loss(layer) == 0


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference"])
def test_evaluations_stand_alone(how):
    layer = built().train(how != "eval")
    with {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[how]():
        for x in (X, Y):
            layer(x)
        assert close(aux_loss(layer), loss_of(layer, Y), 1e-12)


def test_a_training_forward_without_gradients():
    layer = built()
    with torch.no_grad():
        layer(X)  # tried out, before a step
    layer(Y)
    assert holds(layer, Y)
    layer(Y)
    with torch.no_grad():
        layer(X)  # within one: it may be a part of the step that lost its graph
    layer(Z)
    with pytest.raises(RuntimeError, match=r"without gradients\. Call aux_loss before an evaluation"):
        aux_loss(layer)
    layer(Z)
    assert holds(layer, Z)


def test_a_step_ends_with_aux_loss_or_with_its_backward():
    layer = built()
    layer(X)
    aux_loss(layer)
    layer(Y)
    assert holds(layer, Y)
    y = layer(X)
    y.sum().backward(retain_graph=True)
    assert close(aux_loss(layer), loss_of(layer, X), 1e-12)  # after the backward is not too late
    y.sum().backward()
    layer(Z)
    assert holds(layer, Z)


def test_all_forwards_of_a_step_count():
    layer, other = built(), built()
    for x in (X, Y, Z):
        layer(x)
    other(Y)
    both = nn.ModuleList([layer, other])
    assert close(aux_loss(both), loss_of(layer, X, Y, Z) + loss_of(other, Y), 1e-12)


def test_the_backward_of_one_step_does_not_end_the_next():
    layer = built()
    y = layer(X)
    first = aux_loss(layer)
    layer(Y)  # of the next micro-batch, before the first one's backward
    (y.sum() + first).backward()
    layer(Z)
    assert holds(layer, Y, Z)


def test_losses_that_are_not_kept():
    layer = built()
    layer(X)
    loss = aux_loss(layer)
    assert loss > 0
    assert aux_loss(layer, keep=False) == loss
    assert aux_loss(layer) == 0
    layer.eval()(Y)
    assert aux_loss(layer, keep=False) > 0
    assert aux_loss(layer) == 0


def test_recomputation_is_not_counted():
    layer, x = built(), tokens(9).requires_grad_()
    with set_checkpoint_early_stop(False):  # or recomputation would end before the layer does
        y = checkpoint(layer, x, use_reentrant=False)
        (y.sum() + aux_loss(layer)).backward()
    layer(Y)
    assert holds(layer, Y)


def test_reentrant_checkpoint_is_refused():
    model, x = nn.ModuleDict({"moe": built()}), tokens(9).requires_grad_()
    y = checkpoint(model["moe"], x, use_reentrant=True)
    for part, name in ((model, "layer moe"), (model["moe"], "the MoE layer itself")):
        with pytest.raises(RuntimeError, match=f"balance loss of {name} has no graph.*use_reentrant=False"):
            aux_loss(part)
    y.sum().backward()
    model["moe"](x)  # without checkpointing it is right again
    assert close(aux_loss(model), loss_of(model["moe"], x), 1e-12)


def test_nothing_of_a_step_is_left_when_the_next_begins():
    """Else gradients of this step would be added on that one's CUDA stream, which a graph being captured forbids."""
    layer, x, seen = built(), tokens(9), []

    def notes():  # of what adds to the router's gradient: they last as long as a graph that leads there
        return torch.autograd.graph.get_gradient_edge(layer.gate.weight).node.metadata

    layer.gate.register_forward_pre_hook(lambda *_: seen.append("step" in notes()))
    for _ in range(2):
        y = layer(x)
        notes()["step"] = True
        (y.square().mean() + aux_loss(layer)).backward()
        assert "step" in notes()
        del y
    assert seen == [False, False]


# ---- a balance loss that nobody asks for


def steps(layer, number=3, **options):
    for _ in range(number):
        layer(X, **options).square().sum().backward()


def warned(run):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in said]


def test_a_forgotten_balance_loss_is_warned_of_once_a_layer():
    first, second = built(), MoE(D, 7, E, seed=1).double()
    (text,) = warned(lambda: steps(first))
    assert text.startswith("the balance loss of MoE(dim=6, num_experts=4) was left out of the last step")
    assert "aux_loss(model)" in text
    assert "layer.balance = Balance(weight=0)" in text
    assert not warned(lambda: steps(first))
    assert len(warned(lambda: steps(nn.Sequential(second, built())))) == 2
    with pytest.warns(UserWarning, match="balance loss"):
        steps(copy.deepcopy(first))  # a layer of its own
    with pytest.warns(UserWarning, match="balance loss"):
        steps(built(balance=Balance(0, z_loss=0.1)))


def test_a_part_of_a_step_may_be_forgotten():
    layer = built()
    y = layer(X)
    loss = aux_loss(layer)
    z = layer(Y)
    (y.sum() + z.sum() + loss).backward()
    assert len(warned(lambda: layer(X))) == 1


def frozen():
    layer = built()
    layer.gate.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        built(balance=0),
        frozen(),
        built().requires_grad_(False),
        *(built(gate=gate) for gate in ("sigmoid", "random", "sinkhorn", "base", "expert_choice")),
    ],
    ids=lambda layer: repr(layer.gate),
)
def test_no_warning_where_there_is_no_balance_loss(layer):
    x = tokens(9).requires_grad_()
    assert not warned(lambda: [layer(x).sum().backward() for _ in range(3)])


def test_no_warning_where_it_is_asked_for():
    layer = built()

    def run():
        for _ in range(2):
            (layer(X).sum() + aux_loss(layer)).backward()
            layer(X).sum().backward(retain_graph=True)
            aux_loss(layer).backward()  # on its own, afterwards
            y, z = layer(X), layer(Y)
            (y.sum() + z.sum() + aux_loss(layer)).backward()
            evaluated(layer, X, grad=True).sum().backward()
            with torch.no_grad():
                layer(X)
            layer(X)  # whose output is used for nothing
            aux_loss(layer, keep=False)

    assert not warned(run)
