"""The live table of the main job: what it shows, how it refreshes, and the job with all its flags."""

from __future__ import annotations

import io

import launch
import options
import pytest
from main_job import result, run
from turnout.dispatch import Meshes
from turnout.moe import LayerReport
from turnout.moe.parallel.costs import LayerChoice
from watch import Watch, table

CHOICE = LayerChoice(1, 1, "flat", 2)
FLAGS = ("--adapt", "--place", "--watch", "--steps", "6", "--log-every", "2")
REPORTS = {
    "blocks.1.feed_forward": LayerReport(CHOICE, (0,), (60, 20, 20, 20), 3.0, 2.5, 0.75),
    "blocks.3.feed_forward": LayerReport(CHOICE._replace(shadow=0), (), (10, 0, 10, 20), 3.0, 1.5, 0.25),
}


def test_the_table():
    assert table(REPORTS) == [
        "layer                  load  max/mean  imbalance ms  layer ms  does",
        "blocks.1.feed_forward  █▃▃▃      2.00          0.75      2.50  parallelism 1, 1 shadowed, flat in 2",
        "blocks.3.feed_forward  ▄ ▄█      2.00          0.25      1.50  parallelism 1, flat in 2",
        "all layers                                     1.00      4.00",
    ]
    assert table({}) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [Terminal(), io.StringIO()])
def test_a_table_takes_the_place_of_the_last_one_on_a_terminal(out, monkeypatch):
    monkeypatch.setattr(launch, "RANK", 0)

    class One:
        def size(self) -> int:
            return 1

    watch = Watch(Meshes({"pp": One()}, None, None, None, None), out)  # pyright: ignore[reportArgumentType]
    watch.show("step 1", REPORTS)
    watch.show("step 2", REPORTS)
    first, _, second = out.getvalue().partition("step 2")
    assert first.endswith("\033[5A\033[J" if out.isatty() else "\n")
    assert len(second.splitlines()) == 5


@pytest.mark.slow
def test_the_job_adapts_and_shows_it(text, tmp_path):
    done = run(tmp_path, "--data", text, *FLAGS, ranks=2)
    assert result(done)["steps"] == 6
    assert done.stderr.count("all layers") == 3
    assert "blocks.1.feed_forward" in done.stderr


def test_schedules_that_cannot_gather_are_refused():
    job = options.Job(adapt=True, pp=2, schedule="zbv", layers=4, micro_batches=2)
    with pytest.raises(ValueError, match="--adapt gathers experts, which --schedule zbv cannot: take interleaved1f1b"):
        job.fit(2)
