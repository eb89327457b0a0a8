"""Blocks that `parallel_model` compiles train on any mesh as one rank does without torch.compile."""

from __future__ import annotations

from functools import partialmethod

import pytest
from ranks import run
from test_oracle import CASES, Case, one_rank, trains_as_one_rank
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.sampled]


def compiled(case: Case) -> None:
    nn.Module.compile = partialmethod(nn.Module.compile, backend="eager")  # in this rank's own process
    trains_as_one_rank(Case(case.ranks, case.axes, case.options | {"compile": True}), "sequence")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as below
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["tp2", "pp2 1f1b", "dp2 fsdp", "ep2"])
def test_trains_as_one_rank(name):
    one_rank("sequence", CASES[name].layers)
    run(CASES[name].ranks, compiled, CASES[name])
