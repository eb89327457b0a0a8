"""Rows that travel in fewer bytes: what they lose, how many bytes there are, and what stays exact."""

from itertools import chain

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, tokens, whole
from hypothesis import given
from hypothesis import strategies as st
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import CompressedDispatcher, LocalDispatcher, OverlapDispatcher, all_to_all, collectives
from turnout.dispatch.wire import pack, unpack
from turnout.moe import Capacity, MoE, parallelize

SIZES = [7, 0, 9, 1]
WIRES = pytest.mark.parametrize("wire", ["bf16", "fp8"])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rounded(rows, wire):
    return unpack(pack(rows, wire), wire, rows.dtype)


@WIRES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 4))
def test_what_a_value_loses_is_bounded(wire, dtype, seed, spread):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 33, generator=g) * 10 ** (spread * torch.randn(9, 33, generator=g)).clamp(1e-4, 1e4)
    rows = rows.clamp(-3e4, 3e4).to(dtype)
    lost = (rounded(rows, wire).double() - rows.double()).abs()
    rows = rows.double().abs()
    if wire == "bf16":
        bound = rows * 2**-8
    else:
        bound = torch.maximum(rows * 2**-4, rows.amax(1, keepdim=True) / 448 * 2**-10) + rows * 2**-20
        bound += rows * (2**-8 if dtype == torch.bfloat16 else 2**-11 if dtype == torch.float16 else 0)
    bound += 1e-6 if dtype == torch.float16 else 0  # its own smallest steps, on the way back
    assert bool((lost <= bound).all())
    assert (dtype == torch.bfloat16 and wire == "bf16") or lost.max() > 0


def test_rows_apart_in_size_do_not_spoil_each_other():
    rows = torch.tensor([[1e-30, -2e-30], [1.0, 2.0], [3e30, 1e30]])
    assert ((rounded(rows, "fp8") - rows).abs() <= rows.abs() / 16).all()


@WIRES
def test_edges(wire):
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, 0.0, -0.0], [inf, 1.0, -2.0], [nan, 1.0, -inf], [1e-45, 0.0, 0.0], [3.4e38, 1e38, 0.0]])
    out = rounded(rows, wire)
    assert out[0].tolist() == [0, 0, 0]
    assert out[1, 1:].tolist() == [1, -2]  # the finite values of such a row are what they were
    assert not out[1, 0].isfinite()
    assert out[2, 0].isnan()
    assert out[2, 1] == 1
    assert not out[2, 2].isfinite()
    assert out[3].abs().max() < 1e-37
    assert wire == "bf16" or out[4].isfinite().all()
    for shape in ((0, 5), (4, 0), (0, 0), (1, 5)):
        assert torch.equal(rounded(torch.ones(shape), wire), torch.ones(shape))


def exchanged(wire) -> None:
    """The first tensor loses what `pack` takes, the second nothing; gradients lose what bfloat16 takes."""
    rank = dist.get_rank()
    send, recv = [1, 2, 0, rank], [[1, 2, 0, r][rank] for r in range(4)]
    x = tokens(sum(send), torch.float32).requires_grad_()
    weight = x[:, 0].detach().clone().requires_grad_()
    rows, beside = all_to_all(x, weight, send=send, recv=recv, group=None, wire=wire)
    plain, exact = all_to_all(x.detach(), weight.detach(), send=send, recv=recv, group=None)
    assert torch.equal(rows.detach(), rounded(plain, wire))
    assert torch.equal(beside.detach(), exact)
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(rank))
    torch.autograd.backward([rows, beside], [grad, grad[:, 0]])
    (back, beside) = all_to_all(grad, grad[:, 0], send=recv, recv=send, group=None)
    assert torch.equal(x.grad, rounded(back, "bf16"))
    assert torch.equal(weight.grad, beside)


@WIRES
def test_an_exchange_and_its_gradients(wire):
    run(4, exchanged, wire)


def layer(dispatcher: str, **options) -> MoE:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    torch.manual_seed(0)
    return parallelize(nn.ModuleList([MoE(WIDTH, 12, EXPERTS, top_k=3, balance=0, **options)]), mesh, dispatcher)[0]


def outcome(moe: MoE) -> list[torch.Tensor]:
    moe.zero_grad()
    x = tokens(sum(SIZES), torch.float32).split(SIZES)[dist.get_rank()].clone().requires_grad_()
    y = moe(x)
    assert y.dtype == x.dtype
    (y * torch.arange(WIDTH)).sum().backward()
    return [y.detach(), x.grad, *(whole(p.grad) for p in moe.parameters())]


def check_layer(dispatcher: str, wire: str, options: dict) -> list[float]:
    moe = layer(dispatcher, **options)
    expected, compressed = outcome(moe), CompressedDispatcher(moe.dispatcher, wire)
    off = []
    for moe.dispatcher in (compressed, OverlapDispatcher(compressed, 3)):
        pairs = zip(outcome(moe), expected, strict=True)
        off.append(max(float((a - b).norm() / b.norm()) for a, b in pairs if b.any()))
    return off


@WIRES
@pytest.mark.parametrize("dispatcher", ["flat", "2dh", "node"])
@pytest.mark.parametrize("options", [{}, {"capacity": Capacity(1.0, pad=True)}], ids=["ragged", "padded"])
def test_a_layer_is_off_by_the_rounding_of_its_rows(dispatcher, wire, options):
    for off in chain(*run(4, check_layer, dispatcher, wire, options)):
        assert off < {"bf16": 0.01, "fp8": 0.08}[wire]
        assert off > {"bf16": 5e-4, "fp8": 5e-3}[wire]  # and something was rounded


def bytes_of(wire: str | None) -> tuple[int, int]:
    """Bytes of rows sent forward and backward by this rank, without those of sizes and weights."""
    moe, sent, start = layer("flat"), [0, 0], collectives._Exchange.start
    if wire is not None:
        moe.dispatcher = CompressedDispatcher(moe.dispatcher, wire)

    def counted(leg, x):
        if x.ndim == 2 and x.dtype != torch.int64:
            sent[leg.backward] += x.numel() * x.element_size()
        return start(leg, x)

    collectives._Exchange.start = counted  # in this process alone
    moe(tokens(8, torch.float32)).sum().backward()
    return sent[0], sent[1]


def test_bytes_on_the_way():
    plain = run(4, bytes_of, None)
    out_and_home = [forward // (4 * WIDTH) for forward, _ in plain]  # rows
    assert sum(out_and_home) == 2 * 4 * 8 * 3
    assert plain == [(4 * WIDTH * n, 4 * WIDTH * n) for n in out_and_home]
    assert run(4, bytes_of, "bf16") == [(2 * WIDTH * n, 2 * WIDTH * n) for n in out_and_home]
    assert run(4, bytes_of, "fp8") == [((WIDTH + 4) * n, 2 * WIDTH * n) for n in out_and_home]


def test_what_does_not_fit_is_named():
    with pytest.raises(TypeError, match="inner must be a SteppedDispatcher"):
        CompressedDispatcher(OverlapDispatcher(LocalDispatcher(), 2))
