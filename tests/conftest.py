"""What every test runs under: one thread, and properties that give the same examples each time."""

import os
import sys
from collections import Counter

# Before torch, which reads these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" not in os.environ and not any("gpu" in argument for argument in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # backward on a process with GPUs starts threads, and ranks are forked

import hypothesis
import pytest
import torch
import torch._dynamo
import torch.distributed.tensor  # with _dynamo: ranks started by fork must find both imported

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "turnout",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("turnout")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="all cases of tests marked `sampled`, not every third")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of each test marked `sampled`, keep the first, the fourth and so on, unless all are asked for."""
    if config.getoption("--all"):
        return
    seen: Counter[tuple[str, str]] = Counter()
    kept, left = [], []
    for item in items:
        test = str(item.path), getattr(item, "originalname", item.name)
        (left if item.get_closest_marker("sampled") and seen[test] % 3 else kept).append(item)
        seen[test] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left)
