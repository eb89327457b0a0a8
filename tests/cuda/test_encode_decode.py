"""encode and decode by kernel: the same bits as in plain PyTorch, on the CPU through the runner and on a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close
from runner import FORWARD, RANDOM, REVERSED, Runner, installed
from strategies import assignments
from turnout.dispatch import Plan, decode, encode
from turnout.dispatch.reorder import permute

NAN = float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EXACT = 1e-6  # of a float32 dot product, against float64
# Widths: one element, an odd number, 16 bytes for all or some dtypes, 16-byte rows with an odd number of chunks.
WIDTHS = [1, 7, 8, 24, 264]


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def plan_of(tokens, k, drops=True, spare=None, device="cpu", experts=12):
    """A plan in which a third of the assignments is dropped; padded by `spare` rows an expert if given."""
    generator = torch.Generator().manual_seed(k)
    expert = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]
    if drops:
        expert = torch.where(torch.rand(tokens, k, generator=generator) < 1 / 3, -1, expert)
    plan = Plan.of(expert.to(device), experts)
    return plan if spare is None else plan.padded(int(plan.counts.max()) + spare)


def plain(function, *args):
    """What the function gives on the CPU in plain PyTorch."""

    def home(value):
        if isinstance(value, Plan):
            tensors = {name: field.cpu() for name, field in vars(value).items() if isinstance(field, torch.Tensor)}
            return Plan(**tensors, capacity=value.capacity)
        return value.detach().cpu().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value

    with installed(None):
        return function(*map(home, args))


def equal(a, b):
    """The same bits, but for the sign of zero and which nan."""
    return torch.equal(torch.nan_to_num(a.cpu(), nan=12345), torch.nan_to_num(b, nan=12345)) and a.dtype == b.dtype


def with_gradients(function, dtype=torch.float32):
    """function(plan, *tensors), followed by its gradients for an upstream gradient of that dtype, not all alike."""

    def run(plan, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = function(plan, *tensors)
        upstream = random(*out.shape, dtype=dtype, seed=9, device=out.device).to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, tensors, upstream)

    return run


def check(plan, D, dtype, device):
    """All three operators with their gradients: the bits of plain PyTorch in float32, rounded to the dtype once.

    (Not plain PyTorch in bfloat16: its embedding_bag on the CPU rounds ties away from zero.) The weight's gradient, a
    dot product whose order is the kernel's own, is held against float64.
    """
    x, rows = random(len(plan.slot), D, dtype=dtype, device=device), random(len(plan.token), D, dtype=dtype, seed=1)
    rows, weight = rows.to(device), random(*plan.slot.shape, seed=2, device=device)
    for function, tensor in ((lambda plan, x: encode(x, plan), x), (lambda plan, rows: decode(rows, plan), rows)):
        function = with_gradients(function, dtype)
        for got, wanted in zip(function(plan, tensor), plain(function, plan, tensor.float()), strict=True):
            assert equal(got, wanted.to(dtype))

    weighted = with_gradients(lambda plan, rows, weight: decode(rows, plan, weight), dtype)
    *both, to_weight = weighted(plan, rows, weight)
    *both_plain, _ = plain(weighted, plan, rows.float(), weight)
    for got, wanted in zip(both, both_plain, strict=True):
        assert equal(got, wanted.to(dtype))
    exact = plain(weighted, plan, rows.double(), weight.double())[-1]
    assert close(to_weight.cpu().double(), exact, EXACT * max(1, D**0.5))


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_widths_and_dtypes(dtype, D, device):
    check(plan_of(13, 2, device=device), D, dtype, device)
    check(plan_of(13, 3, device=device, spare=1), D, dtype, device)


@pytest.mark.parametrize("k", range(1, 10))
@pytest.mark.parametrize("spare", [None, 0, 40], ids=["ragged", "padded", "mostly empty"])
def test_any_k(k, spare, device):
    for drops in (False, True):
        check(plan_of(11, k, drops, spare, device), 8, torch.float32, device)


@given(assignments(), st.none() | st.integers(0, 2), st.sampled_from(FLOATS), st.sampled_from([1, 3, 8]))
def test_any_plan(case, spare, dtype, D):
    expert, E = case
    plan = Plan.of(expert, E)
    with installed(Runner()):
        check(plan if spare is None else plan.padded(int(plan.counts.max()) + spare), D, dtype, "cpu")


@pytest.mark.parametrize("order", [FORWARD, REVERSED, RANDOM, RANDOM + 1])
def test_any_order_of_threads(order):
    with installed(Runner(order)):
        check(plan_of(40, 2, spare=1), 72, torch.float32, "cpu")
        check(plan_of(9, 5), 520, torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("D", [3, 16])
def test_encode_moves_any_type(dtype, D, device):
    plan = plan_of(9, 2, spare=1, device=device)
    x = random(9, D, device=device).mul(40).to(dtype)
    bits = {1: torch.uint8, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(encode(x, plan).view(bits).cpu(), plain(encode, x.view(bits), plan))


def test_permute(device):
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(device)
    rows = random(11, 8, device=device)
    assert torch.equal(permute(rows, order, order.argsort()), rows[order])
    assert torch.equal(permute(rows[:, 0], order, order.argsort()), rows[order, 0])


@pytest.mark.parametrize(
    ("tokens", "k", "D"), [(0, 2, 8), (5, 2, 0), (5, 0, 8)], ids=["no tokens", "no width", "no assignments"]
)
def test_nothing(tokens, k, D, device):
    plan = plan_of(tokens, k, device=device)
    x = random(tokens, D, device=device)
    assert torch.equal(encode(x, plan).cpu(), plain(encode, x, plan))
    rows, weight = random(len(plan.token), D, device=device), random(tokens, k, device=device)
    for y in (decode(rows, plan), decode(rows, plan, weight)):
        assert torch.equal(y.cpu(), torch.zeros(tokens, D))


def test_no_rows(device):
    plan = plan_of(5, 2, drops=False, device=device)
    gone = Plan.of(torch.full_like(plan.expert, -1), 12)
    check(gone, 8, torch.float32, device)
    check(gone.trimmed(0), 8, torch.float32, device)


def test_not_contiguous_and_not_aligned(device):
    plan = plan_of(7, 2, device=device)
    for whole in (random(7, 16, device=device)[:, ::2], random(57, device=device)[1:].view(7, 8)):
        assert torch.equal(encode(whole, plan).cpu(), plain(encode, whole.contiguous(), plan))
    rows = random(113, device=device)[1:].view(14, 8)
    assert rows.data_ptr() % 16
    assert torch.equal(decode(rows, plan).cpu(), plain(decode, rows.clone(), plan))


def test_wide_accesses_where_rows_allow_it(kernels_on_cpu):
    plan = plan_of(7, 2)
    kernels_on_cpu.launched.clear()  # of the plan
    for x in (random(7, 8), random(57)[1:].view(7, 8), random(7, 7)):
        encode(x, plan)
        decode(encode(x, plan).bfloat16(), plan)
    assert kernels_on_cpu.launched == {
        "encode<uint4, 2>": 2,
        "encode<unsigned, 2>": 4,
        "decode<__nv_bfloat16, uint4, 2>": 2,
        "decode<__nv_bfloat16, unsigned short, 2>": 1,
    }


def test_rows_of_nobody_are_not_read(device):
    plan = plan_of(9, 2, spare=2, device=device)
    empty = (plan.token < 0).unsqueeze(1)
    rows = torch.where(empty, NAN, random(len(plan.token), 8, device=device))
    weight = torch.where(plan.slot < 0, NAN, random(9, 2, device=device))
    y, to_rows, to_weight = with_gradients(lambda plan, *args: decode(args[0], plan, args[1]))(plan, rows, weight)
    for tensor in (y, to_rows, to_weight, decode(rows, plan)):
        assert tensor.isfinite().all()
    assert not to_rows[empty.squeeze(1)].any()
    assert not to_weight[plan.slot < 0].any()


def test_only_empty_rows_are_zeroed_and_nan_travels(device):
    plan = plan_of(9, 2, device=device, spare=2)
    rows = encode(torch.full((9, 8), NAN, device=device), plan)
    assert torch.equal(rows.isnan(), (plan.token >= 0).unsqueeze(1).expand_as(rows))
    assert torch.equal(decode(rows, plan).isnan().all(1), (plan.slot >= 0).any(1))


def layer(plan, x, weight, w):
    return decode(torch.tanh(encode(x, plan) @ w), plan, weight)


def test_a_trip_there_and_back(device):
    plan = plan_of(9, 3, device=device, spare=1)
    x, weight, w = (random(*shape, seed=i, device=device) for i, shape in enumerate([(9, 8), (9, 3), (8, 8)]))
    ours = with_gradients(layer)(plan, x, weight, w)
    exact = plain(with_gradients(layer), plan, x.double(), weight.double(), w.double())
    for got, wanted in zip(ours, exact, strict=True):
        assert close(got.cpu().double(), wanted, 1e-5)


def test_gradients_of_gradients(device):
    plan = plan_of(5, 2, device=device)
    tensors = [random(*shape, seed=i) for i, shape in enumerate([(10, 8), (5, 2), (5, 8), (10, 8), (5, 2)])]

    def twice(plan, rows, weight, upstream, to_rows, to_weight):
        rows, weight, upstream = (t.detach().requires_grad_() for t in (rows, weight, upstream))
        once = torch.autograd.grad(decode(rows, plan, weight), [rows, weight], upstream, create_graph=True)
        return torch.autograd.grad(once, [rows, weight, upstream], [to_rows, to_weight])

    ours = twice(plan, *(t.to(device) for t in tensors))
    for got, wanted in zip(ours, plain(twice, plan, *(t.double() for t in tensors)), strict=True):
        assert close(got.cpu().double(), wanted, 1e-5)


def test_float64_stays_in_pytorch(kernels_on_cpu):
    plan = plan_of(5, 2)
    kernels_on_cpu.launched.clear()  # of the plan
    decode(random(10, 8).double(), plan, random(5, 2))
    assert kernels_on_cpu.launched == {}


def test_operators_are_well_formed(device):
    plan, D = plan_of(5, 2, device=device, spare=1), 8
    x, rows = (random(n, D, device=device).requires_grad_() for n in (5, len(plan.token)))
    weight, ops = random(5, 2, device=device).requires_grad_(), torch.ops.turnout
    indices = plan.token, plan.slot
    torch.library.opcheck(ops.encode.default, (x, *indices))
    torch.library.opcheck(ops.decode.default, (rows, *indices))
    torch.library.opcheck(ops.decode_weighted.default, (rows, weight, *indices))
    torch.library.opcheck(ops.decode_weighted_backward.default, (x, rows, weight, *indices))


def test_compiled_in_one_graph(device):
    plan = plan_of(9, 2, device=device)
    x, weight, w = (random(*shape, seed=i, device=device) for i, shape in enumerate([(9, 8), (9, 2), (8, 8)]))
    compiled = torch.compile(lambda x, weight, w: layer(plan, x, weight, w), fullgraph=True, backend="aot_eager")
    eager = with_gradients(layer)(plan, x, weight, w)
    for got, wanted in zip(with_gradients(lambda _, *args: compiled(*args))(plan, x, weight, w), eager, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_a_cuda_graph():
    plan = plan_of(9, 2, device="cuda", spare=1)
    x, weight = random(9, 64, device="cuda"), random(9, 2, device="cuda")
    wanted = decode(encode(x, plan), plan, weight)  # compiles, before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode(encode(x, plan), plan, weight)
    y.zero_()
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_stream_of_the_users():
    plan, x = plan_of(4096, 2, device="cuda"), random(4096, 1024, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x
        for _ in range(20):  # in order with torch's own kernels, or the sums would be wrong
            y = encode(y + 1, plan)[plan.slot[:, 0].clamp(min=0)]
    stream.synchronize()
    assert torch.equal(y.cpu(), plain(lambda y, plan: _steps(y, plan), x, plan))


def _steps(y, plan):
    for _ in range(20):
        y = encode(y + 1, plan)[plan.slot[:, 0].clamp(min=0)]
    return y
