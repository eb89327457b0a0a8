"""Experts in float8: scales, errors against float64, what becomes of odd rows, training, and what is refused."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers_in_float8 import D, E, H, drawn, error, exact, layer, step
from reference import close
from torch import nn
from turnout.dispatch import torch_internals
from turnout.moe import Capacity, MoE, aux_loss
from turnout.moe.adapters import add_lora, quantize_experts
from turnout.moe.experts import FeedForwardExperts, float8
from turnout.moe.experts.triton_path import fused


@given(st.floats(2.0**-118, 2.0**127, width=32))
def test_the_largest_of_a_row_comes_near_the_largest_of_float8(largest):
    scale, inverse = float8.scales(torch.tensor([largest]))
    assert scale * inverse == 1
    assert scale.log2().frac() == 0
    assert 224 < largest * float(inverse) <= 448


def test_odd_rows():
    x = drawn(8, 16)
    x[0], x[1, 3], x[2, 3], x[3] = 0, torch.nan, -torch.inf, x[3] * 2.0**-140
    x[4, 5] = 1e4 * x[4].abs().max()  # an outlier
    (a,) = float8.rows(x)
    again = a.values.float() * a.scale.unsqueeze(1)
    assert again[0].eq(0).all()
    assert again[1:3].isnan().all(), "what is not finite never becomes finite"
    assert again[3].isfinite().all()
    assert close(again[4], x[4], 2**-4)
    assert ((again[5:] - x[5:]).abs() <= x[5:].abs() * 2**-4 + 2.0**-10 * a.scale[5:].unsqueeze(1)).all()
    both = float8.rows(x[5:], 100 * x[5:])
    assert torch.equal(both[0].scale, both[1].scale)
    assert both[1].values.float().abs().max() <= 448


@pytest.mark.parametrize(
    "options", [{}, {"experts": "gelu", "bias": True}, {"capacity": Capacity(1.0, pad=True)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_against_float64(options, dtype):
    """A product of two numbers in e4m3 is off by 3.7 % of itself, root mean square, and a layer has a chain of two."""
    moe, x, grad = layer(dtype, **options), drawn(300, D, seed=1).to(dtype), drawn(300, D, seed=2).to(dtype)
    found, true = step(moe, x, grad), exact(moe, x, grad)
    for name, value in found.items():
        assert value.dtype == dtype
        limit = 0.004 if name == "b_down" else 0.08  # a plain sum of the gradients
        assert error(value, true[name]) < limit, name
    assert error(found["y"], true["y"]) > 0.02, "in float8?"
    off = step(layer(dtype, precision=None, **options), x, grad)
    assert error(off["y"], true["y"]) < 0.01


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_products_are_those_of_the_rounded_numbers(activation):
    """By hand in float64, with the same roundings: rows of x, of hidden rows and of gradients, columns of matrices."""
    gated = activation == "swiglu"
    up, gate, down = drawn(2, 16, 24, seed=1), drawn(2, 16, 24, seed=2), drawn(2, 24, 16, seed=3)
    x, weight, grad = drawn(9, 16, seed=4), drawn(9, seed=5).abs(), drawn(9, 16, seed=6)
    counts, owner = torch.tensor([4, 5]), [0] * 4 + [1] * 5
    x, up, gate, down = (t.requires_grad_() for t in (x, up, gate, down))
    ups = [(up, None), (gate, None)] if gated else [(up, None)]
    y = fused(x, weight, counts, activation, ups, (down, None), how="torch, fp8")
    grads = torch.autograd.grad(y, [x, up, down], grad)

    def rounded(t, dim=-1):
        (a,) = float8.rows(t.detach().movedim(dim, -1))
        return (a.values.double() * a.scale.double().unsqueeze(-1)).movedim(-1, dim)

    def each(row, matrix):
        return torch.stack([row[r] @ matrix[e] for r, e in enumerate(owner)])

    rows = rounded(x)
    us = [each(rows, rounded(m, 1)).requires_grad_() for m, _ in ups]
    act = torch.nn.functional.silu(us[1]) * us[0] if gated else us[0].relu().square()
    hidden = act * weight.double().unsqueeze(1)
    assert close(y, each(rounded(hidden.float()), rounded(down, 1)), 1e-5)
    back = each(rounded(grad), rounded(down).mT)
    slopes = torch.autograd.grad(hidden, us, back)
    joint = float8.rows(*(s.float() for s in slopes)), float8.rows(*(m.detach() for m, _ in ups))
    wide = [[a.values.double() * a.scale.double().unsqueeze(-1) for a in each] for each in joint]
    assert close(grads[0], sum(each(s, m.mT) for s, m in zip(*wide, strict=True)), 1e-5)
    spans = [(0, 4), (4, 9)]  # weights' gradients are exact
    assert close(grads[1], torch.stack([x[a:b].double().T @ slopes[0][a:b] for a, b in spans]), 1e-6)
    assert close(grads[2], torch.stack([hidden[a:b].T @ grad[a:b].double() for a, b in spans]), 1e-6)


def test_experts_without_rows_and_no_tokens():
    moe = layer(bias=True)
    with torch.no_grad():
        moe.gate.weight[2:] = -moe.gate.weight[2:].abs() - 9
    x = drawn(30, D).abs()
    found = step(moe, x, drawn(30, D, seed=2))
    counts = moe.stats.tokens_per_expert
    assert (counts == 0).any()
    assert found["w_up"][counts == 0].eq(0).all()
    assert error(found["y"], exact(moe, x, drawn(30, D, seed=2))["y"]) < 0.08
    nothing = step(moe, x[:0], x[:0])
    assert nothing["y"].shape == (0, D)
    assert nothing["w_down"].eq(0).all()


@pytest.mark.parametrize("experts", ["swiglu", "gelu"])
@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_without_gradients(no_grad, experts):
    moe, x = layer(experts=experts), drawn(30, D)
    expected = moe(x)
    with no_grad():
        assert torch.equal(moe(x), expected)


def test_nan_stays_in_its_row_and_in_its_expert():
    moe, x, grad = layer(), drawn(40, D), drawn(40, D, seed=1)
    before = step(moe, x, grad)
    with torch.no_grad():
        moe.experts.w_up[3, 5, 7] = torch.nan
    after = step(moe, x, grad)
    visits = (moe.gate(x).expert == 3).any(1)
    assert visits.any()
    assert not visits.all()
    assert torch.equal(after["y"].isnan().any(1), visits)
    assert torch.equal(after["y"][~visits], before["y"][~visits])
    assert after["w_gate"][3].isnan().any()
    assert not after["w_gate"][:3].isnan().any()


@pytest.mark.parametrize("how", ["recompute", "compile", "autocast"])
def test_beside(how):
    dtype = torch.bfloat16 if how == "autocast" else torch.float32
    plain, x, grad = layer(dtype), drawn(50, D).to(dtype), drawn(50, D, seed=1).to(dtype)
    moe = layer()
    moe.experts.recompute = how == "recompute"
    call = torch.compile(moe, backend="eager", fullgraph=True) if how == "compile" else moe
    call.experts = moe.experts
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = step(call, x, grad)
    for name, value in step(plain, x, grad).items():
        assert close(found[name], value, 2e-2 if how == "autocast" else 1e-6), name


def test_training_follows_bfloat16():
    """Regression on a random network, with float32 parameters under autocast."""
    losses = {}
    target = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    for p, seed in zip(target.parameters(), range(4), strict=True):
        p.data = drawn(*p.shape, seed=seed) / p.shape[-1] ** 0.5
    for precision in (None, "fp8"):
        torch.manual_seed(0)
        model = MoE(16, 32, 4, 2, seed=0)
        model.experts.precision = precision
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[precision] = []
        for i in range(90):
            x = drawn(128, 16, seed=100 + i)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x).float() - target(x).float()).square().mean()
            (loss + aux_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(float(loss.detach()))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    first, last = (torch.tensor([losses[p][s] for p in (None, "fp8")]).mean(1) for s in (slice(5), slice(-20, None)))
    assert (last < 0.4 * first).all()
    assert abs(last[1] / last[0] - 1) < 0.03, f"float8 ends where bfloat16 does: {last}"
    assert losses[None] != losses["fp8"]


def test_what_is_refused(monkeypatch):
    moe = layer()
    with pytest.raises(ValueError, match="precision must be one of None, 'fp8'; got 'mxfp8'"):
        moe.experts.precision = "mxfp8"
    with pytest.raises(TypeError, match=r"takes float32, bfloat16 or float16; got torch.float64: set precision=None"):
        layer(torch.float64)(drawn(3, D).double())
    with pytest.raises(NotImplementedError, match=r"torch.func nor forward mode: set precision=None"):
        torch.func.grad(lambda x: moe(x).sum())(drawn(3, D))
    with pytest.raises(ValueError, match='precision="fp8", which has no adapters'):
        add_lora(moe, 2)
    with pytest.raises(ValueError, match='precision="fp8", which takes no 4 bits'):
        quantize_experts(moe)
    adapted = add_lora(layer(precision=None), 2)
    with pytest.raises(ValueError, match=r'precision="fp8" has no adapters: merge_lora\(model\) first'):
        adapted.experts.precision = "fp8"
    modules = layer(experts=lambda: nn.Linear(D, D), precision=None)
    with pytest.raises(ValueError, match="ModuleExperts has no precision='fp8', which FeedForwardExperts alone"):
        modules.experts.precision = "fp8"
    assert "fp8" in repr(moe.experts)
    assert "precision" not in repr(adapted.experts)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with pytest.raises(NotImplementedError, match="never compiled for ROCm"):
        moe(drawn(3, D))


class Far:
    """What `check_float8` asks of rows on a GPU."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.mark.parametrize(("major", "minor", "size"), [(8, 0, 64), (8, 9, 64), (9, 0, 64), (9, 0, 24), (10, 0, 64)])
def test_which_gpus(major, minor, size, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    if (major, minor) < (8, 9):
        with pytest.raises(ValueError, match="sm_89 or later: set precision=None"):
            float8.check_float8(Far(), "auto", size, size)  # pyright: ignore[reportArgumentType]
        return
    float8.check_float8(Far(), "triton", size, size)  # pyright: ignore[reportArgumentType]
    fits = major == 9 and size == 64
    with nullcontext() if fits else pytest.raises(ValueError, match=r'needs sm_90, .*some GPU: set kernel="triton"'):
        float8.check_float8(Far(), "torch", size, size)  # pyright: ignore[reportArgumentType]


def test_layouts_are_those_of_torchs_operator(monkeypatch):
    """On the meta device, where torch compares dtypes, shapes and strides as on a GPU."""
    calls, operator = [], torch_internals.scaled_grouped_mm
    monkeypatch.setattr(float8, "torch_multiplies", lambda *_: True)
    monkeypatch.setattr(float8, "scaled_grouped_mm", lambda *given: calls.append(given) or operator(*given))
    groups = float8.Groups(torch.empty(4, dtype=torch.int32, device="meta"), 40)
    rows, weight = torch.empty(40, 32, dtype=torch.bfloat16, device="meta"), torch.empty(40, device="meta")
    up = torch.empty(4, 32, 48, dtype=torch.bfloat16, device="meta")
    token = torch.empty(40, dtype=torch.int64, device="meta")
    (a,), w = float8.rows(rows), float8.columns(up)
    hidden, *before = float8.up(a, token, groups, weight, w, w, "swiglu", True)
    assert hidden.shape == before[0].shape == before[1].shape == (40, 48)
    y = float8.down([(float8.rows(hidden)[0], float8.columns(up.mT.contiguous()))], groups)
    to_hidden = float8.hidden_backward(a, token, groups, weight, float8.rows(up.mT.contiguous())[0], *before, "swiglu")
    pairs = zip(float8.rows(*to_hidden[1]), float8.rows(up, up), strict=True)
    assert y.shape == float8.down(list(pairs), groups).shape == rows.shape
    assert y.dtype == torch.bfloat16
    assert len(calls) == 6


def test_what_is_kept_for_the_backward(monkeypatch):
    """x, and what stands before the activation: nothing in float8, and no rows of x."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    with torch.device("meta"):
        experts = FeedForwardExperts(D, H, E).bfloat16()
        x, weight = torch.zeros(64, D, dtype=torch.bfloat16, requires_grad=True), torch.zeros(64)
        counts = torch.zeros(E, dtype=torch.int64)
    experts.precision, kept = "fp8", {}

    def keep(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        experts(x, weight, counts)
    assert sum(kept.values()) == 2 * (64 * D + 2 * 64 * H) + 4 * 64 + 4 * E  # x, up, gate; weight, ends
