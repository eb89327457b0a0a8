"""Pieces of the pipeline: the cut, what travels between stages, experts inside a stage, and what does not fit."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from cases import runnable
from hypothesis import given
from hypothesis import strategies as st
from ranks import errors, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from turnout.models import GPT, GPTConfig, next_token_loss
from turnout.models.pipeline.boundary import Boundary
from turnout.models.pipeline.engine import Pipeline
from turnout.models.pipeline.partition import PER_RANK, Stages, cut, flops
from turnout.models.pipeline.stage import Stage
from turnout.models.recompute import recompute
from turnout.moe import Balance, aux_loss, fully_shard_experts, parallelize, sync_gradients

CONFIG = GPTConfig(
    vocab=24,
    dim=8,
    layers=4,
    heads=2,
    hidden=8,
    seq_len=6,
    num_experts=4,
    moe={"balance": Balance(0.3, over="global")},
)


def batch(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(24, (size, 7), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def build(schedule: str, group: dist.ProcessGroup, m: int, **options) -> Pipeline:
    torch.manual_seed(0)
    stages = Stages.of(CONFIG, schedule, dist.get_world_size(group))
    parts = [part.double() for part in stages.build(dist.get_rank(group))]
    return Pipeline(parts, stages, group, m, **options)


def whole_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).double()


def gradients(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of the mean over micro-batches, on one rank."""
    model = whole_model()
    for tokens, targets in batches:
        ((next_token_loss(model(tokens), targets) + aux_loss(model)) / len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare(pipeline: Pipeline, expected: dict[str, torch.Tensor]) -> None:
    for part in pipeline.parts:
        for name, p in part.named_parameters():
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 8))
def test_no_cut_has_a_cheaper_dearest_stage(costs, stages):
    stages = min(stages, len(costs))
    ranges = cut(costs, stages)
    assert [i for r in ranges for i in r] == list(range(len(costs)))
    assert len(ranges) == stages
    assert all(ranges)
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1)]
    best = min(max(sum(costs[a:b]) for a, b in pairwise(c)) for c in cuts)
    assert max(sum(costs[i] for i in r) for r in ranges) == best


def test_costs_are_those_of_the_model():
    state = torch.get_rng_state()
    costs = flops(CONFIG)
    assert torch.equal(state, torch.get_rng_state())
    assert sum(costs) == GPT(CONFIG).flops_per_token()
    assert costs[1] > costs[0]  # the router
    assert costs[3] - costs[1] == 6 * 24 * 8  # the head
    heavy = replace(CONFIG, layers=8, vocab=8000)
    assert Stages.of(heavy, "1f1b", 2).blocks == (range(7), range(7, 8))


@pytest.mark.parametrize("schedule", PER_RANK)
def test_every_stage_has_one_rank(schedule):
    stages = Stages.of(replace(CONFIG, layers=8), schedule, 4)
    owners = {stage: rank for rank in range(4) for stage in stages.of_rank(rank)}
    assert owners == {stage: stages.rank_of(stage) for stage in range(len(stages.blocks))}


def accumulated(schedule):
    pipeline = build(schedule, dist.group.WORLD, 2)
    for seed in range(3):  # and a change of shapes
        pipeline.step(*batch(seed, 4 + 2 * seed))
    chunks = [[t.chunk(2) for t in batch(seed, 4 + 2 * seed)] for seed in range(3)]
    expected = [gradients(list(zip(tokens, targets, strict=True))) for tokens, targets in chunks]
    compare(pipeline, {name: sum(grads[name] for grads in expected) for name in expected[0]})


@pytest.mark.parametrize("schedule", runnable(["1f1b", "zbv"]))
def test_steps_add_their_gradients(schedule):
    run(2, accumulated, schedule)


def with_experts_spread(schedule):
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "edp", "ep"))
    pipeline = build(schedule, mesh.get_group("pp"), 2)
    for part in pipeline.parts:
        parallelize(part, mesh)
    everyones = [batch(rank, 4) for rank in range(2)]
    losses = pipeline.step(*everyones[mesh.get_local_rank("ep")])
    for part in pipeline.parts:
        sync_gradients(part, mesh["edp", "ep"])
    # "global": over the same micro-batch of all data ranks
    halves = [[t.chunk(2)[i] for t in mine] for i in range(2) for mine in everyones]
    together = [tuple(map(torch.cat, zip(halves[i], halves[i + 1], strict=True))) for i in (0, 2)]
    compare(pipeline, gradients(together))
    return float(losses.aux)


@pytest.mark.parametrize("schedule", runnable(["1f1b", "interleaved_zb", "zbv"]))
def test_experts_are_spread_inside_a_stage(schedule):
    auxes = run(4, with_experts_spread, schedule)
    assert auxes == pytest.approx([auxes[0]] * 4)  # equal on all ranks of a pipeline, and "global" on all data ranks


def sharded(schedule):
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "edp", "ep"))
    pipeline = build(schedule, mesh.get_group("pp"), 2)
    data = mesh["edp", "ep"]._flatten("data")
    for part in pipeline.parts:
        parallelize(part, mesh)
        fully_shard_experts(part, mesh)
        fully_shard(part, mesh=data)
    everyones = [batch(rank, 4) for rank in range(2)]
    for _ in range(2):  # on top of earlier gradients
        pipeline.step(*everyones[mesh.get_local_rank("edp")])
    halves = [[t.chunk(2)[i] for t in mine] for i in range(2) for mine in everyones]
    together = [tuple(map(torch.cat, zip(halves[i], halves[i + 1], strict=True))) for i in (0, 2)]
    expected = {name: 2 * grad for name, grad in gradients(together).items()}
    compare(pipeline, expected)
    norm = pipeline.clip_grad_norm_(1e-3)
    exact = torch.stack([grad.square().sum() for grad in expected.values()]).sum().sqrt()
    torch.testing.assert_close(norm, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", runnable(["1f1b", "zbv"]))
def test_stages_may_be_sharded(schedule):
    run(4, sharded, schedule)


def recomputed(schedule, what):
    pipeline = build(schedule, dist.group.WORLD, 2)
    recompute(pipeline.parts, what)
    tokens, targets = batch(0)
    pipeline.step(tokens, targets, scale=16.0)
    grads = gradients(list(zip(tokens.chunk(2), targets.chunk(2), strict=True)))
    compare(pipeline, {name: 16 * grad for name, grad in grads.items()})


@pytest.mark.parametrize("what", ["full", "selective"])
@pytest.mark.parametrize("schedule", runnable(["1f1b", "interleaved_zb"]))
def test_stages_may_be_recomputed_and_losses_scaled(schedule, what):
    run(2, recomputed, schedule, what)


def sent(schedule, split):
    """Bytes this rank sends in a step, its gradients compared with one rank's; tp ranks compute the same here."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    number = 0

    def counting(method):
        def counted(stage, index):
            nonlocal number
            ops = method(stage, index)
            number += sum(op.tensor.nbytes for op in ops)
            return ops

        return counted

    Stage.get_fwd_send_ops = counting(Stage.get_fwd_send_ops)
    Stage.get_bwd_send_ops = counting(Stage.get_bwd_send_ops)
    boundary = Boundary(8, mesh.get_group("tp"), sequence_parallel=False) if split else None
    pipeline = build(schedule, mesh.get_group("pp"), 4, boundary=boundary)
    tokens, targets = batch(0)
    pipeline.step(tokens, targets)
    compare(pipeline, gradients(list(zip(tokens.chunk(4), targets.chunk(4), strict=True))))
    expected = next_token_loss(whole_model().eval()(tokens), targets)
    pipeline.parts.eval()
    torch.testing.assert_close(pipeline.evaluate(tokens, targets), expected.detach(), rtol=1e-9, atol=0)
    return number


@pytest.mark.parametrize(("schedule", "stages"), runnable([("1f1b", 2), ("zbv", 4)]))
def test_each_of_the_ranks_of_a_stage_sends_its_part(schedule, stages):
    hidden = 8 * 6 * 8 * 8  # B * S * D of float64
    links = 1 if stages == 2 else 2  # of a V, those between different ranks
    whole, part = run(4, sent, schedule, False), run(4, sent, schedule, True)
    assert whole == [links * hidden] * 4
    assert part == [links * hidden / 2] * 4


def test_sequence_parallel_ranks_send_what_they_have():
    def shapes():
        boundary = Boundary(8, dist.group.WORLD)
        x = torch.ones(2, 3, 8)
        assert boundary.leave(x) is x
        assert boundary.arrive(x) is x
        return boundary.shape(2, 6)

    assert run(2, shapes) == [(2, 3, 8)] * 2


def refused(case):
    group = dist.group.WORLD
    if case == "schedule":
        Stages.of(CONFIG, "1f2b", 2)
    elif case == "per rank":
        Stages.of(CONFIG, "zbv", 2, per_rank=3)
    elif case == "layers":
        Stages.of(replace(CONFIG, layers=3), "zbv", 2)
    elif case == "few":
        build("1f1b", group, 1)
    elif case == "rounds":
        build("interleaved1f1b", group, 5)
    elif case == "batch":
        build("1f1b", group, 4).step(*batch(0, 6))
    elif case == "group":
        stages = Stages.of(CONFIG, "1f1b", 4)
        Pipeline(stages.build(0), stages, group, 4)
    elif case == "fsdp":
        pipeline = build("1f1b", group, 2)
        fully_shard(pipeline.parts[0].blocks[2 * dist.get_rank()], mesh=init_device_mesh("cpu", (2,)))
        pipeline.step(*batch(0))
    elif case == "boundary":
        build("1f1b", group, 2, boundary=Boundary(8, group)).step(*(t[:, :5] for t in batch(0)))
    elif case == "version":
        torch.__version__ = TorchVersion("2.11.0+cu130")
        build("zbv", group, 2)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("schedule", "gpipe, 1f1b, interleaved1f1b, interleaved_zb, zbv"),
        ("per rank", "zbv runs 2 stages"),
        ("layers", "3 layers cannot fill"),
        ("few", "or use gpipe"),
        ("rounds", "use a multiple of 2"),
        ("batch", "6 sequences does not split into 4"),
        ("group", "use Stages.of(..., ranks=2)"),
        ("fsdp", "call fully_shard on it"),
        ("boundary", "sequences of 5 tokens"),
        ("version", "'zbv' needs torch 2.13"),
    ],
)
def test_what_does_not_fit_is_named_on_every_rank(case, message):
    for error in errors(2, refused, case):
        assert error.startswith("ValueError")
        assert message in error
