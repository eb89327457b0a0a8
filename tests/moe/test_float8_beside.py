"""Experts in float8 beside loss scales, copies, rows of any size, and derivatives that they do not have."""

import copy
import pickle

import pytest
import torch
from layers_in_float8 import D, drawn, error, exact, layer, step
from reference import close
from turnout.models import EMA
from turnout.moe.experts import float8, triton_path
from turnout.moe.experts.triton_path import fused
from turnout.moe.upcycling import merge_experts


def test_rows_of_any_size():
    """1e-30 and 1e30 in one batch: ReLU and no biases, so that results grow with rows. Some of its slopes jump."""
    moe, size = layer(experts="relu"), torch.tensor([1e-30, 1.0, 1e30]).repeat(20).unsqueeze(1)
    with torch.no_grad():
        moe.gate.weight.zero_()  # all as likely
    x, grad = drawn(60, D) * size, drawn(60, D, seed=1) * size.flip(0)
    found, true = step(moe, x, grad), exact(moe, x, grad)
    for name, by, limit in (("y", size, 0.08), ("x", size.flip(0), 0.2)):
        for each in range(3):
            rows = [(t[name] / by)[each::3] for t in (found, true)]
            assert error(*rows) < limit, (name, each)


def test_a_loss_scale_changes_nothing():
    """A power of two, as GradScaler takes: it goes into the scales, and out again."""
    moe, x = layer(), drawn(50, D)
    grads = []
    for scale in (1.0, 2.0**10):
        with torch.autocast("cpu", torch.float16):
            y = moe(x)
        grads.append(torch.autograd.grad(y.float().square().sum() * scale, list(moe.experts.parameters())))
    assert all(close(b / 2**10, a, 1e-3) for a, b in zip(*grads, strict=True))


def test_copies_keep_it_and_weights_do_not_have_it():
    moe, x = layer(), drawn(30, D)
    average = EMA([moe], 0.9)
    with average.applied():
        assert torch.equal(moe(x), layer()(x))
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(copied(x), moe(x))
    plain = layer(precision=None)
    plain.load_state_dict(moe.state_dict())
    assert plain.experts.precision is None
    assert merge_experts(moe, [[0, 1], [2, 3]]).experts.precision == "fp8"


@pytest.mark.parametrize("how", ["torch, fp8", "triton"])
def test_no_second_derivatives_and_no_batched_gradients(how, monkeypatch):
    monkeypatch.setattr(triton_path, "_kit", lambda how: float8)  # without Triton
    x, w, counts = drawn(4, 8).requires_grad_(), drawn(1, 8, 8).requires_grad_(), torch.tensor([4])
    y = fused(x, torch.ones(4), counts, "gelu", [(w, None)], (w.mT, None), how=how)
    said = 'precision="fp8" has no {}: set precision=None'
    said = said if "fp8" in how else 'kernel="triton" has no {}: set kernel="torch"'
    with pytest.raises(NotImplementedError, match=said.format(r"batched gradients \(is_grads_batched=True.*")):
        torch.autograd.grad(y, x, torch.ones(2, 4, 8), is_grads_batched=True, retain_graph=True)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=said.format(r"second derivatives \(create_graph=True\)")):
        torch.autograd.grad(first.sum(), w)
