"""The router's linear map of bfloat16 tokens: its pieces on a CPU, with exact products emulated; itself on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from reference import close
from turnout.moe import MoE
from turnout.moe.gates import gate
from turnout.moe.gates import wide_linear as wide
from turnout.moe.gates.gate import projected

DTYPES = [torch.bfloat16, torch.float32]
PRECISION = 1e-6  # largest error of a result as a share of the largest value; float32 products have 3e-7 here


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda"
    monkeypatch.setattr(wide, "_multiplies", lambda x: True)

    def mm(a, b):
        assert a.dtype == b.dtype == torch.bfloat16, "tensor cores multiply bfloat16"
        return a.float() @ b.float()

    monkeypatch.setattr(wide, "_mm", mm)
    return "cpu"


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grads(linear, x, weight, grad):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = linear(x, weight)
    return y, *torch.autograd.grad(y, [x, weight], grad.to(y.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_precise_as_float32(device, dtype):
    x, weight = drawn(300, 512, seed=0, dtype=torch.bfloat16), drawn(24, 512, seed=1).to(dtype) * 0.03
    grad = drawn(300, 24, seed=2) * 1e-4
    exact = grads(F.linear, x.double(), weight.double(), grad.double())
    y, to_x, to_weight = grads(wide.wide_linear, *(t.to(device) for t in (x, weight, grad)))
    assert (y.dtype, to_x.dtype, to_weight.dtype) == (torch.float32, torch.bfloat16, dtype)
    assert close(y.cpu(), exact[0], PRECISION)
    rounded = {torch.bfloat16: 2**-8, torch.float32: PRECISION}
    assert close(to_x.cpu(), exact[1], rounded[torch.bfloat16])
    assert close(to_weight.cpu(), exact[2], rounded[dtype])
    # The gradients are those of float32 products, rounded once: all but a few elements are equal to the bit.
    for ours, true in ((to_x, exact[1]), (to_weight, exact[2])):
        if ours.dtype == torch.bfloat16:
            assert (ours.cpu() != true.to(torch.bfloat16)).float().mean() < 5e-3
    short = grads(F.linear, x, weight.to(torch.bfloat16), grad)
    assert not close(short[0], exact[0], PRECISION)


def test_pieces_add_up_to_the_last_bit():
    t = drawn(10_000, seed=3)
    pieces = wide._pieces(t)
    assert [p.dtype for p in pieces] == [torch.bfloat16] * 3
    assert torch.equal(sum(p.double() for p in pieces), t.double())
    half = t.bfloat16()
    assert wide._pieces(half) == [half]


def test_gradients_of_gradients(device):
    x, weight = drawn(4, 8, seed=0, dtype=torch.bfloat16), drawn(3, 8, seed=1, dtype=torch.bfloat16)
    results = []
    for linear in (wide.wide_linear, lambda x, w: F.linear(x.float(), w.float())):
        x_, w_ = (t.to(device).requires_grad_() for t in (x, weight))
        y = linear(x_, w_)
        (to_w,) = torch.autograd.grad(y.square().sum(), w_, create_graph=True)
        results.append(torch.autograd.grad(to_w.float().square().sum(), x_)[0])
    assert close(results[0], results[1], 2**-7)


def test_only_what_is_wanted(device):
    x, weight = drawn(4, 8, seed=0, dtype=torch.bfloat16).to(device), drawn(3, 8, seed=1).to(device).requires_grad_()
    wide.wide_linear(x, weight).sum().backward()
    assert weight.grad is not None
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")  # the last one, aot, takes 6 s
    torch.library.opcheck(torch.ops.turnout.wide_linear.default, (x.requires_grad_(), weight), test_utils=parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_router_keeps_no_float32_tokens(dtype):
    T, D = 64, 48
    layer = MoE(D, 32, 8, 4, bias=True).to("meta", torch.bfloat16)
    layer.gate.to(dtype)
    kept = []

    def keep(t):
        kept.append((t.shape, t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = layer.gate.logits(torch.zeros(T, D, device="meta", dtype=torch.bfloat16, requires_grad=True))
    assert logits.dtype == torch.float32
    assert ((T, D), torch.float32) not in kept
    assert ((T, D), torch.bfloat16) in kept


def test_a_cpu_computes_as_before(monkeypatch):
    x, weight = drawn(4, 8, seed=0, dtype=torch.bfloat16), drawn(3, 8, seed=1, dtype=torch.bfloat16)
    monkeypatch.setattr(gate, "wide_linear", None)
    assert torch.equal(projected(x, weight), F.linear(x.float(), weight.float()))
