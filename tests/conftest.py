"""What every test runs under: one thread, and properties that give the same examples each time."""

import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: it reads this once

import hypothesis
import pytest
import torch
import torch._dynamo
import torch.distributed.tensor  # with _dynamo: ranks started by fork must find both imported

torch.set_num_threads(1)

for profile, examples in (("sampled", 20), ("all", 100)):
    hypothesis.settings.register_profile(
        profile,
        deadline=None,
        derandomize=True,
        max_examples=examples,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("sampled")


@pytest.fixture(params=[True, False], ids=["half-precision units", "half precision emulated"])
def half_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a CPU with units for bfloat16 and float16, and as on one without, whatever CPU this is.

    Nothing else in the package depends on the kind of CPU.
    """
    monkeypatch.setattr("turnout.moe.experts.grouped_mm._emulated", lambda dtype: not request.param)
    monkeypatch.setattr("turnout.moe.experts.grouped_mm._slow", lambda dtype: False)
    return request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="thorough tests, all cases of sampled ones, more random examples"
    )
    parser.addoption("--fuzz", type=int, help="so many seeds, or examples, of tests that draw at random")
    parser.addoption("--fuzz-seed", type=int, help="this seed alone of test_fuzz.py, or with --fuzz the first one")


def pytest_configure(config: pytest.Config) -> None:
    """Make a process that can fork ranks: autograd starts a thread for each device it counts in its first backward.

    So that it counts none, the first backward is here. Later it could count eight: a fake tensor, in a build for CUDA
    that sees no GPU, puts so many imagined ones in their place.
    """
    if config.getoption("--all"):
        hypothesis.settings.load_profile("all")
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.ones((), requires_grad=True).backward()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out thorough tests, and of each sampled test keep the first case, the ninth and so on.

    Sampled are tests that are marked so, and all that start ranks: those in tests/distributed. --all runs everything.
    """
    if config.getoption("--all"):
        return
    seen: Counter[tuple[str, str]] = Counter()
    kept, left = [], []
    for item in items:
        test = str(item.path), getattr(item, "originalname", item.name)
        sampled = item.get_closest_marker("sampled") is not None or item.path.parent.name == "distributed"
        thorough = item.get_closest_marker("thorough") is not None
        (left if thorough or (sampled and seen[test] % 8) else kept).append(item)
        seen[test] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left)
