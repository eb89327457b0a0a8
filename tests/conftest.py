"""What every test runs under: one thread, and properties that give the same examples each time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: it reads this once

import hypothesis
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
