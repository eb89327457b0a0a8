"""A checkpoint written while training goes on is the one that was asked for, or its failure is told to every rank."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoints import names, small
from ranks import run
from test_moving import advance, contents
from test_moving import build as build_on
from test_oracle import CASES, Case
from torch import Tensor
from torch.distributed import distributed_c10d
from turnout.models.checkpoint import (
    AsyncCheckpointer,
    CheckpointError,
    load,
    load_newest,
    newest,
    save,
    snapshot,
    store,
)
from turnout.models.checkpoint.host_copies import HostCopies


@contextmanager
def held(name: str = "write_values") -> Iterator[threading.Event]:
    """Writing waits until the event is set."""
    may_write, real = threading.Event(), getattr(snapshot, name)

    def write(*args):
        assert may_write.wait(60)
        return real(*args)

    with mock.patch.object(snapshot, name, write):
        yield may_write
        may_write.set()


def change_while_it_is_written(ranks: int, folder: Path) -> tuple[dict, dict, list[float]]:
    """What was there at the save, what is read from the checkpoint, and the losses of training meanwhile."""
    model, optimizer = build_on(Case(ranks, {"ep": ranks}))
    advance(model, optimizer, 0)
    before, rank = contents(model, optimizer), dist.get_rank()
    extra, own = {"list": [1]}, {"rank": rank, "tensor": torch.ones(2)}
    with AsyncCheckpointer(folder) as checkpointer:
        with held() as may_write:
            assert checkpointer.save(model.parts, optimizer, 1, extra, own) is None
            extra["list"].append(2)
            own["tensor"].zero_()
            losses = []
            for step in (1, 2, 3):
                losses.append(advance(model, optimizer, step))  # with collectives of its own
                assert checkpointer.poll() is None
            assert newest(folder) is None
            dist.barrier()
            may_write.set()
        saved = checkpointer.wait()
        assert (saved.path, saved.step) == (folder / "step-1", 1)
        assert 0 < saved.stalled < saved.seconds
        assert checkpointer.wait() is checkpointer.poll() is None
    other, into = build_on(Case(ranks, {"ep": ranks}), seed=1)
    loaded = load(folder / "step-1", other.parts, into)
    assert loaded.extra == {"list": [1]}
    assert loaded.rank_state["rank"] == rank
    assert torch.equal(loaded.rank_state["tensor"], torch.ones(2))
    return before, contents(other, into), losses


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def undisturbed(ranks: int) -> list[float]:
    model, optimizer = build_on(Case(ranks, {"ep": ranks}))
    return [advance(model, optimizer, step) for step in range(4)][1:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_saved_is_what_was_there_and_training_is_not_disturbed(tmp_path, ranks):
    expected = run(ranks, undisturbed, ranks)
    for rank, (before, read, losses) in enumerate(run(ranks, change_while_it_is_written, ranks, tmp_path)):
        same(read, before)
        assert losses == expected[rank]


def on_a_mesh(name: str, folder: Path) -> tuple[dict, dict]:
    model, optimizer = build_on(CASES[name])
    advance(model, optimizer, 0)
    before = contents(model, optimizer)
    with AsyncCheckpointer(folder) as checkpointer, held() as may_write:
        checkpointer.save(model.parts, optimizer, 1)
        may_write.set()
        for step in (1, 2):
            advance(model, optimizer, step)
    other, into = build_on(CASES[name], seed=1)
    load(folder / "step-1", other.parts, into)
    return before, contents(other, into)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["dp2 tp2 ep2 fsdp", "pp2 1f1b", "ep2", "dp2 zero1", "dp2 fsdp", "tp2"])
def test_every_kind_of_parallel_model_comes_back_to_the_bit(tmp_path, name):
    for before, read in run(CASES[name].ranks, on_a_mesh, name, tmp_path):
        same(before, read)


def test_a_save_waits_for_the_one_before_and_older_ones_are_pruned_unread(tmp_path):
    with (
        AsyncCheckpointer(tmp_path, keep=2) as checkpointer,
        mock.patch.object(store, "is_sound", side_effect=AssertionError("what was written is not read again")),
    ):
        model, optimizer = small()
        assert checkpointer.save(model, optimizer, 1) is None
        for step in (2, 3):
            checkpointer.save(model, optimizer, step)
        told = checkpointer.save(model, optimizer, 4)
        assert (told.step, told.path) == (3, tmp_path / "step-3")
    assert names(tmp_path) == ["step-3", "step-4"]
    assert load_newest(tmp_path, model, optimizer).step == 4


def test_copies_are_made_in_the_same_memory():
    copies, model = HostCopies(), small(1.0)[0]
    first = copies.of({"weight": model.weight, "step": 3})
    assert first["step"] == 3
    model.weight.data.fill_(2.0)
    assert (first["weight"] == 1).all()
    second = copies.of({"weight": model.weight})
    assert second["weight"].data_ptr() == first["weight"].data_ptr()
    assert (second["weight"] == 2).all()
    assert copies.of({"weight": torch.ones(3)})["weight"].shape == (3,)
    assert not second["weight"].requires_grad


def refused(folder: Path) -> list[str]:
    model, optimizer = small()
    said = []
    with AsyncCheckpointer(folder) as checkpointer:
        checkpointer.save(model, optimizer, 1)
        for step, extra, rank_state in ((1, {}, None), (2, {"not": object()}, None), (2, {}, Path("x")), (2, {}, None)):
            if (step, extra, rank_state) == (2, {}, None) and dist.get_rank() == 1:
                model.weight.data[0, 0] = float("nan")
            with pytest.raises(CheckpointError) as caught:
                checkpointer.save(model, optimizer, step, extra, rank_state)
            said.append(str(caught.value).partition("\n")[0])
        assert checkpointer.wait() is None
        assert dist.get_rank() != 0 or names(folder) == ["step-1"]
    return said


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    first, second = run(2, refused, tmp_path)
    assert first == second
    words = ["step-1 exists already", "rank 0: TypeError: Object of type object", "rank 0: UnpicklingError: Weights"]
    for said, word in zip(first, [*words, "rank 1: model.weight and 0 other tensors have NaN"], strict=True):
        assert word in said


def test_numbers_that_are_not_positive_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be positive; got 0"):
        AsyncCheckpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="timeout must be positive; got -1"):
        AsyncCheckpointer(tmp_path, timeout=-1)


def travelling(folder: Path, asynchronous: bool) -> int:
    """Bytes of the largest object that a rank sends while it saves."""
    sizes, real = [], distributed_c10d._object_to_tensor

    def noting(value: object, *args: object) -> tuple[Tensor, Tensor]:
        data, size = real(value, *args)
        sizes.append(int(size))
        return data, size

    extra = {"log": "x" * 10**6 if dist.get_rank() == 0 else "of another rank"}
    with mock.patch.object(distributed_c10d, "_object_to_tensor", noting):
        if asynchronous:
            with AsyncCheckpointer(folder) as checkpointer:
                checkpointer.save(*small(), 1, extra)
        else:
            save(folder, *small(), 1, extra)
    assert len(sizes) > 4
    assert load(folder / "step-1", *small()).extra == {"log": "x" * 10**6}
    return max(sizes)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_extra_is_rank_0s_and_does_not_travel(tmp_path, asynchronous):
    assert max(run(2, travelling, tmp_path, asynchronous)) < 20_000
    assert sum(file.stat().st_size for file in (tmp_path / "step-1").iterdir()) < 1.5 * 10**6
