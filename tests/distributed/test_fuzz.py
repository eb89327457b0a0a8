"""Random combinations of everything, over meshes: each equals an independent model on one process, in float64.

``pytest tests/distributed/test_fuzz.py --fuzz=500`` runs more seeds, ``--fuzz-seed=17`` that one alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import reference
import torch
from flaws import FLAWS, sometimes_flawed
from fuzz import FOLDED, KINDS, MESHES, Case, Layer, drawn
from fuzz_oracle import expected
from fuzz_train import trained
from ranks import errors, run
from reference_layer import Settings
from reference_routes import GATES as KNOWN
from torch.torch_version import TorchVersion
from turnout.moe.capacity import POLICIES
from turnout.moe.experts.activation import ACTIVATIONS
from turnout.moe.gates import GATES

SEEDS = 40


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        first, number = (metafunc.config.getoption(name) for name in ("fuzz_seed", "fuzz"))
        seeds = range(number or SEEDS) if first is None else range(first, first + (number or 1))
        metafunc.parametrize("seed", seeds, ids=lambda n: f"seed={n}")


def test_ranks_compute_what_is_written_down(seed):
    case = sometimes_flawed(drawn(seed))
    try:
        if case.flaw is None:
            run(case.ranks, trained, case, expected(case), timeout=60)
        else:
            for error in errors(case.ranks, trained, case, None, timeout=60):
                assert error.startswith("ValueError"), error
                assert FLAWS[case.flaw].message in error
    except Exception as error:
        raise AssertionError(f"{error}\n{case}\nalone: pytest {__file__} --fuzz-seed={seed}") from error


def test_the_oracle_knows_every_gate_and_activation():
    assert KNOWN.keys() == GATES.keys()
    assert ACTIVATIONS.keys() == reference.ACTIVATIONS.keys()


def test_seeds_reach_everything():
    cases = [sometimes_flawed(drawn(seed)) for seed in range(1500)]
    layers = [layer for case in cases for layer in case.layers]

    def seen(values) -> Counter[str]:
        return Counter(map(str, values))

    assert seen(case.flaw for case in cases).keys() == {str(None), *FLAWS}
    assert 0.05 < sum(case.flaw is not None for case in cases) / len(cases) < 0.15
    meshes = seen(case.axes for case in cases if not case.folded) | seen((c.ranks, c.axes) for c in cases if c.folded)
    assert meshes.keys() == {str(axes) for axes in (*MESHES, *FOLDED)}
    assert seen(layer.settings.gate for layer in layers).keys() == GATES.keys()
    assert seen(layer.settings.experts for layer in layers).keys() == {str(kind) for kind in KINDS}
    assert seen(layer.settings.drop_policy for layer in layers).keys() == set(POLICIES)
    assert {case.wrapper for case in cases} == {"plain", "ddp", "fsdp"}
    assert {case.dispatcher for case in cases} == {"auto", "flat", "2dh", "node"}
    assert {case.wire for case in cases} >= {None, "bf16", "fp8"}
    assert {case.adapters for case in cases} == {None, "early", "late"}
    assert any(0 in sizes for case in cases for sizes in case.sizes)
    assert {case.gathers for case in cases} == {False, True}


LAYER = Layer(Settings(4, "topk", 2, aux_loss_weight=0.2), hidden=12, bias=True, shared=0, pad=False, recompute=False)
CONTROL = Case(
    seed=0,
    ranks=2,
    axes={"ep": 2},
    folded=False,
    dispatcher="flat",
    overlap=None,
    wire=None,
    layers=(LAYER,),
    dtype=torch.float64,
    wrapper="plain",
    adapters=None,
    router=False,
    sizes=((2, 1), (1, 1)),
    length=3,
    masked=False,
    micro_batches=1,
    optimizer="adamw",
    clip=None,
)


def swap_experts(model) -> None:
    w = model.layers[0].experts.w_up.to_local()
    with torch.no_grad():
        w[[0, 1]] = w[[1, 0]]


def spoil_the_router(model) -> None:
    model.layers[0].gate.weight.register_hook(lambda grad: grad * (1 + 1e-6))


def weigh_the_loss(model) -> None:
    model.layers[0].balance = model.layers[0].balance.weight * (1 + 1e-6)


def test_the_comparison_passes_without_a_change():
    run(2, trained, CONTROL, expected(CONTROL))


@pytest.mark.parametrize("change", [swap_experts, spoil_the_router, weigh_the_loss])
def test_the_comparison_notices(change):
    assert any(error.startswith("AssertionError") for error in errors(2, trained, CONTROL, expected(CONTROL), change))


def test_what_is_not_refused_is_noticed():
    case: Case = replace(CONTROL, flaw="unknown wire")
    assert any("a flaw has passed" in error for error in errors(2, trained, case, None))


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="DTensor of 2.11 cannot view tensors without elements"
)
def test_a_rank_of_dp_may_have_no_sequences_where_matrices_are_split():
    """DTensor lays the gradient of a matrix out in another way there: sums were of unlike parts."""
    for length in (2, 3):
        axes = {"tp": 2, "ep": 2}
        case = replace(CONTROL, ranks=4, axes=axes, folded=True, sizes=((0, 2), (2, 1)), length=length)
        run(4, trained, case, expected(case))
