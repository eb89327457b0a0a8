"""One set of ranks in two orders: where each rank lies, and which products are refused."""

import pytest
from ranks import errors, run
from torch.distributed import get_process_group_ranks
from turnout.dispatch import Meshes
from turnout.dispatch import mesh as axes


def groups(sizes):
    """Which ranks this one meets along each axis."""
    meshes = Meshes.of("cpu", **sizes)
    found = {name: get_process_group_ranks(meshes.dense[name].get_group()) for name in ("pp", "dp", "cp", "tp")}
    for name in axes.names(meshes.experts):
        found[name] = get_process_group_ranks(meshes.experts[name].get_group())
    ep = axes.axis(meshes.experts, "ep")
    assert ep is not None
    found["whole ep"] = get_process_group_ranks(ep.get_group())
    for name in ("tokens", "sequences", "replicas"):
        found[name] = get_process_group_ranks(getattr(meshes, name).get_group())
    return found


def test_ep_spans_dp_and_tp():
    assert run(8, groups, {"pp": 2, "tp": 2, "ep": 4})[5] == {
        "pp": [1, 5],
        "dp": [5, 7],
        "cp": [5],
        "tp": [4, 5],
        "edp": [5],
        "ep": [4, 5, 6, 7],
        "etp": [5],
        "whole ep": [4, 5, 6, 7],
        "tokens": [4, 5, 6, 7],
        "sequences": [4, 5],
        "replicas": [5, 7],
    }


def test_ep_and_edp_span_cp():
    found = run(8, groups, {"cp": 2, "tp": 2, "ep": 4})[2]
    assert {name: found[name] for name in ("dp", "cp", "tp", "edp", "ep", "sequences", "replicas")} == {
        "dp": [2, 6],
        "cp": [0, 2],
        "tp": [2, 3],
        "edp": [2, 6],
        "ep": [0, 1, 2, 3],
        "sequences": [0, 1, 2, 3],
        "replicas": [0, 2, 4, 6],
    }


def test_what_remains_is_edp():
    found = run(8, groups, {"tp": 4, "ep": 2, "etp": 2})[3]
    assert {name: found[name] for name in ("dp", "tp", "edp", "ep", "etp")} == {
        "dp": [3, 7],
        "tp": [0, 1, 2, 3],
        "edp": [3, 7],
        "ep": [1, 3],
        "etp": [2, 3],
    }


def test_ep_over_whole_nodes_is_node_and_local():
    found = run(8, groups, {"tp": 2, "ep": 4, "pp": 2, "ranks_per_node": 2})[6]
    assert (found["node"], found["local"], found["whole ep"]) == ([4, 6], [6, 7], [4, 5, 6, 7])
    assert "ep" not in found


@pytest.mark.parametrize("sizes", [{"ep": 4}, {"ep": 2, "etp": 2}, {"ep": 2}], ids=str)
@pytest.mark.parametrize("ranks_per_node", [1, 3, 4, 8])
def test_ep_within_a_node_or_across_ragged_ones_stays_whole(sizes, ranks_per_node):
    assert all("node" not in found for found in run(4, groups, {**sizes, "ranks_per_node": ranks_per_node}))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pp": 3}, "pp=3 x cp=1 x tp=1 = 3 does not divide the 4 ranks; start a multiple of 3 ranks"),
        (
            {"tp": 2, "pp": 2, "ep": 4},
            "ep=4 x etp=1 = 4 does not divide the dp=1 x cp=1 x tp=2 = 2 ranks of a",
        ),
        ({"tp": 0}, "tp must be a positive integer; got 0"),
        ({"ranks_per_node": 0}, "ranks_per_node must be positive; got 0"),
    ],
    ids=str,
)
def test_products_that_do_not_fit_name_the_axes(sizes, message):
    for error in errors(4, groups, sizes):
        assert error.startswith(f"ValueError: {message}")
