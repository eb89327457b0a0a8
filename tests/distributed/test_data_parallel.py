"""What data parallelism keeps, exchanges and computes in; that it trains as one rank does is in test_oracle.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import close, runnable, whole
from ranks import errors, run
from test_oracle import CASES, Case, config, micro_batches, one_rank
from torch.utils._python_dispatch import TorchDispatchMode
from turnout.dispatch import Meshes
from turnout.models import GPT, ParallelModel, next_token_loss, offload, parallel_model
from turnout.moe import GradScaler, MoE, aux_loss, param_groups
from turnout.moe.experts.sharded import local

pytestmark = pytest.mark.sampled

EXACT = {"dtype": torch.float64}


def batch(model: ParallelModel, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """This data rank's part."""
    dp = model.meshes.dense["dp"]
    mine = torch.cat([each.chunk(dp.size())[dp.get_local_rank()] for each in micro_batches(step)])
    return mine[:, :-1], mine[:, 1:]


def build(case: str | Case, top_k: int = 2, **options) -> ParallelModel:
    case = CASES[case] if isinstance(case, str) else case
    return Case(case.ranks, case.axes, case.options | options).build("global", top_k=top_k)


def gradients(top_k: int = 2) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a first step on one rank."""
    torch.manual_seed(0)
    model = GPT(replace(config("global"), top_k=top_k)).double()
    tasks = []
    for tokens in micro_batches(0):
        task = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        ((task + aux_loss(model)) / 2).backward()
        tasks.append(task.detach())
    return float(torch.stack(tasks).mean()), {name: p.grad for name, p in model.named_parameters()}


def compare(model: ParallelModel, tolerance: float, scale: float = 1.0) -> None:
    _, expected = gradients()
    for part in model.parts:
        for name, p in part.named_parameters():
            close(whole(p.grad).double() / scale, expected[name], tolerance, name)


class Counting(TorchDispatchMode):
    """Calls of torch's collectives."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().rpartition("::")[2].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def kept(how):
    """Numbers of a rank's part of the dense parameters and of Adam's moments, and collectives of a step."""
    model = parallel_model(config("global"), Meshes.of("cpu"), data=how, micro_batches=2)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3)
    model.step(*batch(model))  # the first step of FSDP2 sets up more
    optimizer.step()
    optimizer.zero_grad()
    with Counting() as mode:
        model.step(*batch(model))
    optimizer.step()
    held = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    moments = [m.to_local() if hasattr(m, "to_local") else m for m in moments]
    return [sum(t.numel() for t in ts) for ts in (held, moments)], dict(mode.calls)


def test_each_stage_splits_and_sends_what_it_says():
    number = sum(p.numel() for p in GPT(config("global")).parameters())
    units = 4 + 1 + 2  # blocks, the rest, the experts of two layers
    for how, gathers, scatters in [("replicate", 0, 0), ("zero1", 1, 1), ("zero2", 1, 2), ("fsdp", 4, 2)]:
        (held, moments), counts = run(2, kept, how)[0]
        assert held == moments == number // (1 if how == "replicate" else 2), how
        # with "fsdp" the head stays gathered from forward to backward
        expected = units * gathers - (2 if how == "fsdp" else 0)
        assert counts.get("allgather_base", 0) == expected, how
        assert counts.get("reduce_scatter_base", 0) == units * scatters, how


def in_bf16(name, data):
    model = build(name, top_k=4, data=data, bf16=True, dtype=torch.float32)  # all experts: rounding chooses none
    used = {}
    block = next(b for part in model.parts for b in part.blocks if b is not None and isinstance(b.feed_forward, MoE))
    block.attention.query.register_forward_hook(lambda m, args, y: used.update(query=y.dtype))
    block.feed_forward.gate.register_forward_pre_hook(lambda m, args: used.update(router=m.weight.dtype))
    loss = model.step(*batch(model)).task
    dist.all_reduce(loss, group=model.meshes.dense["dp"].get_group())
    assert float(loss) / model.meshes.dense["dp"].size() == pytest.approx(gradients(4)[0], abs=1e-3)
    assert used == {"query": torch.bfloat16, "router": torch.float32}
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}
    for part in model.parts:
        for own, p in part.named_parameters():
            exact = gradients(4)[1][own]
            assert (whole(p.grad) - exact).norm() < 0.1 * exact.norm() + 1e-6, own
    model.eval()
    assert torch.isfinite(model.evaluate(*batch(model)))


@pytest.mark.parametrize("data", ["replicate", "fsdp"])
@pytest.mark.parametrize("name", ["dp2", "ep2", "pp2 1f1b", "tp2"])
def test_bfloat16_with_master_weights(name, data):
    run(2, in_bf16, name, data)


def offloaded(name, data):
    model = build(name, data=data, cpu_offload=True)
    model.step(*batch(model))
    assert all(p.grad.device.type == "cpu" for p in model.parameters())
    compare(model, 1e-12)


@pytest.mark.parametrize(("name", "data"), [("dp2", "zero1"), ("dp2", "fsdp"), ("pp2 dp2 fsdp", "zero1")])
def test_parameters_in_the_hosts_memory(name, data):
    run(CASES[name].ranks, offloaded, name, data)


def activations(name, data):
    def storage(x):
        return local(x).untyped_storage()._cdata

    def counting(x):
        assert storage(x) not in {storage(p) for p in model.parameters()}  # those of FSDP2 as gathered
        sent.append(x.numel())
        return to_host(x)

    sent, to_host, offload.to_host = [], offload.to_host, counting
    model = build(name, data=data, activations_on_cpu=True)
    model.step(*batch(model))
    compare(model, 1e-12)
    return sum(sent)


@pytest.mark.parametrize(("name", "data"), runnable([("dp2", "fsdp"), ("pp2 zbv", "replicate"), ("tp2", "replicate")]))
def test_activations_in_the_hosts_memory(name, data):
    assert min(run(2, activations, name, data)) > 10_000


def scaled(name):
    model = build(name)
    optimizer, scaler = torch.optim.SGD(param_groups(model), lr=0.0), GradScaler("cpu", init_scale=1024.0)
    loss = model.step(*batch(model), scale=scaler.get_scale()).task
    compare(model, 1e-12, 1024.0)
    scaler.scale(loss)  # torch wants to be asked once
    scaler.unscale_(optimizer)
    compare(model, 1e-12)
    norm = model.clip_grad_norm_(1.0)
    assert float(norm) == pytest.approx(float(one_rank("global")[1][0, 2]), rel=1e-12)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("name", ["dp2 fsdp", "pp2 1f1b"])
def test_losses_may_be_scaled(name):
    one_rank("global")
    run(2, scaled, name)


def evaluated(name):
    """After a step, and again after weights changed without one."""
    model, one = build(name), GPT(config("global")).double()
    found = []
    for change in (1.0, 1.5):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(change)
        for part in model.parts:
            for own, p in part.named_parameters():
                dict(one.named_parameters())[own].data.copy_(whole(p))
        model.eval()
        tokens, targets = (each[:3] for each in batch(model))  # not a multiple of the micro-batches
        found.append(model.evaluate(tokens, targets))
        if len(model.parts[0].blocks) == sum(b is not None for b in model.parts[0].blocks):
            assert float(found[-1]) == pytest.approx(
                float(next_token_loss(one.eval()(tokens), targets).detach()), rel=1e-12
            )
        model.train()
        model.step(*batch(model))
    return [float(loss) for loss in found]


@pytest.mark.parametrize("name", ["dp2", "dp2 zero1", "dp2 fsdp", "tp2"])
def test_evaluation_sees_the_weights_of_today(name):
    for first, second in run(2, evaluated, name):
        assert abs(first - second) > 1e-3


def refused(case):
    meshes = Meshes.of("cpu")
    if case == "how":
        parallel_model(config("global"), meshes, data="zero4")
    elif case == "offload":
        parallel_model(config("global"), meshes, cpu_offload=True)
    elif case == "micro":
        parallel_model(config("global"), meshes, micro_batches=0)
    elif case == "batch":
        model = parallel_model(config("global"), meshes, micro_batches=3)
        model.step(*batch(model))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("how", "must be one of replicate, zero1, zero2, fsdp; got 'zero4'"),
        ("offload", "cpu_offload needs FSDP2"),
        ("micro", "micro_batches must be positive; got 0"),
        ("batch", "a batch of 4 sequences does not split into 3 micro-batches; use a multiple of 3"),
    ],
)
def test_what_does_not_fit_is_named_on_every_rank(case, message):
    for error in errors(2, refused, case):
        assert error.startswith("ValueError")
        assert message in error
