"""An optimizer comes back as it was, parameters that it has not met among it; one process needs no group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import WIDTH, tokens, whole
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import SGD, Adam, AdamW, Optimizer
from turnout.models.checkpoint import CheckpointError, load, load_newest, newest, prune, save
from turnout.moe import MoE, parallelize, sync_gradients


def towers() -> nn.ModuleDict:
    """Two models in one; a step trains one of them or both."""
    torch.manual_seed(0)
    towers = {name: [nn.Linear(WIDTH, WIDTH), MoE(WIDTH, 8, 4, balance=0)] for name in ("text", "vision")}
    return nn.ModuleDict({name: nn.Sequential(*layers) for name, layers in towers.items()}).double()


def advance(model: nn.Module, optimizer: Optimizer, *names: str) -> None:
    sum(model[name](tokens(6)).square().mean() for name in names).backward()
    if dist.is_initialized():
        sync_gradients(model, init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("edp", "ep")))
    optimizer.step()
    optimizer.zero_grad()


def spread(model: nn.Module) -> nn.Module:
    return parallelize(model, init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("edp", "ep")))


def bits(model: nn.Module, optimizer: Optimizer) -> dict:
    out = {}
    for name, p in model.named_parameters():
        out[name] = whole(p)
        out |= {f"{name} {key}": whole(value) for key, value in optimizer.state.get(p, {}).items()}
    return out


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def one_tower_trained(folder: Path) -> tuple[dict, dict]:
    model = spread(towers())
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        advance(model, optimizer, "text")
    save(folder, model, optimizer, 2)
    now = bits(model, optimizer)
    advance(model, optimizer, "text", "vision")
    return now, bits(model, optimizer)


def read_on(folder: Path, *trained: str) -> tuple[dict, dict]:
    """Into an optimizer that has state of the towers that were trained."""
    model = spread(towers())
    optimizer = AdamW(model.parameters(), lr=1e-3)
    if trained:
        advance(model, optimizer, *trained)
    load(folder / "step-2", model, optimizer)
    now = bits(model, optimizer)
    advance(model, optimizer, "text", "vision")
    return now, bits(model, optimizer)


@pytest.mark.parametrize("trained", [(), ("text",), ("vision",), ("text", "vision")])
def test_a_parameter_that_had_no_gradient_is_fresh_and_training_goes_on_as_if_it_had_not_stopped(tmp_path, trained):
    (now, later), *_ = run(2, one_tower_trained, tmp_path)
    assert "text.0.weight exp_avg" in now
    assert not [name for name in now if name.startswith("vision") and " " in name]
    for got_now, got_later in run(2, read_on, tmp_path, *trained):
        same(got_now, now)
        same(got_later, later)
    same(run(1, read_on, tmp_path, *trained)[0][0], now)


@pytest.fixture
def halfway(tmp_path) -> tuple[Path, dict, Callable]:
    """A checkpoint of one process in which the optimizer has one tower only."""
    model = towers()
    optimizer = AdamW(model["text"].parameters(), lr=1e-2)
    advance(model, optimizer, "text")
    return save(str(tmp_path), model, optimizer, 1), bits(model, optimizer), towers


def test_what_was_frozen_and_not_in_the_optimizer_is_fresh_with_the_settings_it_has_now(halfway):
    path, now, build = halfway
    model = build()
    groups = [{"params": model["vision"].parameters(), "lr": 5.0}, {"params": model["text"].parameters(), "lr": 7.0}]
    optimizer = AdamW(groups)
    load(path, model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [5.0, 1e-2]
    same(bits(model, optimizer), now)
    optimizer = AdamW(model.parameters(), lr=5.0)  # in one group, whose settings are saved
    load(path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_what_is_frozen_now_keeps_the_state_it_had(halfway):
    path, now, build = halfway
    model = build().requires_grad_(False)
    optimizer = AdamW(model.parameters())
    load(path, model, optimizer)
    same(bits(model, optimizer), now)
    assert all(p.grad is None for p in model.parameters())


def test_saving_and_loading_leave_an_optimizer_that_never_stepped_as_it_is(tmp_path):
    model = towers()
    before = bits(model, optimizer := AdamW(model.parameters(), lr=1e-2))
    path = save(tmp_path, model, optimizer, 0)
    assert not optimizer.state
    advance(model, optimizer, "text", "vision")
    other = towers()
    advance(other, into := AdamW(other.parameters()), "vision")
    load(path, other, into)
    same(bits(other, into), before)
    advance(other, into, "text", "vision")
    same(bits(other, into), bits(model, optimizer))


class Nested(Optimizer):
    """Keeps state in dicts, as Shampoo does, and numbers."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1, "name": "of a user"})

    @torch.no_grad()
    def step(self) -> None:
        """Heavy ball, with the steps counted."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("steps", 0)
                    ball = state.setdefault("of", {}).setdefault(0, {"ball": torch.zeros_like(p), "not": None})["ball"]
                    state["steps"] += 1
                    p.sub_(ball.mul_(0.9).add_(p.grad), alpha=group["lr"] / state["steps"])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1),
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        lambda p: Adam(p, lr=torch.tensor(1e-2), amsgrad=True),
        lambda p: AdamW(p, lr=1e-2, fused=True),
        Nested,
    ],
    ids=["SGD", "momentum", "tensor rate", "fused", "nested"],
)
def test_optimizers_go_on_as_if_they_had_not_stopped(tmp_path, make):
    model = towers()
    advance(model, optimizer := make(model.parameters()), "text")
    path, other = save(tmp_path, model, optimizer, 1), towers()
    into = make(other.parameters())
    into.register_step_post_hook(lambda *_: pytest.fail("a hook may wait for other ranks"))
    load(path, other, into)
    into._optimizer_step_post_hooks.clear()
    for m, o in ((model, optimizer), (other, into)):
        advance(m, o, "text", "vision")
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_rate_may_become_a_tensor_and_a_number_again(tmp_path):
    model = towers()
    first = save(tmp_path, model, AdamW(model.parameters(), lr=0.25), 1)
    load(first, model, optimizer := AdamW(model.parameters(), lr=torch.tensor(1.0)))
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.25))
    load(save(tmp_path, model, optimizer, 2), model, optimizer := AdamW(model.parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: SGD(m.parameters(), momentum=0.9), r"another kind of optimizer\? rank 0: the optimizer keeps no "),
        (lambda m: AdamW(m.parameters(), amsgrad=True), r"the checkpoint has no .*\.max_exp_avg_sq"),
        (
            lambda m: AdamW(m.parameters()),
            r"one parameter group where two were saved: .*\.lr is 0\.1, and .*\.lr is 0\.2",
        ),
    ],
    ids=["kind", "more state", "groups"],
)
def test_another_optimizer_is_refused_and_nothing_changes(tmp_path, make, words):
    model = towers()
    optimizer = AdamW([{"params": model[name].parameters(), "lr": lr} for name, lr in (("text", 0.1), ("vision", 0.2))])
    advance(model, optimizer, "text", "vision")
    path, other = save(tmp_path, model, optimizer, 1), towers()
    before = bits(other, into := make(other))
    rate = into.param_groups[0]["lr"]
    with pytest.raises(CheckpointError, match=words):
        load(path, other, into)
    same(bits(other, into), before)
    assert into.param_groups[0]["lr"] == rate


def test_state_that_no_checkpoint_can_keep_is_refused_when_saved(tmp_path):
    model = towers()
    optimizer = AdamW(model.parameters())
    optimizer.state[model["text"][0].weight]["history"] = [torch.zeros(3)]
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.text\.0\.weight\.history is of type list"):
        save(tmp_path, model, optimizer, 1)
    assert newest(tmp_path) is None


def test_one_process_needs_no_group_and_paths_may_be_text(tmp_path):
    folder = str(tmp_path)
    assert not dist.is_initialized()
    model = towers()
    advance(model, optimizer := AdamW(model.parameters()), "text", "vision")
    for step in (1, 2, 3):
        path = save(folder, model, optimizer, step, {"of": step}, {"rng": torch.get_rng_state()})
    assert newest(folder) == path == tmp_path / "step-3"
    prune(folder, 2)
    (tmp_path / "step-3" / ".metadata").write_bytes(b"")
    other = towers().apply(lambda m: [p.data.add_(1) for p in m.parameters(recurse=False)])
    loaded = load_newest(folder, other, into := AdamW(other.parameters()))
    assert (loaded.step, loaded.extra, loaded.rank_state.keys()) == (2, {"of": 2}, {"rng"})
    same(bits(other, into), bits(model, optimizer))
    assert load(f"{folder}/step-2", other, into).step == 2
    with pytest.raises(CheckpointError, match="step-2 exists already"):
        save(folder, model, optimizer, 2)
    assert not (tmp_path / "step-1").exists()


def write_two(folder: Path) -> dict:
    model = spread(towers())
    advance(model, optimizer := AdamW(model.parameters()), "text", "vision")
    save(folder, model, optimizer, 1)
    return bits(model, optimizer)


def test_one_process_reads_what_two_ranks_wrote(tmp_path):
    kept = run(2, write_two, tmp_path)[0]
    model = towers()
    optimizer = AdamW(model.parameters())
    assert load(tmp_path / "step-1", model, optimizer).rank_state is None
    same(bits(model, optimizer), kept)


def test_what_two_stages_of_a_process_have_is_kept_once_and_read_into_both(tmp_path):
    def stages(lr: float) -> tuple[list[nn.Module], AdamW]:
        torch.manual_seed(0)
        one = [nn.ModuleDict({"embedding": nn.Linear(3, 3), name: nn.Linear(3, 3)}) for name in ("first", "last")]
        one[1]["embedding"].load_state_dict(one[0]["embedding"].state_dict())
        return one, AdamW([{"params": list(stage.parameters()), "lr": lr} for stage in one])

    def step(parts: list[nn.Module], optimizer: AdamW) -> None:
        for stage in parts:  # the gradients of the embedding are alike
            stage["embedding"](torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    parts, optimizer = stages(0.1)
    step(parts, optimizer)
    path = save(tmp_path, parts, optimizer, 1)
    others, into = stages(0.2)
    load(path, others, into)
    assert [group["lr"] for group in into.param_groups] == [0.1, 0.1]
    for _ in range(2):  # a tensor in the state of both would be moved twice
        step(parts, optimizer)
        step(others, into)
    for stage, other in zip(parts, others, strict=True):
        same(bits(other, into), bits(stage, optimizer))
