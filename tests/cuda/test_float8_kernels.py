"""The kernels in float8: run by Triton's interpreter, and compiled for GPUs that are not here."""

import json
from importlib.metadata import version

import pytest
import torch
from test_experts import needs_gpu, needs_triton, python
from torch.torch_version import TorchVersion


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=needs_gpu)])
def results(request, tmp_path_factory):
    """What `run_float8.py` computes, in a process of its own."""
    file = tmp_path_factory.mktemp("float8") / "results.pt"
    if request.param == "cuda":
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("no products in float8 before sm_89")
        python("run_float8.py", str(file), "cuda")
    elif TorchVersion(version("triton")) < "3.7" and TorchVersion(version("numpy")) >= "2.4":
        pytest.skip("Triton 3.6's interpreter makes numbers of arrays in a way that numpy 2.4 refuses")
    else:
        python("run_float8.py", str(file), "cpu", TRITON_INTERPRET="1")
    return torch.load(file)


@needs_triton
@pytest.mark.slow
def test_float8_is_that_of_plain_pytorch(results):
    """Casts are equal to the bit, and layers but for the order of sums, which moves a cast now and then."""
    for values, scale, wanted, wanted_scale in results["casts"]:
        finite = ~wanted_scale.isnan()
        assert torch.equal(finite, ~scale.isnan())
        assert torch.equal(scale[finite], wanted_scale[finite])
        assert torch.equal(values[finite], wanted[finite])
    for errors in results["errors"].values():
        assert max(errors.values()) < 1e-5, errors


@needs_triton
@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(("arch", "product"), [(90, "wgmma.mma"), (89, "mma.sync"), (100, "tcgen05.mma")])
def test_float8_compiles_as_an_architecture_wants_it(arch, product, tmp_path):
    printed = python("compile_experts.py", str(arch), "--float8", TRITON_CACHE_DIR=str(tmp_path))
    for line in map(json.loads, printed.splitlines()):
        assert line["spilled"] == 0, line
        assert line["shared"] <= (99 if arch == 89 else 227) * 1024, line
        if line["kernel"] in ("up", "down", "hidden", "down, backward"):
            assert line["float8"], f"products are not in float8: {line}"
            assert line["product"] == product, line
            assert line["chained"] == line["waited for"] == 0, line
            assert (line["described"] > 0) == (arch >= 90), line
