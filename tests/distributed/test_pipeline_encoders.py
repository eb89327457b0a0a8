"""A BERT or T5 in stages trains as it does on one rank: with padding, on any schedule, and spread further."""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import runnable, whole
from ranks import errors, run
from turnout.dispatch import Meshes
from turnout.models import BERT, T5, BERTConfig, ParallelModel, T5Config, checkpoint, next_token_loss, parallel_model
from turnout.models.pipeline.partition import model_of
from turnout.moe import Balance, aux_loss, clip_grad_norm_, param_groups

MOE = {"balance": Balance(0.3, over="global", z_loss=0.1), "shared": 1}
SIZES = {"vocab": 264, "dim": 16, "layers": 3, "heads": 2, "hidden": 12, "num_experts": 4, "seq_len": 8, "moe": MOE}
CONFIGS = {
    "bert": BERTConfig(segments=2, **SIZES | {"layers": 5}),
    # two stages part within the encoder, at its end, and within the decoder; four part within both
    "t5 of experts": T5Config(moe_every=1, **SIZES | {"layers": 5}),
    "t5": T5Config(decoder_layers=4, **SIZES | {"layers": 2}),
    "small t5": T5Config(decoder_layers=3, **SIZES | {"layers": 1, "vocab": 520}),
}
STEPS, CLIP = 2, 0.4  # below the norms met here


def batch(config: BERTConfig | T5Config, step: int, size: int = 8) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs with padding masks, and targets, of which each row has as many."""
    generator = torch.Generator().manual_seed(step)
    read, written = (torch.randint(250, (size, length), generator=generator) for length in (8, 6))
    ends = torch.arange(size).unsqueeze(1) % 3
    real, known = torch.arange(8) < 8 - ends, torch.arange(6) < 6 - ends
    if isinstance(config, BERTConfig):
        targets = torch.where(torch.arange(8) % 3 == 0, read.flip(0), -100)
        return (read, real, (read > 100).long()), targets.masked_fill(torch.arange(8) > 5, -100)
    return (read, written, real, known), written.flip(0).masked_fill(torch.arange(6) > 3, -100)


def built(name: str) -> BERT | T5:
    torch.manual_seed(0)
    return model_of(CONFIGS[name]).double()


@cache
def one_rank(name: str, m: int) -> tuple[BERT | T5, list[tuple[float, ...]], list[dict[str, torch.Tensor]], float]:
    """The model after some steps, (loss, balance losses, norm) and gradients of each, and a loss of other rows."""
    model = built(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen, grads = [], []
    for step in range(STEPS):
        inputs, targets = batch(CONFIGS[name], step)
        found = torch.zeros(2, dtype=torch.float64)
        for *x, y in zip(*(each.chunk(m) for each in (*inputs, targets)), strict=True):
            losses = torch.stack([next_token_loss(model(*x), y), aux_loss(model)]) / m
            losses.sum().backward()
            found += losses.detach()
        norm = clip_grad_norm_(model, CLIP)
        assert norm > CLIP
        seen.append((*found.tolist(), float(norm)))
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    inputs, targets = batch(CONFIGS[name], 9, 7)
    return model, seen, grads, float(next_token_loss(model.eval()(*inputs), targets).detach())


def trained(name: str, sizes: dict[str, int], m: int, options: dict) -> None:
    """Micro-batches of one data rank are every other micro-batch of the oracle, whose balance losses are over both."""
    number = m * options.get("accumulate", 1)
    one, expected, gradients, evaluated = one_rank(name, number)
    meshes = Meshes.of("cpu", **sizes)
    torch.manual_seed(0)
    model = parallel_model(CONFIGS[name], meshes, micro_batches=m, dtype=torch.float64, **options)
    optimizer, dp = torch.optim.AdamW(param_groups(model), lr=1e-2), meshes.dense["dp"]
    for step in range(STEPS):
        inputs, targets = batch(CONFIGS[name], step)
        mine = [
            torch.cat([part.chunk(dp.size())[dp.get_local_rank()] for part in each.chunk(number)])
            for each in (*inputs, targets)
        ]
        losses = model.step(tuple(mine[:-1]), mine[-1])
        norm = model.clip_grad_norm_(CLIP)
        means = torch.stack([losses.task, losses.aux])
        dist.all_reduce(means)
        found = (*(means / dist.get_world_size()).tolist(), float(norm))
        assert found == pytest.approx(expected[step], rel=1e-6)
        for n, p in named(model):
            expect = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-12, msg=lambda text, n=n: f"{n}: {text}")
            expect(whole(p.grad), gradients[step][n])
        optimizer.step()
        optimizer.zero_grad()
    values = dict(one.named_parameters())
    held = {n: whole(p).detach() for n, p in named(model)}
    for n, p in held.items():
        torch.testing.assert_close(p, values[n], rtol=1e-6, atol=1e-8, msg=lambda text, n=n: f"{n}: {text}")
    everyones = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, held)
    assert {n for names in everyones for n in names} == set(values)
    for n in model.pipeline.stages.shared():  # copies stay equal, bit for bit
        copies = [names[n] for names in everyones if n in names] + [p for name, p in named(model) if name == n]
        assert all(torch.equal(whole(a), whole(b)) for a, b in pairwise(copies))
    model.eval()
    inputs, targets = batch(CONFIGS[name], 9, 7)
    assert float(model.evaluate(inputs, targets)) == pytest.approx(evaluated, rel=1e-6)


def named(model: ParallelModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for part in model.parts for name, p in part.named_parameters()]


SCHEDULES = ["interleaved1f1b", "1f1b", "gpipe", "interleaved_zb", "zbv"]
SPREAD = [
    ("small t5", {"pp": 2, "tp": 2, "ep": 2}, {}),
    ("small t5", {"pp": 2, "tp": 2, "ep": 1, "etp": 2}, {"schedule": "zbv", "recompute": "full"}),
    ("t5", {"pp": 2, "ep": 2}, {"data": "zero1", "schedule": "interleaved1f1b"}),
    ("t5", {"pp": 2, "ep": 1}, {"data": "zero2", "recompute": "selective"}),
    ("t5", {"pp": 4, "ep": 1}, {"activations_on_cpu": True, "accumulate": 2}),
    ("t5", {"pp": 2, "tp": 2, "ep": 2}, {"data": "fsdp"}),
    ("bert", {"pp": 2, "tp": 2, "ep": 1, "etp": 2}, {"schedule": "zbv", "recompute": "full"}),
    ("bert", {"pp": 2, "ep": 1}, {"data": "fsdp", "schedule": "interleaved1f1b"}),
    ("bert", {"pp": 4, "ep": 1}, {"accumulate": 2}),
    ("bert", {"pp": 2, "tp": 2, "ep": 2}, {"data": "zero1"}),
    ("bert", {"pp": 2, "cp": 2, "ep": 2}, {"schedule": "interleaved1f1b"}),
    ("small t5", {"pp": 2, "cp": 2, "ep": 2}, {}),
    ("t5", {"pp": 2, "cp": 2, "ep": 1}, {"schedule": "interleaved1f1b", "data": "fsdp"}),
]


@pytest.mark.parametrize(
    ("name", "schedule"),
    runnable([*(("t5 of experts", s) for s in SCHEDULES), *(("bert", s) for s in SCHEDULES[::-1])]),
)
def test_two_stages_train_as_one_rank(name, schedule):
    one_rank(name, 4)  # before the ranks fork
    run(2, trained, name, {"pp": 2}, 4, {"schedule": schedule})


@pytest.mark.parametrize(("name", "sizes", "options"), runnable(SPREAD))
def test_stages_that_are_spread_train_as_one_rank(name, sizes, options):
    m = sizes["pp"]
    one_rank(name, m * options.get("accumulate", 1))
    run(4, trained, name, sizes, m, options)


def spread(name: str, seed: int, sizes: dict[str, int], options: dict) -> tuple[ParallelModel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = parallel_model(CONFIGS[name], Meshes.of("cpu", **sizes), micro_batches=2, dtype=torch.float64, **options)
    return model, torch.optim.AdamW(param_groups(model), lr=1e-2)


def contents(model: ParallelModel, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], float]:
    """Parameters and averages of their gradients, whole, of all stages; and the loss of the next step."""
    mine = {n: (whole(p), whole(optimizer.state[p]["exp_avg"])) for n, p in named(model)}
    everyones = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, mine)
    inputs, targets = batch(model.parts[0].config, 2)
    return {n: held for each in everyones for n, held in each.items()}, float(model.step(inputs, targets).task)


def saved(name: str, sizes: dict[str, int], options: dict, folder: Path):
    model, optimizer = spread(name, 0, sizes, options)
    model.step(*batch(CONFIGS[name], 0))
    optimizer.step()
    optimizer.zero_grad()
    checkpoint.save(folder, model.parts, optimizer, 1)
    return contents(model, optimizer)


def loaded(name: str, sizes: dict[str, int], options: dict, folder: Path):
    model, optimizer = spread(name, 1, sizes, options)
    checkpoint.load(folder / "step-1", model.parts, optimizer)
    return contents(model, optimizer)


@pytest.mark.parametrize(
    ("name", "before", "after", "schedule"),
    runnable(
        [
            ("small t5", {"pp": 2}, {}, "1f1b"),
            ("t5", {}, {"pp": 2, "tp": 2}, "interleaved1f1b"),
            ("t5", {"pp": 2, "ep": 1, "etp": 2}, {"tp": 2}, "zbv"),
            ("bert", {"pp": 2, "tp": 2}, {}, "1f1b"),
            ("bert", {}, {"pp": 2}, "interleaved1f1b"),
        ]
    ),
)
def test_a_checkpoint_of_stages_loads_on_another_mesh(tmp_path, name, before, after, schedule):
    ranks = [math.prod(sizes.values()) for sizes in (before, after)]
    kept, expected = run(ranks[0], saved, name, before, {"schedule": schedule}, tmp_path)[0]
    for found, loss in run(ranks[1], loaded, name, after, {"schedule": schedule}, tmp_path):
        assert found.keys() == kept.keys() == dict(built(name).named_parameters()).keys()
        for n in kept:
            assert all(torch.equal(a, b) for a, b in zip(found[n], kept[n], strict=True)), n
        assert loss == pytest.approx(expected, rel=1e-9)


def refused(name: str, change: dict[int, torch.Tensor]) -> None:
    inputs, targets = batch(CONFIGS[name], 0)
    given = tuple(change.get(number, x) for number, x in enumerate(inputs))
    model, _ = spread(name, 0, {"pp": 2, "tp": 2} if dist.get_world_size() == 4 else {"pp": 2}, {})
    model.step(given, targets[:, : given[1].shape[1]])


@pytest.mark.parametrize(
    ("ranks", "name", "change", "message"),
    [
        (2, "bert", {1: torch.ones(8, 8)}, "ValueError: mask must be bool (8, 8); got torch.float32 (8, 8)"),
        (4, "t5", {1: torch.zeros(8, 5, dtype=torch.int64), 3: torch.ones(8, 5) > 0}, "ValueError: sequences of 5 tok"),
        (2, "t5", {1: torch.zeros(8, 9, dtype=torch.int64)}, "ValueError: tokens must be [B, S] with S <= seq_len=8"),
        (2, "t5", {0: torch.zeros(6, 8, dtype=torch.int64)}, "ValueError: inputs and targets must be of as many"),
        (2, "t5", {1: torch.zeros(8, 6)}, "ValueError: tokens must be int64; got torch.float32"),
        (2, "bert", {2: torch.zeros(8, 1) > 0}, "ValueError: segments must be int64 (8, 8); got torch.bool (8, 1)"),
    ],
)
def test_inputs_that_do_not_fit_are_named_on_every_rank(ranks, name, change, message):
    for error in errors(ranks, refused, name, change):
        assert error.startswith(message), error


def without_a_mask(name: str) -> None:
    inputs, targets = batch(CONFIGS[name], 0)
    masks = [number for number, x in enumerate(inputs) if x.dtype == torch.bool]
    for left_out in masks:
        found = []
        for instead in (None, torch.ones_like(inputs[left_out])):
            model, _ = spread(name, 0, {"pp": 2}, {})
            given = tuple(instead if number == left_out else x for number, x in enumerate(inputs))
            losses = model.step(given, targets)
            found.append(
                [*map(float, losses), float(model.clip_grad_norm_(1.0)), float(model.evaluate(given, targets))]
            )
        assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_none_leaves_an_input_out(name):
    run(2, without_a_mask, name)


def evaluated(sizes: dict[str, int]) -> None:
    model, _ = spread("bert", 0, sizes, {})
    inputs, targets = batch(CONFIGS["bert"], 0)
    targets[:4], targets[4, 1:] = -100, -100
    assert (targets != -100).any(1).tolist() == [False] * 4 + [True] * 4  # none in the first micro-batch
    expected = next_token_loss(built("bert").eval()(*inputs), targets)
    assert float(model.eval().evaluate(inputs, targets)) == pytest.approx(float(expected.detach()), rel=1e-9)
    targets.fill_(-100)
    assert math.isnan(model.evaluate(inputs, targets))


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_is_the_mean_over_targets_however_they_lie(ranks):
    run(ranks, evaluated, {"pp": ranks})
