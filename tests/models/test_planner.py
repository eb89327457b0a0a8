"""The planner's parts: formulas against the modules that run, and against the papers they are from."""

import dataclasses
import math
import re
import tomllib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turnout.dispatch.autoselect.profile import Flop, Link, Profile
from turnout.models import GPT, GPTConfig, Stages
from turnout.models.pipeline.partition import PER_RANK
from turnout.models.planner import Architecture, Cluster, Estimator, Layout, search, simulate
from turnout.models.planner.cluster import PRESETS, presets
from turnout.models.planner.layout import misfit
from turnout.models.planner.links import Group
from turnout.models.planner.memory import Activations, best_segment
from turnout.models.planner.roofline import Kernels
from turnout.models.planner.share import bubble, in_flight, shares, stage_blocks
from turnout.models.planner.simulator import StageTimes
from turnout.moe import Capacity

SELENE = Cluster.load("selene")
GPT3 = Architecture.dense(layers=96, dim=12288, heads=96, vocab=51200, seq=2048)


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(),
        GPTConfig(moe_every=0, layers=3, vocab=100, dim=48, heads=4, kv_heads=2, hidden=40),
        GPTConfig(moe_every=1, num_experts=4, top_k=3, moe={"experts": "gelu", "shared": 1}),
        GPTConfig(moe_every=(2, 3, 4), attention_bias=True, kv_heads=2, z_loss=0.1),
    ],
    ids=["default", "dense", "gelu experts", "first block dense"],
)
def test_parameters_are_those_of_the_module(config):
    with torch.device("meta"):
        model = GPT(config)
    planned = Architecture.of(config)
    if "experts" in config.moe:  # dense blocks have a gate, experts do not: there are no dense blocks here
        assert not planned.gated
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.active_parameters == model.active_parameters()
    assert planned.flops(1) == config.seq_len * model.flops_per_token()


def test_only_padding_computes_more_rows():
    for capacity, rows in ((None, 0.0), (1.25, 0.0), (Capacity(1.25, pad=True), 1.25)):
        assert Architecture.of(GPTConfig(moe={"capacity": capacity})).capacity == rows


@pytest.mark.parametrize(("l", "h", "a"), [(24, 2304, 24), (96, 12288, 96), (128, 25600, 160)])
def test_formulas_of_the_paper(l, h, a):  # noqa: E741
    """PTD-P (arXiv:2104.04473), sections 5.1 and appendix: P and F; its P leaves out the last norm."""
    V, s, B = 51200, 2048, 512
    model = Architecture.dense(layers=l, dim=h, heads=a, vocab=V, seq=s)
    assert model.parameters - 2 * h == pytest.approx(12 * l * h**2 * (1 + 13 / (12 * h) + (V + s) / (12 * l * h)))
    F = 96 * B * s * l * h**2 * (1 + s / (6 * h) + V / (16 * l * h))
    assert model.flops(B, "full") == pytest.approx(F, rel=1e-12)
    hardware = 72 * B * s * l * h**2 * (1 + s / (6 * h) + V / (12 * l * h))
    assert model.flops(B) == pytest.approx(hardware, rel=1e-12)
    assert model.flops(B, "selective") - model.flops(B) == pytest.approx(4 * B * s * s * l * h)  # arXiv:2205.05198


@pytest.mark.parametrize("t", [1, 8])
def test_activations_of_the_papers(t):
    """arXiv:2205.05198, equations 1, 2, 4 and 5, for a GPT with dropout and unfused attention."""
    s, b, h, a = 2048, 2, 12288, 96
    layout = Layout(tp=t, micro_batch=b, recompute="none")
    plain, split = Activations(GPT3, SELENE, layout, False), Activations(GPT3, SELENE, layout, True)
    sbh, scores = s * b * h, 5 * a * s / h
    assert plain.kept(False) == pytest.approx(sbh * (10 + 24 / t + scores / t))
    assert split.kept(False) == pytest.approx(sbh / t * (34 + scores))
    selective = Activations(GPT3, SELENE, dataclasses.replace(layout, recompute="selective"), True)
    assert selective.kept(False) == pytest.approx(34 * sbh / t)
    full = Activations(GPT3, SELENE, dataclasses.replace(layout, recompute="full"), False)
    assert full.kept(False) == 2 * sbh


@pytest.mark.parametrize(
    ("blocks", "kept", "inside", "flying"), [(96, 1.0, 34.0, 1), (64, 2.0, 2.0, 1), (48, 1, 10, 8)]
)
def test_segments_of_recomputation(blocks, kept, inside, flying):
    """PTD-P, section 3.5: c = sqrt(l A_in / A_mid), a whole number near it."""
    size = best_segment(blocks, kept, inside, flying)
    assert abs(size - math.sqrt(flying * blocks * kept / inside)) < 2
    held = [flying * -(-blocks // c) * kept + c * inside for c in range(1, blocks + 1)]
    assert held[size - 1] == min(held)


SCHEDULES = [
    ("gpipe", 1, 4, 8),
    ("1f1b", 1, 4, 8),
    ("1f1b", 1, 8, 16),
    ("interleaved1f1b", 2, 4, 16),
    ("interleaved1f1b", 3, 4, 8),
    ("interleaved_zb", 2, 4, 8),
    ("zbv", 2, 4, 8),
]


@pytest.mark.parametrize(("schedule", "v", "p", "m"), SCHEDULES)
def test_formulas_agree_with_the_schedules_own_actions(schedule, v, p, m):
    layout = Layout(pp=p, virtual=v, schedule=schedule, micro_batches=m)
    seen = simulate(layout, [StageTimes(1, 2)] * (p * v))
    assert seen.bubble == pytest.approx(bubble(layout))
    assert seen.held[0] == pytest.approx(in_flight(layout))
    assert seen.held[-1] == pytest.approx(in_flight(layout, p - 1))
    assert len(seen.spans) == p * v * m * (3 if schedule in ("interleaved_zb", "zbv") else 2)


def test_sending_takes_time_in_the_simulator():
    layout = Layout(pp=4, micro_batches=8, schedule="gpipe")
    assert simulate(layout, [StageTimes(1, 2)] * 4, send=0.5).seconds == 3 * 8 + 3 * 3 + 6 * 0.5
    with pytest.raises(ValueError, match="need 4 times"):
        simulate(layout, [StageTimes(1, 2)] * 3)


def test_the_step_agrees_with_a_replay_of_its_schedule():
    from turnout.models.planner.timeline import replay

    for schedule, v in (("1f1b", 1), ("interleaved1f1b", 3)):
        plan = search(GPT3, SELENE, 64, 32, {"pp": 8, "tp": 8, "schedule": schedule, "virtual": v}).plans[0]
        parts = plan.breakdown
        assert replay(GPT3, SELENE, plan).seconds == pytest.approx(plan.seconds - parts.optimizer - parts.dp, rel=0.05)


@pytest.mark.parametrize("schedule", PER_RANK)
def test_stages_are_those_that_run(schedule):
    config = GPTConfig(layers=8, moe_every=2)
    cut = Stages.of(config, schedule, 2)
    model, layout = Architecture.of(config), Layout(pp=2, virtual=PER_RANK[schedule][0], schedule=schedule)
    assert tuple(stage_blocks(model, len(cut.blocks))) == cut.blocks
    for rank, share in enumerate(shares(model, layout)):
        own = [block for stage in cut.of_rank(rank) for block in cut.blocks[stage]]
        assert share.mixtures == sum(block % 2 for block in own)
        assert (share.blocks, share.first, share.last) == (len(own), 0 in own, 7 in own)


def test_parameters_of_all_ranks_are_the_model_and_a_second_embedding():
    layout = Layout(pp=4, virtual=1, schedule="1f1b")
    held = sum(share.dense_parameters(GPT3, 1) for share in shares(GPT3, layout))
    assert held == GPT3.parameters + GPT3.embedding_parameters


def test_products_by_tile_and_wave():
    kernels = Kernels(SELENE.device, SELENE.device.peak("bf16"), 2)

    def share(m: int, n: int, k: int) -> float:
        return 2 * m * n * k / kernels.product(m, n, k) / kernels.peak

    assert 0.6 < share(8192, 8192, 8192) < SELENE.device.product_share
    assert share(128, 8192, 8192) < share(1024, 8192, 8192) < share(8192, 8192, 8192)
    assert share(8192, 8192, 64) < 0.5 * share(8192, 8192, 4096)  # start and end of a tile, and bytes
    m, n = 256 * 108, 128  # one tile for each multiprocessor; one more is a wave of its own
    assert kernels.product(m + 256, n, 4096) > 1.2 * kernels.product(m, n, 4096)
    assert kernels.product(1, 8192, 8192) >= kernels.moved(2 * 8192 * 8192)  # reading the weights
    few, many = kernels.grouped(64, 16, 4096, 4096), kernels.grouped(8, 128, 4096, 4096)
    assert few > 3 * many  # 1,024 rows either way: experts with few rows fill no tile, and all weights are read


def test_collectives_by_place():
    inside, across = Group(SELENE, 8, 1), Group(SELENE, 8, 8)
    assert (inside.nodes, across.nodes, Group(SELENE, 16, 4).nodes) == (1, 8, 8)
    assert across.all_reduce(1e9) > 5 * inside.all_reduce(1e9)
    assert Group(SELENE, 16, 1).all_reduce(1e9) < 1.6 * inside.all_reduce(1e9)  # all eight adapters carry a ring
    assert Group(SELENE, 1, 1).all_reduce(1e9) == 0
    assert inside.all_reduce(1e9) == pytest.approx(2 * inside.all_gather(1e9), rel=0.02)


def test_the_parts_are_the_step():
    for fixed in ({"pp": 8, "tp": 8}, {"pp": 16, "tp": 4, "micro_batch": 1}):
        plan = search(GPT3, SELENE, 1024, 1536, fixed).plans[0]
        parts = plan.breakdown
        assert parts.compute + parts.pipeline_bubble + parts.optimizer + parts.exposed == pytest.approx(plan.seconds)
        assert parts.exposed <= parts.tp + parts.pp + parts.dp + parts.ep + 1e-9
        assert plan.fits
        assert sum(plan.memory) == plan.memory.total
    volume = parts.tp / plan.layout.micro_batches / (96 / 16)
    ring = 1.5 * 4 * 2 * (3 / 4) * 2048 * 12288 * 2 / 230e9  # 8 b s h (t - 1) / t, and half of it again
    assert volume == pytest.approx(ring, rel=0.15)  # latencies, and the ends


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_faster_links_never_make_a_step_slower(recompute):
    """Also where one end of a pipeline computes more, and the other communicates more."""
    model = Architecture.dense(layers=8, dim=1536, heads=12, vocab=51200, seq=1024)
    layout = Layout(pp=2, tp=2, dp=6, micro_batch=2, micro_batches=20, recompute=recompute)
    for cluster in map(Cluster.load, ("gb200", "h100", "selene")):
        seconds = Estimator(model, cluster, 240)(layout).seconds
        inside, between = cluster.inside, cluster.between
        for part in (
            f"inside.gbs={2 * inside.gbs}",
            f"between.gbs={2 * between.gbs}",
            f"inside.step_us={inside.step_us / 2}",
        ):
            assert Estimator(model, cluster.changed([part]), 240)(layout).seconds <= seconds * (1 + 1e-9), part


def test_zero_splits_what_it_says():
    estimate = Estimator(GPT3, Cluster.load("h100"), 1024)
    held = [
        estimate.memory(Layout(dp=512, tp=2, zero=zero, micro_batch=1, micro_batches=2, recompute="full"))
        for zero in range(4)
    ]
    assert held[1].optimizer == pytest.approx(held[0].optimizer / 512)
    assert held[1].gradients == held[0].gradients
    assert held[2].gradients == pytest.approx(held[0].gradients / 512)
    assert held[2].weights == held[0].weights
    assert held[3].weights == pytest.approx(held[0].weights / 512)


def test_misfits_name_the_flag_and_the_remedy():
    model = Architecture.of(GPTConfig(layers=4))
    for layout, words in {
        Layout(tp=3): r"--heads \(4\) must be a multiple of --tp \(3\)",
        Layout(ep=3, dp=4): r"--experts \(8\) must be a multiple of --ep",
        Layout(dp=3): r"--batch \(32\) must be a multiple of --dp x --micro-batch \(3\)",
        Layout(pp=8, micro_batches=32): r"--layers \(4\) cannot fill",
        Layout(pp=4, micro_batches=2): r"needs at least --pp \(4\) micro-batches",
        Layout(pp=2, micro_batches=5, schedule="interleaved1f1b", virtual=2): "equal rounds",
        Layout(pp=2, micro_batches=4, schedule="zbv", virtual=3): "runs 2 stages",
        Layout(virtual=2): "needs a pipeline",
    }.items():
        assert re.search(words, misfit(layout, model, 32) or ""), layout
    assert misfit(Layout(pp=2, dp=2, micro_batches=8, micro_batch=2), model, 32) is None
    with pytest.raises(ValueError, match="nothing fits into 80 GB"):
        search(GPT3, SELENE, 8, 8)
    with pytest.raises(ValueError, match=r"--pp 5 x --tp 2 = 10 does not divide --gpus 24"):
        search(GPT3, SELENE, 24, 24, {"pp": 5, "tp": 2})
    with pytest.raises(ValueError, match="--micro-batch must be positive"):
        search(GPT3, SELENE, 64, 64, {"micro_batch": 0})
    for fixed, words in (({"schedule": "2f2b"}, "--schedule must be one of gpipe"), ({"vp": 2}, "a layout has no vp")):
        with pytest.raises(ValueError, match=words):
            search(GPT3, SELENE, 64, 64, fixed)


@pytest.mark.parametrize("name", presets())
def test_presets_name_the_source_of_each_constant(name):
    assert {"selene", "h100", "h200", "gb200", "laptop"} <= set(presets())
    text = (PRESETS / f"{name}.toml").read_text()
    for line in text.splitlines():
        if "=" in line and not line.startswith(("#", "about")):
            assert re.search(r"#\s*\w", line), line
    assert Cluster.load(name).about == tomllib.loads(text)["about"]


def test_clusters_are_checked(tmp_path):
    text = (PRESETS / "selene.toml").read_text()
    path = tmp_path / "mine.toml"
    for old, new, words in (
        ("sms = 108", "smms = 108", "unknown smms"),
        ("sms = 108", "", "missing 1 required"),
        ("sms = 108", 'sms = "many"', "must be a number"),
        ("[device]", "[device", "--cluster"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=words):
            Cluster.load(path)
    path.write_text(text)
    assert Cluster.load(path) == SELENE
    assert not SELENE.changed(["software.fused=false"]).software.fused
    for bad in ("software.fussed=false", "fused=false", "device.sms=many", "device.sms=-1"):
        with pytest.raises(ValueError, match=bad.partition("=")[0]):
            SELENE.changed([bad])
    with pytest.raises(ValueError, match="no such preset"):
        Cluster.load("frontier")


def test_a_probed_cluster_keeps_its_links():
    profile = Profile(4, 2, Link(1e-5, 2e-6, 1e-11), Link(3e-5, 4e-6, 1e-9), Flop(1e-12, 5e-13))
    cluster = SELENE.with_links(profile)
    assert cluster.ranks_per_node == 2
    assert cluster.between.gbs == pytest.approx(1)
    assert cluster.inside.step_us == pytest.approx(10)
    assert cluster.device.peak("bf16") * cluster.device.product_share == pytest.approx(2e12)


@given(
    layers=st.integers(1, 24),
    heads=st.sampled_from([1, 4, 12, 16]),
    experts=st.sampled_from([0, 4, 6, 16]),
    every=st.integers(1, 3),
    gpus=st.sampled_from([1, 2, 6, 24]),
    batch=st.sampled_from([1, 24, 64]),
    cluster=st.sampled_from(["selene", "h100", "laptop"]),
)
@settings(max_examples=10)
def test_any_search_finds_layouts_that_run_or_says_why(layers, heads, experts, every, gpus, batch, cluster):
    config = GPTConfig(
        layers=layers, dim=32 * heads, heads=heads, hidden=128, num_experts=experts or 8, moe_every=experts and every
    )
    model = Architecture.of(config)
    plans, said = [], ""
    try:
        plans = search(model, Cluster.load(cluster), gpus, batch).plans
    except ValueError as error:
        said = str(error)
    assert plans or "--" in said
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds)
    for number, plan in enumerate(plans[:20]):
        at, parts = plan.layout, plan.breakdown
        assert at.ranks == gpus
        assert at.micro_batch * at.micro_batches * at.dp == batch
        assert misfit(at, model, batch) is None
        assert plan.fits
        assert 0 < plan.mfu < 1
        assert min(dataclasses.astuple(parts)) >= 0
        assert parts.exposed <= parts.tp + parts.pp + parts.dp + parts.ep + 1e-9
        if at.pp > 1 and number < 2:  # the runtime cuts it as well
            assert len(Stages.of(config, at.schedule, at.pp, at.virtual).blocks) == at.pp * at.virtual
