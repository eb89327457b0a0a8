"""A layer is at any time what is written down, whatever has happened to it.

After each change outputs, gradients, losses and statistics of a forward are those of `reference_layer`, computed in
float64 from the layer's state dict. ``pytest tests/moe/test_life.py --fuzz=500`` lives more lives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import life
import pytest
from hypothesis.stateful import run_state_machine_as_test
from life import Life
from ranks import errors, run
from turnout.moe import MoE

LIVES = 25


def deaf_to_top_k() -> None:
    MoE.top_k = property(lambda layer: layer.gate.top_k, lambda layer, top_k: None)


def deaf_to_capacity() -> None:
    MoE.capacity = property(lambda layer: None, lambda layer, capacity: None)


def blind_to_checkpoints() -> None:
    MoE.load_state_dict = lambda layer, state, assign: None


def without_merging() -> None:
    life.merge_lora = lambda layer, keep: layer


def with_every_gradient_a_little_off() -> None:
    step = MoE.forward
    MoE.forward = lambda layer, x, mask, ids: step(layer, x + 1e-6 * (x - x.detach()), mask, ids)


def live(examples: int, fault: Callable[[], None] | None = None, **options: Any) -> None:
    if fault is not None:
        fault()  # of this process alone
    options = {"phases": [hypothesis.Phase.generate, hypothesis.Phase.shrink]} | options
    options |= {"max_examples": examples, "stateful_step_count": 20, "deadline": None, "database": None}
    options |= {"report_multiple_bugs": False}
    quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    run_state_machine_as_test(Life, settings=hypothesis.settings(**options, suppress_health_check=quiet))


def test_fuzz_a_layer_is_at_any_time_what_is_written_down(request):
    lives = request.config.getoption("--fuzz")
    short = {} if lives else {"phases": [hypothesis.Phase.generate]}  # to shrink a failure takes minutes
    run(1, partial(live, lives or LIVES, **short), timeout=3600)


FAULTS = [deaf_to_top_k, deaf_to_capacity, blind_to_checkpoints, without_merging]


@pytest.mark.sampled
@pytest.mark.parametrize("fault", [*FAULTS, with_every_gradient_a_little_off])
def test_a_life_notices(fault):
    (error,) = errors(1, partial(live, 20 * LIVES, fault, phases=[hypothesis.Phase.generate]))
    assert error.startswith("AssertionError"), error
