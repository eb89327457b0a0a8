"""Nodes, pods, slow and lost nodes: what they cost, and what the search does about them."""

import pytest
from turnout.dispatch.autoselect.profile import Message
from turnout.models import GPTConfig
from turnout.models.planner import Architecture, Cluster, Estimator, Layout, search
from turnout.models.planner.__main__ import main
from turnout.models.planner.links import Group
from turnout.models.planner.placement import Placement

H100 = Cluster.load("h100")
MODEL = Architecture.dense(layers=48, dim=8192, heads=64, vocab=51200, seq=2048)


def test_three_nodes_of_eight():
    """24 GPUs, which no power of two divides."""
    plan = search(MODEL, H100, 24, 96).plans[0]
    assert plan.layout.ranks == 24
    assert plan.fits
    assert 3 in (plan.layout.pp, plan.layout.dp) or plan.layout.pp % 3 == 0 or plan.layout.dp % 3 == 0


def test_groups_that_lie_across_nodes_use_the_links_between_them():
    """Of the tensor-parallel groups of 6 on nodes of 8, ranks 6 to 11 have two on the first node."""
    assert Group(H100, 6, 1, ranks=24).local == 2
    assert Group(H100, 6, 1, ranks=24).all_reduce(1e9) > 3 * Group(H100, 4, 1, ranks=24).all_reduce(1e9)
    assert Group(H100, 6, 1, ranks=6).nodes == 1
    assert list(Group(H100, 12, 1, ranks=24).all_to_all(Message(1024, 4096, 2, 24))) == ["flat"]  # 8 and 4 on a node
    assert Group(H100, 3, 8, ranks=24).local == 1
    model = Architecture.dense(layers=24, dim=3072, heads=24, vocab=51264, seq=2304)
    axes = {each.layout.tp: each.breakdown.tp for each in reversed(search(model, H100, 24, 96, {"pp": 1}).plans)}
    assert axes[6] > 2 * axes[8]


def test_both_ends_of_a_pipeline_in_one_node_share_its_links():
    model = Architecture.dense(layers=8, dim=1024, heads=8, vocab=51200, seq=1024)
    slow = H100.changed(["between.gbs=0.001"])
    layout = {"pp": 8, "tp": 1}
    assert search(model, slow, 8, 64, layout).plans[0].seconds == search(model, H100, 8, 64, layout).plans[0].seconds


def test_a_lost_node_leaves_the_best_of_what_is_left():
    cluster = H100.changed(["fabric.nodes=4", "fabric.down=[2]"])
    with pytest.raises(ValueError, match="3 of 4 nodes are up, with 24 ranks"):
        search(MODEL, cluster, 32, 96)
    plan = search(MODEL, cluster, 24, 96).plans[0]
    assert plan.placement is not None
    assert plan.placement.nodes(plan.layout) == [0, 1, 3]
    whole = search(MODEL, H100, 32, 96).plans[0]
    assert whole.seconds < plan.seconds < 2 * whole.seconds


def test_a_slow_node_is_left_out_if_there_are_others():
    slow = ["fabric.nodes=5", "fabric.slow=[[1, 0.5]]"]
    fixed = {"pp": 1, "tp": 8, "zero": 1}
    healthy = search(MODEL, H100, 32, 96, fixed).plans[0]
    spare = search(MODEL, H100.changed(slow), 32, 96, fixed).plans[0]
    assert spare.seconds == healthy.seconds
    assert spare.placement is not None
    assert spare.placement.nodes(spare.layout) == [0, 2, 3, 4]
    forced = search(MODEL, H100.changed([*slow, "fabric.nodes=4"]), 32, 96, fixed).plans[0]
    assert forced.breakdown.dp == pytest.approx(2 * healthy.breakdown.dp, rel=0.1)
    assert forced.seconds > healthy.seconds


def test_the_order_of_nodes_follows_the_pods():
    """Pods of 4 nodes: by stage, each of 4 stages has a pod, and all its nodes send to the next one at a time."""
    cluster = H100.changed(["fabric.pod=4", "fabric.oversubscription=4"])
    layout = Layout(pp=4, tp=8, dp=4, micro_batches=8, zero=1)
    stage, replica = (Placement(cluster, order) for order in ("by stage", "by replica"))
    assert (stage.slowdown("pp", layout), stage.slowdown("dp", layout)) == (4, 1)
    assert (replica.slowdown("pp", layout), replica.slowdown("dp", layout)) == (1, 4)
    assert stage.nodes(layout) == list(range(16))
    assert replica.nodes(layout) == [4 * r + s for s in range(4) for r in range(4)]
    assert Placement(H100).slowdown("pp", layout) == 1
    times = [Estimator(MODEL, cluster, 32, each)(layout).breakdown for each in (stage, replica)]
    assert times[0].pp > times[1].pp
    assert times[0].dp < times[1].dp
    found = search(MODEL, cluster, 128, 32, {"pp": 4, "tp": 8, "zero": 1}).plans[0]
    assert found.seconds <= min(Estimator(MODEL, cluster, 32, each)(found.layout).seconds for each in (stage, replica))


def test_the_page_names_the_nodes(capsys):
    flags = "--cluster h100 --layers 48 --dim 8192 --heads 64 --gpus 24 --batch 96 --tp 8"
    lost = ["--set", "fabric.nodes=4", "--set", "fabric.down=[1]"]
    assert main([*flags.split(), *lost]) == 0
    assert "--node-rank: 0, 2, 3" in capsys.readouterr().out
    assert main(flags.split()) == 0
    assert "--node-rank" not in capsys.readouterr().out


def test_rails_speak_for_2dh():
    """Flat sends from any rail to any other, above the leaves; 2DH stays on its rail between nodes."""
    message = Message(4096, 8192, top_k=8, num_experts=64)
    oversubscribed = H100.changed(["fabric.rails=true", "fabric.oversubscription=4"])
    plain, rails = (Group(cluster, 32).all_to_all(message) for cluster in (H100, oversubscribed))
    assert rails["2dh"] == plain["2dh"]
    assert rails["flat"] > 2 * plain["flat"]


def test_experts_that_leave_the_node_travel_over_the_slow_links():
    model = Architecture.of(
        GPTConfig(layers=16, dim=2048, heads=16, hidden=2048, num_experts=16, moe_every=1, seq_len=2048, vocab=32000)
    )
    slow = Estimator(model, H100.changed(["between.gbs=2"]), 64)
    seconds = {ep: slow(Layout(dp=32, ep=ep, micro_batch=2)).breakdown.ep for ep in (4, 8, 16)}
    assert seconds[4] < seconds[8] < 0.2 * seconds[16]
