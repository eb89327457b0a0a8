"""`kernel="auto"` on a GPU: what a fake clock says is chosen, kept, alike on all ranks, and logged once."""

import logging
from datetime import timedelta
from functools import partial
from importlib import import_module

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from turnout.cuda.tune import Shape
from turnout.dispatch.torch_internals import in_backward
from turnout.moe import MoE, parallelize
from turnout.moe.autotune import first_choice
from turnout.moe.experts import feed_forward, first_use

tuning = import_module("turnout.moe.autotune.tuning")
CPU = torch.device("cpu")
SHAPE = Shape(100, 8, 16, 4, 2, "swiglu", False, "bfloat16", True, True)
PARAMETER = nn.Parameter(torch.zeros(1))


class Bench:
    """A clock that stands still but for what runs take: each kernel its seconds, or it raises."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.ran = seconds, 0.0, []

    def step(self, shape, device, kernel):
        takes = self.seconds[kernel]

        def run():
            self.ran.append(kernel)
            if isinstance(takes, Exception):
                raise takes
            self.now += takes * (10 if self.ran.count(kernel) == 1 else 1)  # the first compiles

        return run

    def clock(self):
        return self.now

    def asked(self, shape=SHAPE, of=PARAMETER, learns=True):
        return first_choice.faster(shape, CPU, of, learns, self.step, self.clock)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    monkeypatch.setattr(first_choice, "CHOSEN", {})


@pytest.mark.parametrize(
    ("seconds", "kernel"),
    [
        ({"torch": 2.0, "triton": 1.0}, "triton"),
        ({"torch": 1.0, "triton": 2.0}, "torch"),
        ({"torch": 1.0, "triton": RuntimeError("wrong at first use")}, "torch"),
        ({"torch": torch.OutOfMemoryError("3 GiB"), "triton": 2.0}, "triton"),
        ({"torch": torch.OutOfMemoryError("3 GiB"), "triton": torch.OutOfMemoryError("3 GiB")}, "torch"),
    ],
)
def test_the_faster_one(seconds, kernel, caplog):
    bench = Bench(**seconds)
    with caplog.at_level(logging.INFO):
        assert bench.asked() == bench.asked() == kernel
    (line,) = caplog.messages
    assert line.startswith(f'kernel="auto" is "{kernel}" for Shape(')
    for name, takes in seconds.items():
        assert (f"{name} {1e3 * takes:.3f} ms" if isinstance(takes, float) else str(takes)) in line


def test_runs_take_turns_and_the_first_one_does_not_count():
    bench = Bench(torch=1.0, triton=0.9)
    assert bench.asked() == "triton"
    assert bench.ran == ["torch", "triton"] * (1 + first_choice.ROUNDS)


def test_a_measurement_is_kept_for_like_numbers_of_tokens():
    bench = Bench(torch=2.0, triton=1.0)
    assert bench.asked(learns=False) == "torch", "nothing is measured before the first training step"
    assert bench.ran == []
    assert bench.asked() == bench.asked(SHAPE._replace(tokens=128), learns=False) == "triton"
    ran = len(bench.ran)
    assert bench.asked(SHAPE._replace(tokens=129), learns=False) == "torch"
    assert len(bench.ran) == ran
    bench.asked(SHAPE._replace(tokens=129))
    bench.asked(SHAPE._replace(precision="fp8"))
    assert len(bench.ran) == 3 * ran


def test_the_check_at_first_use_comes_before():
    """Triton cannot run here: the real step says so, and torch is chosen."""
    assert first_choice.faster(SHAPE, CPU, PARAMETER, clock=lambda: 0.0) == "torch"


@pytest.mark.parametrize("contexts", [None, partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])])
def test_checkpointing_takes_no_measurement_for_its_own(contexts, monkeypatch):
    """The first training step of a layer whose activations are recomputed, and of one that checks its kernels."""
    matrix = torch.ones(3, 3, requires_grad=True)

    def check(kind):
        torch.autograd.grad((matrix @ matrix).sigmoid().sum(), matrix)
        return {}

    def step(shape, device, kernel):
        first_use.correct(CPU, torch.float32, 3, 3, kernel, False, False, True)
        return tuning._step(shape, device, "torch")

    first_use.forget()
    monkeypatch.setattr(first_use, "differences", check)
    ticks = iter(range(1000))

    def block(x):
        learns = not in_backward()
        shape = SHAPE._replace(dtype="float32")
        assert first_choice.faster(shape, CPU, PARAMETER, learns, step, lambda: next(ticks)) == "torch"
        assert first_use.correct(CPU, torch.float32, 3, 3, "relu", False, False, True)
        return (x @ matrix).tanh()

    x = torch.ones(3, 3, requires_grad=True)
    options = {} if contexts is None else {"context_fn": contexts}
    checkpoint(block, x, use_reentrant=False, **options).sum().backward()
    assert next(ticks) == 2 * 2 * first_choice.ROUNDS, "both were timed, once"
    first_use.forget()


class OnGpu(torch.Tensor):
    """Rows that say they are on a GPU."""

    is_cuda = True


def test_a_layer_asks(monkeypatch):
    """With all that the choice depends on: learning or not, adapters or not."""
    asked = []

    def faster(shape, device, of, learns):
        asked.append((shape, learns))
        return "torch"

    monkeypatch.setattr(first_choice, "faster", faster)
    monkeypatch.setattr(feed_forward, "can_be_read", lambda _: True)
    experts = MoE(8, 16, 4, 2, bias=True).experts
    x = torch.zeros(6, 8).as_subclass(OnGpu)
    up = experts.w_up
    assert experts._faster(x, up, 6, None) == "torch"
    with torch.no_grad():
        experts._faster(x, up, 6, None)
    experts.eval()
    experts._faster(x, up, 6, None)
    shape = Shape(6, 8, 16, 4, 1, "swiglu", True, "float32", False, True)
    assert asked == [(shape, True), (shape, False), (shape, False)]
    experts.precision = "fp8"
    monkeypatch.setattr(feed_forward, "torch_multiplies", lambda *_: False)
    assert experts._faster(x, up, 6, None) == "triton", "the only one"
    monkeypatch.setattr(feed_forward, "torch_multiplies", lambda *_: True)
    assert experts._faster(x, up, 6, None) == "torch"
    assert asked[-1] == (shape._replace(precision="fp8"), False)
    assert len(asked) == 4


def on_two():
    """Each rank is fast at another kernel, then one does not come, then one fails."""
    rank, mesh, found = dist.get_rank(), init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), {}
    (parameter, *_) = parallelize(nn.Sequential(MoE(8, 16, 4, seed=0)), mesh)[0].experts.parameters()
    times = [{"torch": 1.0, "triton": 3.0}, {"torch": 2.0, "triton": 1.5}][rank]
    tokens = SHAPE._replace(tokens=50 + 500 * rank)  # ranks get different numbers of rows
    found["slowest"] = Bench(**times).asked(tokens, parameter)
    fails = {"torch": torch.OutOfMemoryError("no")} if rank else {"torch": 1.0}
    found["failed"] = Bench(**fails, triton=9.0).asked(tokens._replace(dim=16), parameter)
    first_choice.PATIENCE = timedelta(seconds=0.5)
    if rank:
        found["alone"] = Bench(**times).asked(tokens._replace(dim=32), parameter)
    return found


def test_ranks_choose_alike_and_none_waits_for_ever():
    first, second = ranks.run(2, on_two)
    assert first["slowest"] == second["slowest"] == "torch"
    assert first["failed"] == second["failed"] == "triton"
    assert second["alone"] == "triton"
