"""log.jsonl: what is in it after all that can happen to a job, and to the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import launch
import matplotlib.pyplot  # noqa: F401  forked ranks need not import it
import options
import pretrain
import pytest
import steps
import torch
import torch.distributed as dist
from launch import Place
from log import Log, Recent, finite, parsed, read
from main_job import TEXT, TINY, result, run
from ranks import outcomes


def kinds(path: Path) -> list[tuple[str, int]]:
    """Events and their steps; without checkpoints, which are written while training goes on."""
    return [(event["event"], event["step"]) for event in read(path / "log.jsonl") if event["event"] != "checkpoint"]


def checkpoints(path: Path) -> list[int]:
    return [event["step"] for event in read(path / "log.jsonl") if event["event"] == "checkpoint"]


# ---- the file


def test_events_are_there_at_once(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with Log(path, Place()) as log:
        assert not path.exists()
        event = log.write("step", 3, gradient_norm=math.nan, tokens=((1, 2), [3]), more={"a": math.inf, "b": "NaN"})
        assert read(path) == [event]
        assert event["gradient_norm"] is None
        assert event["more"] == {"a": None, "b": "NaN"}
        assert event["tokens"] == [[1, 2], [3]]
        assert log.last == {"step": event}
    assert [json.loads(line)["time"] for line in path.read_text().splitlines()] == [event["time"]]
    assert finite({"x": [1, 2.5, -math.inf, None, True]}) == {"x": [1, 2.5, None, None, True]}


def test_an_error_is_the_last_line(tmp_path):
    path, place = tmp_path / "log.jsonl", Place()
    with pytest.raises(RuntimeError), Log(path, place) as log:  # noqa: PT012
        log.write("start", 0)
        place.at("training", 7)
        raise RuntimeError("a rank was lost")
    assert read(path)[-1]["step"] == 7
    assert read(path)[-1]["reason"] == "step 7, in training: RuntimeError: a rank was lost"


def test_an_error_before_the_start_leaves_the_log_of_another_run_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "end"')
    with pytest.raises(ValueError), Log(path, Place()):  # noqa: PT011
        raise ValueError
    assert path.read_text() == '{"event": "end"'


def test_a_torn_line_does_not_tear_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "start", "step": 0}\n{"event": "step", "st')
    with Log(path, Place()) as log:
        log.write("start", 0, restart=True)
    assert [event["event"] for event in read(path)] == ["start", "start"]
    assert path.read_text().splitlines()[1] == '{"event": "step", "st'


def test_what_was_lost_and_done_again_counts_once(tmp_path):
    events = [("start", 0), ("step", 10), ("checkpoint", 10), ("step", 20), ("held out", 20), ("end", 21)]
    again = [("start", 10), ("step", 20), ("end", 20)]
    text = "\n".join(json.dumps({"event": kind, "step": step}) for kind, step in [*events, *again])
    kept = [("start", 0), ("step", 10), ("checkpoint", 10), ("start", 10), ("step", 20), ("end", 20)]
    assert [(event["event"], event["step"]) for event in parsed(text)] == kept
    assert read(tmp_path / "none") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_end_the_job(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with Log(path, Place()) as log:
        log.write("start", 0)
        log._file.close()
        log._file = open("/dev/full", "a")  # noqa: SIM115
        for step in (1, 2):
            assert log.write("step", step)["step"] == step
    assert capsys.readouterr().err.count(f"{path} was not written: [Errno 28] No space left on device") == 2
    assert [event["event"] for event in read(path)] == ["start"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "RANK", 1)
    with Log(tmp_path / "log.jsonl", Place()) as log:
        assert log.write("step", 1)["step"] == 1
    assert list(tmp_path.iterdir()) == []


def test_recent_adds_up_and_begins_anew():
    recent = Recent()
    recent.take(2.0, 0)
    recent.take(math.nan, 1)  # skipped
    recent.take(4.0, 1)
    recent.count([[3, 1], [2, 2]], [1, 0])
    recent.count([[1, 3], [4, 0]], [0, 2])
    assert recent.spend() == {
        "loss": 3.0, "skipped": 1, "dropped": [1 / 8, 2 / 8], "imbalance": [1.0, 1.5], "tokens": [[4, 4], [6, 2]],
    }  # fmt: skip
    assert recent == Recent(skipped=1)
    recent.count([], [])  # a dense model
    assert recent.spend() == {"loss": None, "skipped": 1, "dropped": [], "imbalance": [], "tokens": []}


# ---- the job's


@pytest.mark.slow
def test_a_whole_run(tmp_path, text):
    flags = ("--steps", "5", "--log-every", "2", "--save-every", "3", "--capacity-factor", "0.5", "--layers", "4")
    done = result(run(tmp_path, *flags, "--data", text, "--pp", "2", ranks=2))
    assert kinds(tmp_path) == [
        ("start", 0), ("held out", 0), ("step", 2), ("held out", 3), ("step", 4), ("step", 5), ("held out", 5),
        ("end", 5),
    ]  # fmt: skip
    assert checkpoints(tmp_path) == [3, 5]
    start, *middle, last = read(tmp_path / "log.jsonl")
    assert start["job"] == options.parse(
        [*TINY.split(), *flags, "--data", text, "--pp", "2", "--out", str(tmp_path)]
    ).fit(2).__dict__ | {"data": [text], "vocab": 256, "eod": 0}
    assert start["mesh"] == {"pp": 2, "dp": 1, "tp": 1, "ep": 1, "etp": 1}
    assert (start["ranks"], start["device"], start["restart"]) == (2, "cpu", False)
    assert start["parameters"] == done["parameters"] > start["active_parameters"] > 0
    assert start["train_bytes"] > start["held_out_bytes"] > 0
    assert start["train_tokens"] > start["train_bytes"]  # each document begins with a token of its own
    assert last["reason"] == "done"
    for event, steps_of in zip([e for e in middle if e["event"] == "step"], (2, 2, 1), strict=True):
        assert [sum(layer) for layer in event["tokens"]] == [steps_of * 4 * 16 * 2] * 2  # sequences, bytes, experts
        assert all(0 < share < 1 for share in event["dropped"])
        assert event["sent_bytes"]["pp send"] > 0
        assert (event["tokens_per_s"] is None) == (steps_of == 1)  # the step of a line is not timed
        assert event["tflops_per_s"] is None or event["tflops_per_s"] > 0
    saved = [event for event in middle if event["event"] == "checkpoint"]
    assert all(0 < event["stall_s"] <= event["seconds"] < 60 for event in saved)
    figures = {"steps", "loss", "val_bpb", "tokens_per_s", "tflops_per_s", "memory_bytes", "sent_bytes", "seconds"}
    figures |= {"dropped", "imbalance", "ranks", "mesh", "parameters", "active_parameters"}
    assert done.keys() == figures
    newest = [event for event in middle if event["event"] == "step"][-1]
    assert done["dropped"] == pytest.approx(sum(newest["dropped"]) / 2)
    assert done["imbalance"] == max(newest["imbalance"])
    again = result(run(tmp_path, *flags, "--data", text, "--resume", ranks=1))  # with nothing left to do
    assert [again[key] for key in ("loss", "val_bpb", "imbalance")] == [
        done[key] for key in ("loss", "val_bpb", "imbalance")
    ]
    assert kinds(tmp_path)[-2:] == [("start", 5), ("end", 5)]


def events_of(out: str, flags: str, stop_after: int = 0) -> list[dict]:
    """The step events of a job; `stop_after`: that ends with an error in the step after it."""
    launch.RANK, launch.RANKS = dist.get_rank(), dist.get_world_size()
    train, taken = steps.train, []

    def failing(*args, **further):
        taken.append(1)
        if stop_after and len(taken) > stop_after:
            raise RuntimeError("a rank was lost")
        return train(*args, **further)

    steps.train = failing
    given = [*TINY.split(), "--out", out, "--data", TEXT, *flags.split()]
    pretrain.train(options.parse(given).fit(launch.RANKS), torch.device("cpu"), Place())
    return [event for event in read(Path(out) / "log.jsonl") if event["event"] == "step"]


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [(1, ""), (2, "--pp 2 --accumulate 2 --recompute sqrt --optimizer muon --ema 0.5 --lr-schedule wsd")],
)
def test_after_a_crash_the_lines_are_those_of_a_run_without(tmp_path, ranks, mesh):
    """Also the first one after the checkpoint, which tells of steps before it."""
    flags = f"--steps 8 --log-every 4 --save-every 3 --gate gshard --capacity-factor 0.7 --layers 4 {mesh}"
    (whole, _, _), *_ = outcomes(ranks, events_of, str(tmp_path / "whole"), flags)
    assert [event["step"] for event in whole] == [4, 8]
    out = tmp_path / "crashed"
    for _, error, trace in outcomes(ranks, events_of, str(out), flags, 7):
        assert error == "RuntimeError: a rank was lost", trace
    assert kinds(out)[-2:] == [("held out", 6), ("end", 8)]
    assert read(out / "log.jsonl")[-1]["reason"] == "step 8, in training: RuntimeError: a rank was lost"
    saved = b"".join(file.read_bytes() for file in (out / "step-6").iterdir())
    assert b"recent" in saved
    assert b"imbalance" not in saved  # nor any other of the log's curves
    (resumed, _, _), *_ = outcomes(ranks, events_of, str(out), f"{flags} --resume")
    same = ("step", "loss", "gradient_norm", "tokens", "dropped", "imbalance", "lr", "skipped")
    assert [[event[key] for key in same] for event in resumed] == [[event[key] for key in same] for event in whole]
    assert min(whole[-1]["dropped"]) > 0
