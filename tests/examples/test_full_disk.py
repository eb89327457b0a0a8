"""The main job and a disk that is full: it says so, keeps what it has, goes on, and fails at its end alone."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import tiny_disk
from main_job import result, run
from turnout.models.checkpoint import snapshot

JOB = ("--steps", "6", "--save-every", "1", "--eval-every", "6", "--keep", "9")


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """No room for the checkpoints of some steps, on the last rank's disk or the only one's."""
    put = snapshot._put

    def putting(file: Path, data: bytes) -> Path:
        if file.name == "rank-1.pt" and file.parent.name in {f"step-{step}.incomplete" for step in steps}:
            file.write_bytes(data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(file, data)

    monkeypatch.setattr(snapshot, "_put", putting)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name.startswith("step-"))


@pytest.mark.thorough
def test_the_job_goes_on_and_tries_again(tmp_path, text, monkeypatch):
    full_at(monkeypatch, 2, 3, 5)
    done = run(tmp_path, *JOB, "--data", text, ranks=2)
    assert result(done)["steps"] == 6
    for step in (2, 3, 5):
        said = f"the disk of {tmp_path}/step-{step}.incomplete is full or over its quota"
        assert done.stderr.count(said) == 1, done.stderr
    assert done.stderr.count("a checkpoint is not written, and training continues") == 3
    assert names(tmp_path) == ["step-1", "step-4", "step-6"]


def test_at_the_end_it_is_an_error(tmp_path, text, monkeypatch):
    full_at(monkeypatch, 6)
    done = run(tmp_path, *JOB, "--data", text, ranks=2)
    assert done.codes == [1, 1]
    said = f"step 6, in the checkpoint: rank 1: the disk of {tmp_path}/step-6.incomplete is full or over its quota"
    assert done.stderr.count(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == [f"step-{step}" for step in (1, 2, 3, 4, 5)]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """It holds some checkpoints, and not six."""
    with tiny_disk(tmp_path / "disk", 3000) as folder:
        yield folder


def test_a_disk_that_is_really_full(disk, text):
    done = run(disk / "run", *JOB, "--data", text)
    assert done.returncode == 1, done.stderr
    kept = names(disk / "run")
    assert 2 <= len(kept) < 5
    assert kept == [f"step-{step}" for step in range(1, len(kept) + 1)]
    assert done.stderr.count("is full or over its quota") == 6 - len(kept), done.stderr
    shutil.rmtree(disk / "run" / kept[0])
    again = run(disk / "run", *JOB, "--data", text, "--resume", "--keep", "1")
    assert result(again)["steps"] == 6
    assert f"resuming after step {len(kept)}" in again.stderr
    assert names(disk / "run") == ["step-6"]
