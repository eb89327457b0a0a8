"""`autotune` chooses by what its clock says, the same on every rank, and what it has measured survives in a file."""

import json
from functools import partial
from importlib import import_module

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.cuda import tiles, tune
from turnout.cuda.tiles import Blocks, Product
from turnout.dispatch import FlatDispatcher
from turnout.moe import MoE, fully_shard_experts, parallelize
from turnout.moe.adapters import add_lora
from turnout.moe.autotune import autotune
from turnout.moe.autotune.results import fastest

tuning = import_module("turnout.moe.autotune.tuning")
A, B, C = (Blocks(rows, 16, 16, 4, 1) for rows in (16, 32, 64))
UP, DOWN = (Product(kernel, "cpu", "torch.float32", (8, 16), False) for kernel in ("up", "down"))


class Machine:
    """Stands in for a GPU: runs that tell how long they take, or raise."""

    def __init__(self, torch=2.0, triton=1.0, up=(3.0, 2.0, 2.5), down=(1.0, 1.5, "OutOfResources")):
        self.times = {"torch": torch, "triton": triton}
        self.tiles = {UP: dict(zip((A, B, C), up, strict=True)), DOWN: dict(zip((A, B, C), down, strict=True))}
        self.measured = []

    def run(self, what, ms):
        self.measured.append(what)
        if isinstance(ms, str):
            raise RuntimeError(ms)
        return ms

    def attempts(self, shape, device):
        return {p: {size: partial(self.run, (p, size), ms) for size, ms in t.items()} for p, t in self.tiles.items()}

    def step(self, shape, device, kernel):
        if self.times[kernel] is None:
            raise torch.OutOfMemoryError("3 GiB")
        return partial(self.run, kernel, self.times[kernel])

    def patch(self, monkeypatch):
        monkeypatch.setattr(tuning, "check_triton", lambda *_: None)
        monkeypatch.setattr(tune, "attempts", self.attempts)
        monkeypatch.setattr(tuning, "_step", self.step)
        return self


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    for module in (tiles, tuning):
        monkeypatch.setattr(module, "MEASURED", {})


@pytest.fixture
def machine(monkeypatch):
    return Machine().patch(monkeypatch)


def layer(**options):
    return MoE(8, 16, 4, 2, seed=0, **options)


def clock(run):
    return run()


def test_the_fastest_of_everything_is_taken_and_kept(machine):
    model = nn.Sequential(layer(), layer(experts="relu"), layer(experts=lambda: nn.Linear(8, 8)))
    said = autotune(model, 6, clock=clock)
    assert [m.experts.kernel for m in model[:2]] == ["triton", "triton"]
    assert tuning.MEASURED == {UP: B, DOWN: A}
    assert [tuned.shape.activation for tuned in said.experts] == ["relu", "swiglu"]
    assert said.experts[0].tiles[DOWN][C] == "RuntimeError: OutOfResources"
    assert "| 6, 8, 16, 4, 2 | relu, float32 | 2.000 | 1.000 | triton |  |" in str(said)


def test_equal_shapes_are_measured_once(machine):
    model = nn.Sequential(layer(), layer())
    autotune(model, 6, clock=clock)
    assert machine.measured.count("torch") == 1
    assert [m.experts.kernel for m in model] == ["triton", "triton"]


@pytest.mark.parametrize(
    ("times", "kernel", "why"),
    [
        ({"triton": 2.5}, "torch", ""),
        ({"triton": 2.0}, "torch", ""),
        ({"triton": "PassManager failed"}, "torch", "RuntimeError: PassManager failed"),
        ({"triton": None}, "torch", "OutOfMemoryError: 3 GiB"),
        ({"torch": None}, "triton", "OutOfMemoryError: 3 GiB"),
        ({"torch": None, "triton": None}, "torch", "OutOfMemoryError: 3 GiB; OutOfMemoryError: 3 GiB"),
        ({"up": ("bad",) * 3, "down": ("bad",) * 3}, "triton", ""),
    ],
)
def test_what_fails_is_not_chosen(times, kernel, why, monkeypatch):
    Machine(**times).patch(monkeypatch)
    moe = layer()
    said = autotune(moe, 6, clock=clock)
    assert moe.experts.kernel == said.experts[0].kernel == kernel
    assert f"| {kernel} | {why} |" in str(said)
    if "up" in times:
        assert tuning.MEASURED == {}
        assert set(said.experts[0].tiles[UP].values()) == {"RuntimeError: bad"}


def test_no_memory_for_the_tiles(machine, monkeypatch, caplog):
    monkeypatch.setattr(tune, "attempts", lambda *_: 1 / 0)
    moe = layer()
    autotune(moe, 6, clock=clock)
    assert moe.experts.kernel == "triton"
    assert "no tiles were measured" in caplog.text


def test_where_triton_cannot_run_the_choice_is_torch(tmp_path):
    model = nn.Sequential(layer(), layer().double())
    said = autotune(model, 6, file=tmp_path / "tuned.json")
    assert [m.experts.kernel for m in model] == ["torch", "torch"]
    assert sum("takes float32, bfloat16 or float16" in tuned.why for tuned in said.experts) == 1
    assert sum("CUDA devices" in tuned.why or "needs Triton" in tuned.why for tuned in said.experts) == 1
    assert not any(tmp_path.iterdir())


def test_adapters_are_left_to_torch(machine):
    moe = layer()
    add_lora(moe, rank=2)
    said = autotune(moe, 6, clock=clock)
    assert moe.experts.kernel == "torch"
    assert "has no adapters" in said.experts[0].why
    assert machine.measured == []


def test_misuse():
    with pytest.raises(ValueError, match="tokens=0: give the number of tokens"):
        autotune(layer(), 0)
    with pytest.raises(ValueError, match="experts of the named kinds, and Linear has none"):
        autotune(nn.Linear(2, 2), 8)
    with pytest.raises(ValueError, match="the model is on the meta device: call autotune when it has its tensors"):
        autotune(layer().to("meta"), 8)


def test_a_file_is_measured_once(machine, tmp_path):
    file = tmp_path / "tuned.json"
    said = autotune(layer(), 6, file=file, clock=clock)
    taken = len(machine.measured)
    tuning.MEASURED.clear()
    model = nn.Sequential(layer(), layer(experts="gelu"))
    again = autotune(model[0], 6, file=file, clock=clock)
    assert again == said
    assert model[0].experts.kernel == "triton"
    assert tuning.MEASURED == {UP: B, DOWN: A}
    assert len(machine.measured) == taken
    both = autotune(model, 6, file=file, clock=clock)
    assert len(machine.measured) == 2 * taken
    assert autotune(model, 6, file=file, clock=clock) == both
    assert len(json.loads(file.read_text())["experts"]) == 2
    autotune(model, 12, file=file, clock=clock)
    assert len(machine.measured) == 4 * taken, "other sizes"


def test_a_file_of_another_machine_is_measured_again(machine, tmp_path, caplog):
    file = tmp_path / "tuned.json"
    autotune(layer(), 6, file=file, clock=clock)
    given = json.loads(file.read_text())
    here = given["machine"]["device"]
    given["machine"]["device"] = "NVIDIA H200"
    given["experts"][0]["times"]["triton"] = 9.0
    file.write_text(json.dumps(given))
    taken = len(machine.measured)
    moe = layer()
    autotune(moe, 6, file=file, clock=clock)
    assert moe.experts.kernel == "triton"
    assert len(machine.measured) == 2 * taken
    assert f"was measured with device NVIDIA H200, not {here}: measuring again" in caplog.text
    assert json.loads(file.read_text())["machine"]["device"] == here


OTHER_FILES = [
    "",
    "{}",
    '{"machine": {}, "experts": [{"shape": {"tokens": 1}}]}',
    '{"machine": null, "experts": []}',
    "[1]",
    "3",
]


@pytest.mark.parametrize("text", OTHER_FILES)
def test_another_kind_of_file_is_left_alone(text, machine, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"results.json is not a file of autotune .*: remove it, or name another"):
        autotune(layer(), 6, file=file, clock=clock)
    assert file.read_text() == text


def test_a_file_that_cannot_be_written_does_not_end_the_job(machine, tmp_path, caplog):
    moe = layer()
    autotune(moe, 6, file=tmp_path / "missing" / "tuned.json", clock=clock)
    assert moe.experts.kernel == "triton"
    assert "could not write" in caplog.text


def test_the_shape_is_that_of_one_rank(machine):
    moe = layer(shared=1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        (tuned,) = autotune(moe, 6, clock=clock).experts
    assert tuned.shape == (6, 8, 16, 4, 2, "swiglu", False, "bfloat16", True, True, "")
    (tuned,) = autotune(moe.bfloat16(), 6, dtype=torch.float16, clock=clock).experts
    assert tuned.shape.dtype == "float16"


def test_fastest():
    assert fastest({"a": 2.0, "b": 1.0, "c": 1.0}) == "b"
    assert fastest({"a": "failed"}) is None
    assert fastest({}) is None


SLOWER = {"triton": 1.0, "up": (1.0, 2.0, 9.0)}, {"triton": 3.0, "up": (9.0, 3.0, 1.0)}
RANKS = {  # what each of two ranks has, and what both must choose
    "the slowest rank counts": (SLOWER, B, "torch"),
    "failed on one": (({"up": (1.0, 2.0, 3.0)}, {"up": ("bad", 2.0, 3.0)}), B, "triton"),
    "one has no memory": (({}, {"triton": None}), B, "torch"),
    "one cannot": (({}, None), None, "torch"),
}


def on_two(folder):
    """All of `RANKS`, then a file that the first rank alone can see, then misuse on one rank."""
    rank, chosen, patch = dist.get_rank(), {}, pytest.MonkeyPatch()

    def tuned(given, **options):
        tuning.MEASURED.clear()
        machine = Machine(**(given or {})).patch(patch)
        if given is None:
            patch.setattr(tuning, "check_triton", lambda *_: tuning_error())
        moe = layer()
        moe.dispatcher = FlatDispatcher(dist.group.WORLD)
        said = autotune(moe, 6, clock=clock, **options)
        return tuning.MEASURED.get(UP), moe.experts.kernel, str(said), len(machine.measured)

    for name, (given, _, _) in RANKS.items():
        chosen[name] = tuned(given[rank])
    file = folder / f"{rank}.json"
    chosen["file"] = tuned({}, file=file), tuned({}, file=file), file.exists()
    try:
        autotune(layer(), rank, clock=clock)
    except ValueError as error:
        chosen["misuse"] = str(error)
    no_experts = nn.Linear(8, 8) if rank else layer()  # a stage without mixtures
    chosen["stage"] = str(autotune(no_experts, 6, clock=clock))
    for axes, shape in (("ep",), (2,)), (("ep", "etp"), (1, 2)), (("edp", "ep"), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
        torch.manual_seed(0)
        model = parallelize(nn.Sequential(layer()), mesh)
        if "edp" in axes:
            fully_shard_experts(model, mesh)
        (found,) = autotune(model, 6, clock=clock).experts
        chosen[axes] = found.shape
    return chosen


def tuning_error():
    raise ModuleNotFoundError("needs Triton")


def test_ranks_choose_alike(tmp_path):
    first, second = ranks.run(2, on_two, tmp_path)
    for name, (_, size, kernel) in RANKS.items():
        for chosen in (first, second):
            assert chosen[name][:2] == (size, kernel), name
        assert first[name][2] == second[name][2], name
    assert "rank 1: OutOfMemoryError: 3 GiB" in first["one has no memory"][2]
    assert "needs Triton" in first["one cannot"][2]
    for chosen, written in ((first, True), (second, False)):
        measured, known, exists = chosen["file"]
        assert measured[:3] == known[:3]
        assert measured[3] > known[3] == 0
        assert exists is written
    assert first["misuse"] == second["misuse"] == "tokens=0: give the number of tokens of a forward, at least 1"
    assert first["stage"] == second["stage"]
    for chosen in (first, second):  # T, D, H, L, k; and whether rows are gathered
        assert chosen["ep",][:5] == (6, 8, 16, 2, 2)
        assert chosen["ep", "etp"][:5] == (12, 8, 8, 4, 2)
        assert chosen["edp", "ep"][:5] == (6, 8, 16, 4, 2)
        assert [chosen[axes].gathers for axes in (("ep",), ("ep", "etp"), ("edp", "ep"))] == [False, False, True]
