"""What one sees of a job beside its log: which bytes each expert takes, a profile, TensorBoard."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import partial
from itertools import chain

import corpus
import options
import pytest
import steps
import torch
import torch.distributed as dist
from board import routers
from cases import runnable
from main_job import result, run
from profiling import BEFORE, profiled
from ranks import run as on_ranks
from specialisation import SHOWN, BytesOfExperts
from test_job import TEXT, TINY, held_out
from torch.torch_version import TorchVersion
from turnout.dispatch import Meshes
from turnout.moe import MoE

E = 4


def built(flags: str) -> tuple[options.Job, steps.ParallelModel]:
    job = options.parse([*TINY.split(), *flags.split()]).fit(dist.get_world_size())
    meshes = Meshes.of("cpu", pp=job.pp, tp=job.tp, ep=job.ep, etp=job.etp)
    return job, steps.build(job, meshes, torch.float64)


# ---- experts' bytes


def most(flags: str) -> list:
    job, model = built(flags)
    with BytesOfExperts(model) as experts:
        steps.evaluate(model, held_out(job, model.meshes), job)
    steps.evaluate(model, held_out(job, model.meshes), job)  # not counted
    return experts.most()


def by_hand(flags: str) -> list[list[list[float]]]:
    """Of each layer and expert: by how many tokens bytes are above an even part, the largest; counted one by one."""
    job, model = built(flags)
    got: dict[MoE, Counter] = {layer: Counter() for layer in model.modules() if isinstance(layer, MoE)}
    for layer, counts in got.items():
        layer.register_forward_hook(partial(note, counts), with_kwargs=True)
    model.eval()
    model.parts[0](inputs(job))
    result = []
    for counts in got.values():
        even = {byte: sum(counts[e, byte] for e in range(E)) / E for byte in range(256)}
        above = [[counts[e, byte] - part for byte, part in even.items()] for e in range(E)]
        result.append([sorted((n for n in each if n > 0), reverse=True)[:SHOWN] for each in above])
    return result


def note(counts: Counter, layer: MoE, args, kwargs, y) -> None:
    chosen = layer.gate(args[0].flatten(0, 1)).expert.tolist()
    counts.update((e, byte) for byte, two in zip(kwargs["ids"].flatten().tolist(), chosen, strict=True) for e in two)


def inputs(job: options.Job) -> torch.Tensor:
    return corpus.held_out(TEXT, job.eval_size, job.seq, 0, 1)[:, :-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mesh"),
    runnable(
        [
            (1, ""),
            (1, "--micro-batches 4"),
            (2, "--tp 2"),
            (2, "--ep 2 --data-parallel fsdp"),
            (2, "--pp 2 --micro-batches 2"),
            (4, "--pp 2 --tp 2 --ep 2 --micro-batches 4 --schedule interleaved1f1b"),
        ]
    ),
)
def test_bytes_of_experts_on_any_mesh(ranks, mesh):
    (wanted,) = on_ranks(1, by_hand, "")
    even = torch.bincount(inputs(options.parse(TINY.split())).flatten(), minlength=256) * 2 / E  # two experts each
    assert [len(layer) for layer in wanted] == [E, E]
    assert any(len(expert) == SHOWN for layer in wanted for expert in layer)
    for found in on_ranks(ranks, most, mesh):
        assert [[[n - float(even[byte]) for byte, n in expert] for expert in layer] for layer in found] == wanted


def test_an_expert_of_a_hash_gate_takes_its_own_bytes():
    def work() -> None:
        job, model = built("--gate hash --top-k 1")
        with BytesOfExperts(model) as experts:
            steps.evaluate(model, held_out(job, model.meshes), job)
        found = experts.most()
        layer = next(layer for layer in model.modules() if isinstance(layer, MoE))
        times = Counter(inputs(job).flatten().tolist())
        for expert, taken in enumerate(found[0]):
            assert taken
            for byte, tokens in taken:
                assert tokens == times[byte]
                assert layer.gate(torch.zeros(1, 16), ids=torch.tensor([byte])).expert.item() == expert

    on_ranks(1, work)


def test_a_dense_model_has_no_experts():
    assert on_ranks(1, most, "--dense") == [[]]


# ---- the profile


@pytest.mark.slow
def test_a_profile_of_each_rank(tmp_path, text):
    flags = ("--steps", str(BEFORE + 3), "--profile", "2", "--pp", "2", "--log-every", "100")
    done = run(tmp_path, *flags, "--data", text, ranks=2)
    result(done)
    assert f"profile of each rank: {tmp_path / 'profile'}" in done.stderr
    for rank in range(2):
        trace = json.loads(gzip.decompress((tmp_path / "profile" / f"rank-{rank}.json.gz").read_bytes()))
        names = Counter(event.get("name") for event in trace["traceEvents"])
        assert {f"ProfilerStep#{BEFORE + n}" for n in range(2)} <= names.keys()
        assert f"ProfilerStep#{BEFORE + 2}" not in names
        if rank == 1:  # the second of two blocks is the mixture
            assert names["turnout::encode"] >= 2 * 2
            assert names["turnout::decode_weighted"] + names["turnout::decode"] >= 2 * 2


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="crashes in torch 2.11 after other tests, not alone"
)
@pytest.mark.parametrize(("taken", "traced"), [(BEFORE - 1, 0), (BEFORE + 1, 1), (BEFORE + 4, 2)])
def test_a_job_that_ends_early_leaves_the_profile_that_there_is(tmp_path, capsys, taken, traced):
    with profiled(2, tmp_path) as step:
        for _ in range(taken):
            torch.ones(2).add(1)
            step()
    said = capsys.readouterr().err
    if not traced:
        assert "no trace was written" in said
        assert not list(tmp_path.iterdir())
        return
    trace = json.loads(gzip.decompress((tmp_path / "rank-0.json.gz").read_bytes()))
    assert Counter(event.get("name") for event in trace["traceEvents"])["aten::add"] == traced
    assert f"profile of each rank: {tmp_path}" in said


def test_a_profile_must_fit_the_steps():
    with pytest.raises(ValueError, match=r"--profile \(5\) must be at most 4: --steps less the 3 steps"):
        options.parse(["--profile", "5", "--steps", "7"]).fit(1)
    options.parse(["--profile", "5", "--steps", "8"]).fit(1)


# ---- TensorBoard


def router_names(flags: str) -> list[str]:
    return sorted(routers(built(flags)[1]))


def test_routers_are_the_gates_of_experts_alone():
    """A dense block has a `gate` as well."""
    names = [f"blocks.{block}.feed_forward.gate.weight" for block in (1, 3)]
    assert on_ranks(1, router_names, "") == [names]
    assert on_ranks(1, router_names, "--dense") == [[]]
    assert sorted(chain(*on_ranks(2, router_names, "--pp 2"))) == names


@pytest.mark.slow
def test_tensorboard_shows_the_log(tmp_path, text):
    pytest.importorskip("tensorboard", reason='needs tensorboard: pip install -e ".[train]"')
    result(run(tmp_path, "--steps", "4", "--log-every", "2", "--tensorboard", "--data", text))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert shown.Tags()["histograms"] == ["tokens per expert/MoE layer 1", "router/blocks.1.feed_forward.gate.weight"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], pytest.approx(line["loss"])) for line in lines if line["event"] == "step"]
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == losses
    (held_out,) = (line for line in lines if line["event"] == "held out" and line["step"] == 4)
    assert shown.Scalars("held out/bits per byte")[-1].value == pytest.approx(held_out["bits_per_byte"])
