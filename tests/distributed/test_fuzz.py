"""Random combinations of everything, over meshes: each equals an independent model on one process, in float64.

``pytest tests/distributed/test_fuzz.py --fuzz=500`` runs more seeds, ``--fuzz-seed=17`` one of them alone.
"""

from __future__ import annotations

import pytest
import torch
from fuzz import FLAWS, drawn
from fuzz_train import expected, trained
from ranks import errors, run

SEEDS = 40


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        alone, number = (metafunc.config.getoption(name) for name in ("fuzz_seed", "fuzz"))
        metafunc.parametrize("seed", range(number or SEEDS) if alone is None else [alone], ids=lambda n: f"seed={n}")


def test_ranks_compute_what_the_oracle_does(seed):
    case = drawn(seed)
    try:
        if case.flaw is None:
            run(case.ranks, trained, case, expected(case), timeout=60)
        else:
            refused(case)
    except Exception as error:
        raise AssertionError(f"{error}\nthe case: {case}\nalone: pytest {__file__} --fuzz-seed={seed}") from error


def refused(case) -> None:
    for error in errors(case.ranks, trained, case, None, timeout=60):
        assert error.startswith("ValueError"), error
        assert FLAWS[case.flaw].message in error
