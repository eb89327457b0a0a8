"""The launch: what it checks, how it packs arguments, what it asks of CuPy, and what happens without CuPy."""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import nvrtc
import pytest
import torch
from turnout.cuda import launch
from turnout.dispatch import Plan, decode, encode
from turnout.dispatch import kernels as dispatch_kernels


@pytest.fixture
def recorded(monkeypatch):
    """The calls that reach a backend of CPU tensors."""
    calls = []
    monkeypatch.setitem(launch.backends, "cpu", lambda *args: calls.append(args))
    monkeypatch.setitem(launch.KERNELS, "k", launch.Kernel("k.cu", "PPiqf"))
    return calls


@pytest.fixture
def no_memory():
    """What was found out about CuPy is forgotten, before and after."""
    for function in (launch._function, launch._has_cupy, launch._is_recent):
        function.cache_clear()
    yield
    for function in (launch._function, launch._has_cupy, launch._is_recent):
        function.cache_clear()


def test_arguments_are_packed_by_signature(recorded):
    x = torch.zeros(3)
    launch.launch("k<float>", (2,), (32, 4), [x, None, 7, 2**40, 0.5], shared=64)
    ((kernel, grid, block, args, shared, device),) = recorded
    assert (kernel, grid, block, shared, device) == ("k<float>", (2,), (32, 4), 64, x.device)
    assert args == (x.data_ptr(), 0, 7, 2**40, 0.5)
    assert [type(arg) for arg in args] == [int, int, np.int32, np.int64, np.float32]


def test_nothing_to_do_is_not_launched(recorded):
    launch.launch("k", (3, 0), (32,), [torch.zeros(0), None, 0, 0, 0.0])
    assert recorded == []


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ([torch.zeros(2, 2).T, None, 1, 1, 1.0], "contiguous"),
        ([torch.zeros(2), torch.zeros(2, device="meta"), 1, 1, 1.0], r"one device; got \['cpu', 'meta'\]"),
        ([None, None, 1, 1, 1.0], "one device"),
        ([torch.zeros(2, device="meta"), None, 1, 1, 1.0], "runs on .*cuda.* tensors; got meta"),
        ([torch.zeros(2), None, 1, 1], "shorter"),
    ],
)
def test_wrong_arguments(recorded, args, error):
    with pytest.raises(ValueError, match=error):
        launch.launch("k", (1,), (32,), args)
    assert recorded == []


def test_a_number_that_does_not_fit(recorded):
    with pytest.raises(OverflowError):
        launch.launch("k", (1,), (32,), [torch.zeros(2), None, 2**31, 1, 1.0])


class FakeCuPy:
    """Stands for CuPy where there is no GPU: notes what is asked of it. What the real one does, the gpu tests see."""

    def __init__(self):
        self.modules, self.launches, self.streams = [], [], []
        self.cuda = SimpleNamespace(Stream=SimpleNamespace(from_external=self.from_external))

    def from_external(self, stream):
        fake = self

        class Current:
            def __enter__(self):
                fake.streams.append(stream)

            def __exit__(self, *exception):
                fake.streams.pop()

        return Current()

    def RawModule(self, *, code, options, name_expressions):
        self.modules.append((code, options, name_expressions))
        fake = self

        class Function:
            max_dynamic_shared_size_bytes = 48 * 1024

            def __call__(self, grid, block, args, *, shared_mem):
                assert shared_mem <= self.max_dynamic_shared_size_bytes
                fake.launches.append((grid, block, args, shared_mem, list(fake.streams)))

        return SimpleNamespace(get_function=lambda name: Function() if name in name_expressions else None)


@pytest.fixture
def cupy(monkeypatch, no_memory):
    fake = FakeCuPy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    return fake


def test_what_cupy_is_asked_for(cupy):
    device = torch.device("cuda", 1)
    for shared in (0, 100 * 1024):
        launch.launch_cupy("encode<uint4, 2>", (7,), (32, 8), (4096, np.int32(3)), shared, device)
    ((code, options, names),) = cupy.modules  # compiled once
    assert code == (launch.FOLDER / "encode.cu").read_text()
    assert f"-I{launch.FOLDER}" in options
    assert names == ("encode<uint4, 2>",)
    stream = ["the stream of cuda:1"]
    assert cupy.launches == [
        ((7,), (32, 8), (4096, np.int32(3)), 0, stream),
        ((7,), (32, 8), (4096, np.int32(3)), 100 * 1024, stream),
    ]
    assert cupy.streams == []


def test_another_header_is_another_kernel(cupy, monkeypatch, tmp_path):
    (tmp_path / "encode.cu").write_text("same")
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    for text in ("one", "two"):
        (tmp_path / "rows.cuh").write_text(text)
        launch._function.cache_clear()
        launch._headers.cache_clear()
        launch._function("encode<uint4, 1>")
    launch._headers.cache_clear()
    (code, options, _), (code_again, other_options, _) = cupy.modules
    assert code == code_again
    assert options != other_options


@pytest.fixture
def no_cupy(monkeypatch, no_memory):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_without_cupy_the_error_says_what_to_install(no_cupy, monkeypatch):
    with pytest.raises(ImportError, match=r'pip install "turnout\[cuda\]"'):
        launch._cupy()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ImportError, match=r'pip install "turnout\[cuda12\]"'):
        launch._cupy()


def test_without_cupy_a_warning_says_so_once(no_cupy, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not launch.available(torch.device("cuda"))
    assert [record.getMessage() for record in caplog.records] == [
        'CUDA kernels need CuPy: pip install "turnout[cuda]". Until then these operators run in plain PyTorch.'
    ]


def test_without_cupy_operators_run_in_plain_pytorch(no_cupy, monkeypatch):
    # CPU tensors stand for CUDA ones: the question `available` is asked for the device that lacks CuPy.
    monkeypatch.setitem(launch.backends, "cpu", launch.launch_cupy)
    monkeypatch.setattr(dispatch_kernels, "available", lambda device: launch.available(torch.device("cuda")))
    plan, x = Plan.of(torch.tensor([[1, 0], [0, 1]]), 2), torch.eye(2)
    assert torch.equal(decode(encode(x, plan), plan, torch.full((2, 2), 0.5)), x)


def test_rocm_has_no_kernels(monkeypatch, no_memory, caplog):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not launch.available(torch.device("cuda"))
    assert caplog.records == []


def test_a_gpu_too_old_has_no_kernels_and_a_warning_says_so_once(cupy, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    of = {"cuda:0": (9, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of[str(device)])
    for _ in range(3):
        assert [launch.available(torch.device(name)) for name in of] == [True, False]
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA kernels need compute capability 8.0, and cuda:1 has 7.5: these operators run in plain PyTorch."
    ]


def test_cpu_tensors_run_no_kernels_by_themselves():
    assert not launch.available(torch.device("cpu"))
    with pytest.raises(ValueError, match="runs on cuda tensors; got cpu"):
        launch.launch("encode<uint4, 1>", (1,), (32,), [torch.zeros(4)])


def test_the_real_cupy_takes_our_module(no_memory):
    cupy = pytest.importorskip("cupy")
    if torch.cuda.is_available():
        assert callable(launch._function("encode<uint4, 1>"))
        return
    # Without a driver CuPy gets as far as asking for the device: our arguments were taken.
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        launch._function("encode<uint4, 1>")
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")


def test_the_real_cupy_takes_torchs_streams_and_packed_arguments(recorded):
    cupy = pytest.importorskip("cupy")
    scalar = pytest.importorskip("cupy._core._scalar").CScalar  # what it makes of an argument
    launch.launch("k<float>", (1,), (32,), [torch.zeros(3), None, 7, 2**40, 0.5])
    assert [scalar(arg).dtype for arg in recorded[0][3]] == ["int64", "int64", "int32", "int64", "float32"]
    stream = SimpleNamespace(__cuda_stream__=lambda: (0, 4096))
    assert cupy.cuda.Stream.from_external(stream).ptr == 4096
    assert hasattr(torch.cuda.Stream, "__cuda_stream__")


@pytest.mark.skipif(nvrtc.folder() is None, reason="needs nvidia-cuda-nvrtc and nvidia-cuda-runtime")
def test_kernels_compile_as_cupy_compiles_them(no_memory, monkeypatch, tmp_path):
    """With the headers that it finds, the options that it adds, and its cache: all but the device is the real thing."""
    core = pytest.importorskip("cupy._core.core")
    compiler = pytest.importorskip("cupy.cuda.compiler")
    loaded = []

    class Module:
        load = lambda self, cubin: loaded.append(cubin)  # noqa: E731
        _set_mapping = lambda self, mapping: setattr(self, "mapping", mapping)  # noqa: E731

    def module(*, code, options, name_expressions):
        options = core.assemble_cupy_compiler_options(options)
        made = compiler._compile_module_with_cache(code, options, arch="90", name_expressions=name_expressions)
        return SimpleNamespace(get_function=made.mapping.get)

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_kernel_cache_backend", type(compiler._kernel_cache_backend)())
    monkeypatch.setattr(compiler, "function", SimpleNamespace(Module=Module))
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    monkeypatch.setattr(launch, "_cupy", lambda: SimpleNamespace(RawModule=module))
    kernels = ["encode<uint4, 8>", "decode<__nv_bfloat16, uint4, 8>", "decode_backward<__half, unsigned short, 0>"]
    for kernel in [*kernels, "route", kernels[0]]:
        assert kernel.partition("<")[0] in launch._function(kernel)  # the mangled name
        launch._function.cache_clear()
    assert all(cubin.startswith(b"\x7fELF") for cubin in loaded)
    assert loaded[0] == loaded[-1]
    assert len(list(tmp_path.glob("*.cubin"))) == 4
