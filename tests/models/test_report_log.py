"""The report: what it reads from a log, and how it is asked for."""

import subprocess
import sys
import threading
import time

import pytest
from report_logs import Run, small

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install -e ".[train]"')

from turnout.models import report
from turnout.models.report.__main__ import main
from turnout.models.report.log import LogError, read


def test_work_that_a_restart_did_again_counts_once(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.steps(0, 80, loss=1.0)
    run.line("spike", 75, loss=9.0, median=1.0, parameter="w", rank=0)
    run.line("spike", 40, loss=8.0, median=1.0, parameter="w", rank=0)
    run.start(50, restart=True)
    run.steps(50, 70, loss=2.0)
    log = read(run.path)
    assert [(step.step, step.loss) for step in log.steps] == [(n, 1.0 if n <= 50 else 2.0) for n in range(10, 80, 10)]
    assert [spike.loss for spike in log.spikes] == [8.0]
    assert [each.step for each in log.held_out] == [each.step for each in log.checkpoints] == [50]
    (restart,) = log.restarts
    assert (restart.lost, restart.start.step, restart.ended, restart.start.restart) == (30, 50, None, True)
    assert restart.idle == pytest.approx(40)
    assert (log.state, log.step) == ("running", 70)


def test_a_line_that_a_crash_tore_is_passed_over(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.step(10)
    run.step(20)
    whole = run.path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        run.path.write_bytes(whole[:length])
        torn = whole[:length].count(b"\n") - 1
        assert len(read(run.path).steps) in (torn, torn + 1)  # whole but for the line feed is whole
    run.path.write_bytes(whole[:-9] + b"\xff\n")  # the next attempt began on a new line
    run.start(10)
    run.step(20, loss=7.0)
    assert [step.loss for step in read(run.path).steps][1:] == [7.0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"event": "step", "st', "line 2: this is not a JSON object"),
        ("[1]", "line 2: this is not a JSON object"),
        ('{"event": "step", "time": 1.0}', "line 2: 'step' of the event 'step' must be int; it is not there"),
        ('{"event": "step", "step": true, "time": 1}', "line 2: 'step' of the event 'step' must be int; got 'true'"),
        ('{"event": "step", "step": 1, "time": 1, "loss": "x"}', "'loss' of the event 'step' must be float | None"),
        ('{"event": "step", "step": 1, "time": 1, "tokens": [[1, "2"]]}', "'tokens' of the event 'step' must be list"),
        ('{"event": "step", "step": 1, "time": 1, "sent_bytes": {"dp": "1"}}', "'sent_bytes' of the event 'step' must"),
        (
            '{"event": "held out", "step": 1, "time": 1, "bytes": [[[[1, 2, 3]]]]}',
            "'bytes' of the event 'held out' must",
        ),
        ('{"event": "start", "step": 1, "time": 1, "job": []}', "'job' of the event 'start' must be dict"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    run = Run(tmp_path)
    run.start()
    with open(run.path, "a") as file:
        print(line, file=file)
    run.step(10)
    with pytest.raises(LogError) as caught:
        read(run.path)
    assert str(caught.value).startswith(f"{run.path}, line 2: ")
    assert words in str(caught.value)
    assert main([str(tmp_path)]) == 2


def test_unknown_events_and_keys_are_passed_over(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.line("weather", 3, sun=True)
    run.step(10, colour="blue", loss=None, memory_bytes=None, tflops_per_s=float("nan"))
    (step,) = read(run.path).steps
    assert (step.loss, step.memory_bytes, step.tflops_per_s) == (None, None, None)
    assert not hasattr(step, "colour")


def test_what_cannot_be_reported_is_said(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'} cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1, "time": 1.0}\n')
    assert main([str(tmp_path)]) == 2
    assert "log.jsonl has no line with the event start" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert main([str(tmp_path)]) == 2
    assert 'pip install "turnout[train]"' in capsys.readouterr().err


def test_the_command(tmp_path):
    run = small(tmp_path)
    command = [sys.executable, "-m", "turnout.models.report", str(run.path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "report.html")), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "report.html"]


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    run = small(tmp_path)
    (tmp_path / "report.html").mkdir()
    assert main([str(run.path)]) == 2
    assert "report.html" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "report.html"]


def test_a_page_that_follows_a_run_loads_itself_until_the_run_ends(tmp_path):
    run = Run(tmp_path)
    run.start()
    following = threading.Thread(target=main, args=([str(tmp_path), "--follow", "1"],))
    following.start()
    while not (tmp_path / "report.html").exists():
        time.sleep(0.01)
    assert '<meta http-equiv="refresh" content="1">' in (tmp_path / "report.html").read_text()
    run.step(10)
    run.end(10)
    following.join(timeout=60)
    assert not following.is_alive()
    page = (tmp_path / "report.html").read_text()
    assert 'class="state done"' in page
    assert "refresh" not in page
    assert "refresh" not in report.write(tmp_path, refresh=None).read_text()
