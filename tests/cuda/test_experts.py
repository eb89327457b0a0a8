"""The experts' Triton kernels: run by Triton's interpreter, and compiled for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from ast import literal_eval
from contextlib import nullcontext
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
import torch
from reference import close, expert_ffn
from run_experts import BFLOAT16, CASES
from torch.torch_version import TorchVersion
from turnout.cuda.tiles import Blocks, Product, sizes
from turnout.cuda.tune import candidates
from turnout.moe import Capacity, MoE, aux_loss
from turnout.moe.experts.feed_forward import FeedForwardExperts

HERE = Path(__file__).parent
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def python(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(HERE / script), *arguments]
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=needs_gpu)])
def results(request, tmp_path_factory):
    """What the kernels made of everything in `run_experts.py`, in a process of their own."""
    file = tmp_path_factory.mktemp("experts") / "results.pt"
    if request.param == "cuda":
        python("run_experts.py", str(file), "--device", "cuda")
    elif TorchVersion(version("triton")) < "3.7" and TorchVersion(version("numpy")) >= "2.4":
        pytest.skip("Triton 3.6's interpreter makes numbers of arrays in a way that numpy 2.4 refuses")
    else:
        python("run_experts.py", str(file), TRITON_INTERPRET="1")
    return torch.load(file)


def by_hand(case):
    """Output and gradients in float64, and which rows of x and weight are somebody's."""
    given = {name: t.double().requires_grad_() for name, t in case["given"].items()}
    owner = [e for e, n in enumerate(case["counts"].tolist()) for _ in range(n)]
    token = list(range(len(owner))) if case["token"] is None else case["token"].tolist()[: len(owner)]
    y = [row * 0 for row in given["x"]]
    for r, (e, t) in enumerate(zip(owner, token, strict=True)):
        if t >= 0:
            y[t] = y[t] + given["weight"][r] * expert_ffn(given["x"][t], given, e, case["activation"])
    real = slice(len(owner)) if case["token"] is None else slice(None)
    y = torch.stack(y)
    grads = torch.autograd.grad(y[real], list(given.values()), case["grad"].double()[real], materialize_grads=True)
    filled = torch.tensor([r for r, t in enumerate(token) if t >= 0], dtype=torch.int64)
    return y, dict(zip(given, grads, strict=True)), real, filled


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES | BFLOAT16)
def test_kernels_as_by_hand(name, results):
    case = results["cases"][name]
    y, grads, real, filled = by_hand(case)
    dtype = case["given"]["x"].dtype
    tol = TOLERANCE[dtype]
    assert case["y"].dtype == dtype
    assert close(case["y"][real], y[real], tol)
    for key, exact in grads.items():
        actual = case["grads"][key]
        places = {"x": real, "weight": filled}.get(key, slice(None))
        assert actual.dtype == case["given"][key].dtype
        assert close(actual[places], exact[places], tol), key
        if key.startswith(("w_", "b_")):
            empty = (case["counts"] == 0).nonzero().flatten()
            assert not actual[empty].any(), f"an expert without rows has a gradient of {key}"
            if case["counts"].any():
                assert exact.any()
                assert not close(actual.roll(1, 0), exact, 1e-2)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "overlapped", "compiled"])
def test_a_layer_is_the_same_on_either_kernel(way, results):
    for plain, triton in zip(*results["layers"][way], strict=True):
        assert plain.any()
        assert close(triton, plain, 3e-6)


@needs_triton
@pytest.mark.slow
def test_only_what_is_wanted(results):
    y, again, without, everything, alone = results["frozen"]
    assert torch.equal(y, again)
    assert torch.equal(y, without)
    assert torch.equal(everything, alone)
    assert alone.any()


@needs_triton
@pytest.mark.slow
def test_operator_is_well_formed(results):
    assert results["operator"] == "well formed"


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "gathers"), [("gathered", True), ("sorted", False)])
def test_tuned_tiles_are_used_and_change_nothing(name, gathers, results):
    tuned = results["tuned"][name]
    assert tuned["shape"][:5] == (5, 16, 24, 3, 2)
    assert tuned["shape"][8] is gathers
    last = "weights(16, 24)" if gathers else "weight(16, 24)"  # swiglu has two of them, gelu one
    assert list(tuned["tiles"]) == ["up(16, 24)", "down(24, 16)", "hidden(16, 24)", "weight(24, 16)", last]
    for name, times in tuned["tiles"].items():
        assert len(times) > 1
        assert all(isinstance(ms, float) for ms in times.values()), (name, times)
    assert set(tuned["times"]) == {"torch", "triton"}, tuned["text"]
    assert tuned["chosen"] == min(tuned["times"], key=tuned["times"].get)
    assert tuned["asked"] in ([True] * 6, [True] * 12)  # 6 of them by the check at first use
    for before, after in zip(tuned["before"], tuned["after"], strict=True):
        assert before.any()
        assert close(after, before, 3e-6)


@needs_triton
@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "product"), [(90, "wgmma.mma"), (80, "mma.sync"), (100, "tcgen05.mma")])
def test_kernels_compile_as_an_architecture_wants_them(arch, product, tmp_path):
    lines = [
        json.loads(line)
        for line in python("compile_experts.py", str(arch), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    ]
    products = ["up", "down", "down, backward", "hidden", "weight, one", "weight, two"]
    assert [line["kernel"] for line in lines] == [*products, *products, "bias", "tiles"]
    for line in lines:
        assert line["spilled"] == 0, line
        assert line["shared"] <= (99 if arch == 80 else 227) * 1024, line
        assert line["chained"] == 0, f"Triton 3.6 to 3.8 compiles this wrong for sm_100: {line}"
        if line["kernel"] in ("bias", "tiles"):
            continue
        assert line["product"] == product, line
        assert line["waited for"] == 0, f"loads that are not prefetched: {line}"
        gathers = line["gathered"] and not line["kernel"].startswith("down")
        assert (line["asynchronous"] > 0) == (arch == 80 or gathers), line
        assert (line["described"] > 0) == (arch >= 90), f"what lies in order has no descriptors: {line}"


@needs_triton
def test_products_that_are_compiled_wrong_are_seen(tmp_path):
    found = python("planted_products.py", TRITON_CACHE_DIR=str(tmp_path))
    assert literal_eval(found) == {"one loop, one sum": 1, "one loop, two sums": 0, "two loops, one sum": 0}


@needs_triton
def test_what_the_copy_engine_cannot_take_is_loaded_by_pointer():
    from triton.tools.tensor_descriptor import TensorDescriptor
    from turnout.cuda import grouped

    size = Blocks(16, 16, 16, 4, 1, descriptors=True)
    flat = torch.zeros(4 * 32 * 24 + 1, dtype=torch.float16)
    w = flat[:-1].view(4, 32, 24)
    assert isinstance(grouped._matrices(w, size), TensorDescriptor)
    assert isinstance(grouped._rows(w[0], None, size), TensorDescriptor)
    for odd in (flat[1:].view(4, 32, 24), torch.zeros(4, 24, 33, dtype=torch.float16)):
        assert grouped._matrices(odd, size) is odd
        assert grouped._rows(odd[0], None, size).shape == odd.shape[1:]
    for rows, token, given in ((w[0], w, size), (w[0, :0], None, size), (w[0], None, size._replace(descriptors=False))):
        assert grouped._rows(rows, token, given) is rows


@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_candidates_begin_with_the_default(major):
    types = {"torch.float32": 4, "torch.bfloat16": 2}
    for kernel, many, dtype in product(("up", "down", "hidden", "weight", "weights"), (True, False), types):
        found = candidates(Product(kernel, "", dtype, (0, 0), many), major)
        assert found[0] == sizes(kernel, types[dtype], major, many)
        assert 2 < len(set(found)) == len(found) <= 10


@needs_triton
@pytest.mark.slow
def test_tiles_cover_each_row_once(results):
    for ends, rows, size, expert, start in results["cuts"]:
        assert len(expert) == len(start) == rows // size + len(ends)
        covered = [
            (row, e)
            for e, first in zip(expert, start, strict=True)
            if e >= 0
            for row in range(first, min(first + size, ends[e]))
        ]
        starts = [0, *ends[:-1]]
        assert covered == [(row, e) for e, end in enumerate(ends) for row in range(starts[e], end)]


@needs_triton
@pytest.mark.slow
def test_wrong_kernels_are_not_used(results):
    right, wrong, refused = (results["first use"][name] for name in ("right", "wrong", "refused"))
    assert right["texts"] == []
    assert any(not torch.equal(a, b) for a, b in zip(right["results"][0], right["torch"], strict=True)), "which ran?"
    (text,) = wrong["texts"]  # once, and naming nothing that is right
    assert "gave wrong numbers, so torch's compute them instead" in text
    assert "gradient of x" in text
    assert "output" not in text
    assert "of w_up" not in text
    (text,) = refused["texts"]
    assert "(D=16, H=24, swiglu, float32)" in text
    assert "RuntimeError: out of shared memory" in text
    for found in (wrong, refused):
        for got in found["results"]:
            assert all(map(torch.equal, got, found["torch"]))
    assert max(results["first use"]["sorted"].values()) < 1e-5


def test_no_rows_are_kept_for_the_backward(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    T, D, H, k = 64, 48, 32, 4
    kept, bytes_kept = {}, {}
    for kernel in ("torch", "triton"):
        layer = MoE(D, H, 8, k).to("meta", torch.bfloat16)
        layer.experts.kernel = kernel
        kept[kernel] = found = {}  # shapes of activations, by storage
        bytes_kept[kernel] = sizes = {}

        def keep(t, found=found, sizes=sizes):
            if not isinstance(t, torch.nn.Parameter):
                found[t.untyped_storage()._cdata] = t.shape
                sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(torch.zeros(T, D, device="meta", dtype=torch.bfloat16, requires_grad=True))
    shapes = {kernel: list(found.values()) for kernel, found in kept.items()}
    assert shapes["torch"].count((T * k, D)) == 1
    assert shapes["torch"].count((T * k, H)) > 2
    assert (T * k, D) not in shapes["triton"]
    assert shapes["triton"].count((T * k, H)) == 2, "up and gate"
    x_up_gate = 2 * (T * D + 2 * T * k * H)
    router = 4 * T * (8 + 2)  # scores, and two sums for each token
    assert x_up_gate < sum(bytes_kept["triton"].values()) <= x_up_gate + router + 44 * T * k + 64


def test_choosing_a_kernel():
    experts = FeedForwardExperts(8, 16, 4)
    assert experts.kernel == "auto"
    experts.kernel = "triton"
    assert experts.kernel == "triton"
    with pytest.raises(ValueError, match="kernel must be one of auto, torch, triton; got 'cutlass'"):
        experts.kernel = "cutlass"


def test_triton_is_not_used_where_it_cannot_be(monkeypatch):
    layer = MoE(8, 16, 4)
    layer.experts.kernel = "triton"
    with pytest.raises(TypeError, match=r'takes float32, bfloat16 or float16; got torch.float64: set kernel="torch"'):
        layer.double()(torch.randn(3, 8, dtype=torch.float64))
    error, words = (ModuleNotFoundError, "needs Triton") if needs_triton.args[0] else (ValueError, "for CUDA devices")
    with pytest.raises(error, match=words):
        layer.float()(torch.randn(3, 8))
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with pytest.raises(NotImplementedError, match="never compiled for ROCm"):
        layer(torch.randn(3, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_a_padded_step_fits_a_cuda_graph(kernel):
    if kernel == "torch" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped_mm itself waits there")
    torch.manual_seed(0)
    layer = MoE(64, 128, 8, 2, capacity=Capacity(1.25, pad=True)).to("cuda", torch.bfloat16)
    layer.experts.kernel = kernel
    x = torch.randn(96, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        layer.zero_grad(set_to_none=False)
        y = layer(x)
        (y.float().square().mean() + aux_loss(layer)).backward()
        return y.detach()  # not the graph: gradients are added on the stream on which it was made

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and makes the gradients' memory
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [y.clone(), *(p.grad.clone() for p in layer.parameters())]
    y = step()
    for actual, expected in zip(replayed, [y, *(p.grad for p in layer.parameters())], strict=True):
        assert torch.equal(actual, expected)
