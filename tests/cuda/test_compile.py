"""Every kernel compiles for every GPU we name, without one: no spills, wide accesses; and each source by itself."""

import shutil
import subprocess

import nvrtc
import pytest
from instances import INSTANCES
from runner import library
from turnout.cuda import launch
from turnout.dispatch import kernels
from turnout.moe.gates import router

ARCHITECTURES = [80, 90, 100]
MOST_REGISTERS = 128  # of a thread: then two blocks of 256 share a multiprocessor
SOURCES = sorted(path.name for path in launch.FOLDER.glob("*.cu"))

needs_nvrtc = pytest.mark.skipif(nvrtc.folder() is None, reason="needs nvidia-cuda-nvrtc and nvidia-cuda-runtime")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def test_every_kernel_has_a_source_and_instances():
    assert {kernel.source for kernel in launch.KERNELS.values()} == set(SOURCES) == set(INSTANCES)
    names = {(source, kernel.partition("<")[0]) for source, kernels in INSTANCES.items() for kernel in kernels}
    assert names == {(kernel.source, name) for name, kernel in launch.KERNELS.items()}


def faults(kernel, compiled):
    """What is wrong with a kernel as it was compiled."""
    if compiled.spills:
        yield f"{kernel} spills {compiled.spills} bytes"
    if compiled.registers > MOST_REGISTERS:
        yield f"{kernel} takes {compiled.registers} registers"
    narrow = {access for access in compiled.accesses if access.split(".")[-1] in ("u8", "s8", "b8", "u16", "b16")}
    if narrow and "unsigned char" not in kernel and "unsigned short" not in kernel:
        yield f"{kernel} has narrow accesses: {sorted(narrow)}"
    if "uint4" in kernel and not {"ld", "st"} <= {access[:2] for access in compiled.accesses if ".v4." in access}:
        yield f"{kernel} does not load and store 16 bytes at a time"


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills_and_with_wide_accesses(source, arch):
    compiled = nvrtc.compile_kernels(launch.FOLDER / source, INSTANCES[source], arch)
    for kernel, result in compiled.items():
        print(f"sm_{arch} {kernel}: {result.registers} registers, {result.spills} bytes spilled")
    assert [fault for kernel, result in compiled.items() for fault in faults(kernel, result)] == []


SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(const uint4* in, uint4* out) {
  uint4 all[32];
  for (int i = 0; i < 32; i++) all[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 32; i++) out[i * 1024 + threadIdx.x] = all[31 - i];
}
__global__ void narrow(const unsigned char* in, unsigned char* out) { out[threadIdx.x] = in[threadIdx.x]; }
"""


@needs_nvrtc
def test_a_spill_and_a_narrow_load_are_seen(tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text(SPILLS)
    compiled = nvrtc.compile_kernels(source, ("spills", "narrow"), 90)
    assert "spills" in " ".join(faults("spills", compiled["spills"]))
    assert "narrow accesses" in " ".join(faults("narrow", compiled["narrow"]))
    assert "16 bytes" in " ".join(faults("narrow<uint4>", compiled["narrow"]))


@needs_nvrtc
def test_a_syntax_error_comes_with_the_compilers_words(tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text("__global__ void bad() { nothing(); }")
    with pytest.raises(RuntimeError, match=r"bad\.cu.*nothing"):
        nvrtc.compile_kernels(source, ("bad",), 90)


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_each_source_compiles_by_itself_with_nvcc(source, tmp_path):
    unit = tmp_path / "unit.cu"  # a template alone makes no code
    instance = INSTANCES[source][0]
    unit.write_text(f'#include "{launch.FOLDER / source}"\nauto* kernel = &{instance};\n')
    for path in (launch.FOLDER / source, unit):
        command = ["nvcc", "-arch=sm_90", "-std=c++17", "-Werror", "all-warnings", "--cubin"]
        done = subprocess.run(
            [*command, "-o", tmp_path / "out.cubin", path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_signatures_are_those_of_the_source(source, kernels_on_cpu):
    for kernel in INSTANCES[source]:
        assert library(kernel).signature(kernel) == launch.KERNELS[kernel.partition("<")[0]].signature


def test_headers_are_guarded():
    for header in launch.FOLDER.glob("*.cuh"):
        assert "#pragma once" in header.read_text(), f"{header.name} may be included once only"


def test_python_and_cuda_agree_on_constants():
    text = (launch.FOLDER / "rows.cuh").read_text()
    assert f"kThreads = {kernels.THREADS};" in text
    assert f"kThreads = {kernels.THREADS};" in (launch.FOLDER / "plan.cu").read_text()
    assert f"__launch_bounds__({32 * router.WARPS})" in (launch.FOLDER / "router.cu").read_text()


def test_every_instance_that_python_asks_for_is_listed():
    chunks = {"uint4", *kernels.SCALAR.values()}
    encode = {f"encode<{chunk}, {k}>" for chunk in chunks for k in (0, *kernels.UNROLLED)}
    assert encode == set(INSTANCES["encode.cu"])
    decode = {
        f"{name}<{element}, {chunk}, {k}>"
        for name in ("decode", "decode_backward")
        for dtype, element in kernels.ELEMENT.items()
        for chunk in ("uint4", kernels.SCALAR[dtype.itemsize])
        for k in (0, *kernels.UNROLLED)
    }
    assert decode == set(INSTANCES["decode.cu"])
