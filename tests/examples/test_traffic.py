"""What the main job says its ranks send, against what they were told to send and the formulas of the documentation."""

from collections.abc import Callable

import options
import pytest
import steps
import torch
import torch.distributed as dist
from ranks import run
from torch.distributed.tensor import DTensor, Replicate, Shard
from traffic import Traffic, axes_of
from turnout.dispatch import Meshes

B, S, H, LAYERS = 8, 16, 32, 4
HIDDEN = 4 * B * S * H  # bytes of the hidden states of a batch
JOB = f"--batch {B} --seq {S} --dim {H} --layers {LAYERS} --heads 4 --hidden 16 --experts 4 --eval-size 8"


def counted(meshes: Meshes, work: Callable) -> dict:
    with Traffic(axes_of(meshes)) as traffic:
        work()
    return {f"{axis} {kind}": n for (axis, kind), n in traffic.sent.items() if n}


def collectives() -> dict:
    meshes = Meshes.of("cpu", pp=2, tp=2)
    tp, pp, x = meshes.dense["tp"].get_group(), meshes.dense["pp"].get_group(), torch.ones(6)  # 24 bytes

    def work() -> None:
        dist.all_reduce(x, group=tp)
        dist.all_gather([torch.empty(6), torch.empty(6)], x, group=tp)
        dist.reduce_scatter(torch.empty(6), [x, x], group=tp)
        send, recv = ([1, 5], [1, 3]) if tp.rank() == 0 else ([3, 3], [5, 3])
        dist.all_to_all_single(torch.empty(sum(recv)), x, recv, send, group=tp)
        if pp.rank() == 0:
            dist.send(x, group=pp, group_dst=1)
        else:
            dist.recv(x, group=pp, group_src=0)
        dist.barrier()

    return counted(meshes, work)


def test_each_collective_counts_for_its_axis():
    for rank, sent in enumerate(run(4, collectives)):
        rows = 5 if rank % 2 == 0 else 3  # to the other one
        expected = {"tp all_reduce": 24, "tp all_gather": 24, "tp reduce_scatter": 24, "tp all_to_all": 4 * rows}
        assert sent == expected | ({"pp send": 24} if rank < 2 else {})


def of_dtensor() -> dict:
    meshes = Meshes.of("cpu", tp=2)
    x = DTensor.from_local(torch.ones(4, requires_grad=True), meshes.dense["tp"], [Shard(0)], run_check=False)

    def work() -> None:
        y = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
        (y * DTensor.from_local(y, meshes.dense["tp"], [Replicate()]).to_local()).sum().backward()

    return counted(meshes, work)


def test_what_dtensor_sends_is_seen():
    assert run(2, of_dtensor) == [{"tp=edp all_gather": 16}] * 2


def step(flags: str) -> tuple[dict, int]:
    """What the second step sends, and the bytes of the whole model."""
    job = options.parse([*JOB.split(), *flags.split()]).fit(dist.get_world_size())
    meshes = Meshes.of("cpu", pp=job.pp, tp=job.tp, ep=job.ep, etp=job.etp)
    model = steps.build(job, meshes)
    tokens = torch.randint(256, (job.batch // meshes.dense["dp"].size(), job.seq + 1))

    def work() -> None:
        model.zero_grad()
        model.step(tokens[:, :-1], tokens[:, 1:])

    work()
    return counted(meshes, work), 4 * sum(p.numel() for p in steps.build(job, meshes).parameters())


def test_tensor_parallel_sends_hidden_states():
    for sent, _ in run(2, step, "--dense --tp 2"):
        moved = sent["tp=ep all_gather"] + sent["tp=ep reduce_scatter"]
        assert moved == (8 * LAYERS + 4) * HIDDEN / 2  # 4 for the embedding and the head


PARAMETERS = 38  # `sync_gradients` asks first which of them have a gradient, a byte each


def test_data_parallel_sends_gradients_and_zero_no_more():
    for sent, model in run(2, step, "--dense --ep 1"):
        assert sent == {"dp=edp all_reduce": pytest.approx(model + PARAMETERS)}
    for sent, model in run(2, step, "--dense --ep 1 --data-parallel zero1 --micro-batches 2"):
        assert sent == {"dp=edp reduce_scatter": model / 2, "dp=edp all_gather": model / 2}


def test_gradients_in_a_pipeline_go_along_dp():
    for sent, model in run(4, step, "--dense --pp 2 --ep 1 --micro-batches 2"):
        assert model < sent["dp all_reduce"] <= model + PARAMETERS


def test_a_pipeline_sends_hidden_states_and_the_gradient_of_the_embedding():
    for sent, _ in run(2, step, "--dense --pp 2 --micro-batches 4"):
        assert sent["pp send"] == HIDDEN + 4 * 256 * H


def test_experts_are_sent_the_rows_of_others():
    (first, _), (second, _) = run(2, step, "--ep 2 --aux-weight 0")
    rows, layers, ways = (
        B * S / 2,
        LAYERS // 2,
        4,
    )  # of a rank's B * S / 2 tokens, to 2 experts each, half of which are elsewhere
    both = first["dp=ep all_to_all"] + second["dp=ep all_to_all"]
    assert both / 2 == pytest.approx(layers * ways * rows * 4 * H, rel=0.25)
