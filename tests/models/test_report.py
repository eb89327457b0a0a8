"""The report: what its page says of a run."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_logs import HOSTILE, Run, large, small

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install -e ".[train]"')

from turnout.models import report
from turnout.models.report.log import read
from turnout.models.report.page import page

EMPTY = {"meta", "link", "img", "path", "use", "rect"}  # elements that have no end, or may end themselves


class Parsed(HTMLParser):
    """A page whose elements are closed in order.

    Attributes:
        elements: (tag, attributes) of all.
        text: what it says, spaces put together.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open, self.said = [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.said.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.elements)


def made(run: Run) -> Parsed:
    return Parsed(report.write(run.path.parent).read_text())


def setting(page: Parsed, name: str) -> str:
    return re.search(rf"{name} (.*?) (--|mesh )", page.text)[1]


@pytest.mark.parametrize(
    ("reason", "state"),
    [("done", "done"), ("stopped by SIGTERM", "stopped"), ("step 7: the loss is NaN", "failed"), ("", "failed")],
)
def test_the_state_is_what_the_last_attempt_came_to(tmp_path, reason, state):
    run = Run(tmp_path)
    run.start()
    run.end(0, reason)
    assert read(run.path).state == state
    assert f'<span class="state {state}">' in report.write(tmp_path).read_text()
    assert reason in made(run).text
    run.start(0)
    log = read(run.path)
    assert (log.state, log.restarts[0].ended) == ("running", reason)


def test_the_headline(tmp_path):
    run = Run(tmp_path, steps=200)
    run.start()
    run.steps(0, 50, loss=np.log(2) * 1.5)
    run.line("held out", 60, bits_per_byte=3.9)
    log = read(run.path)
    shown = Parsed(page(log, now=log.time)).text
    for words in (
        "5.31 M parameters, 2.1 M active", "31.4 MB of text, 2.1 MB held out", "8 ranks on cpu",
        "pp 2, dp 2, tp 2, ep 4",
        "Step 60 of 200", "Train 1.5000 bits per byte", "Held out 3.9000 best 2.9140, step 50", "Memory 1.25 GB",
        f"Time 35 s about {round(0.7 * 140)} s left".replace("98 s", "1 min 38 s"),
    ):  # fmt: skip
        assert words in shown
    assert "etp 1 ·" not in shown  # an axis of one rank is none


def test_a_run_that_has_said_nothing_for_long_may_be_dead(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.step(10)
    log = read(run.path)
    assert "no log line" not in page(log, now=log.time + 299)
    assert 'class="state silent">no log line for 1 h 0 min</span>' in page(log, now=log.time + 3600)
    run.end(10)
    log = read(run.path)
    assert "no log line" not in page(log, now=log.time + 3600)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_run_that_just_began(tmp_path, layers):
    run = Run(tmp_path, layers=layers)
    run.start()
    page = made(run)
    assert "There is no loss yet." in page.text
    assert page.count("svg") == page.count("img") == 0
    run.step(10)
    page = made(run)
    assert page.count("img") == layers
    assert "no evaluation yet" in page.text
    assert page.count("svg") > 5


def test_axes_without_a_curve_are_said_to_be_missing(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.step(10, sent_bytes={f"axis{n} all_reduce": 10 + n for n in range(8)})
    run.step(20, sent_bytes={"ep all_to_all": 9, "ep all_reduce": 9})
    page = made(run)
    axes = " ".join(["ep", *(f"axis{n}" for n in (7, 6, 5, 4, 3))])
    assert f"Bytes sent per step {axes} per rank, 6 of 9 axes" in page.text
    assert "Bytes sent in step 20 per rank axis collective bytes share ep all_to_all 9 B 50.0%" in page.text


def test_a_dense_model_has_nothing_of_experts(tmp_path):
    page = made(small(tmp_path, layers=0))
    assert page.count("img") == 0
    assert not re.search("expert(?!s 8)|Imbalance|Dropped", page.text)
    assert not any(tag == "section" and "load" in attributes["id"] for tag, attributes in page.elements)


def test_all_steps_skipped(tmp_path):
    run = Run(tmp_path)
    run.start()
    for step in range(10, 60, 10):
        run.skipped = step
        run.step(step, loss=None, gradient_norm=None, tokens=[[0] * 8] * 2, imbalance=[None, None])
    page = made(run)
    assert "There is no loss yet." in page.text
    assert "Skipped steps 50" in page.text
    assert "1 to 10 10 11 to 20 10" in page.text
    assert page.count("img") == 2


def test_hostile_text_stays_text(tmp_path):
    run = Run(tmp_path / "a<b>&'\"")
    run.start(out=HOSTILE, half="\ud800", **{HOSTILE: [HOSTILE, 1]})
    run.steps(0, 50, sent_bytes={f"{HOSTILE}": 3.0, "<b> all_reduce": 2.0})
    run.line("spike", 50, loss=3.0, median=1.0, parameter=HOSTILE, rank=1)
    run.line(
        "start", 50, job={"steps": HOSTILE, "gate": HOSTILE}, device=HOSTILE, ranks=2, run=HOSTILE, mesh={HOSTILE: 2}
    )
    run.end(50, HOSTILE)
    page = made(run)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "iframe", "object"})
    assert page.count("img") == sum(a.get("class") == "map" for _, a in page.elements) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(" ".join(HOSTILE.split())) >= 6
    assert page.count("meta", **{"http-equiv": "Content-Security-Policy"})


@pytest.fixture(scope="module")
def large_run(tmp_path_factory) -> Run:
    run = large(tmp_path_factory.mktemp("runs") / "large")
    report.write(run.path)
    return run


def test_settings_show_what_a_restart_changed(large_run):
    page = Parsed(large_run.path.with_name("report.html").read_text())
    assert setting(page, "--lr") == "0.004; from step 620: 0.002"
    assert setting(page, "--aux-weight") == "0.01; from step 620: 0.003"
    assert setting(page, "--bf16") == "no"
    assert page.text.index("--lr") < page.text.index("--steps")
    assert page.count("div", **{"class": "changed"}) == 2
    assert "Restarts: 2" in page.text
    assert re.search("300 30 40 s by the launcher killed: the log has no end", page.text)
    assert re.search("620 0 40 s by hand stopped by SIGTERM", page.text)


def test_thirty_two_layers_are_a_small_file(large_run):
    file = large_run.path.with_name("report.html")
    page = Parsed(file.read_text())
    assert page.count("img") == 32
    assert 200_000 < file.stat().st_size < 1_500_000
    assert page.count("details", **{"open": None}) == 2  # of the layers the first; restarts
    assert "blocks.30.attention.out.weight" in page.text
    assert "blocks.3.moe.experts.up" not in page.text  # its step was done again


def test_bytes_of_experts_are_printable(tmp_path):
    run = Run(tmp_path, layers=1, experts=2)
    run.start()
    taken = [[[[32, 8], [10, 6], [9, 4], [13, 2]], [[60, 9], [38, 1], [65, 1], [200, 1], [0, 1], [256, 1]]]]
    run.line("held out", 10, bits_per_byte=1.0, bytes=taken)
    run.line("held out", 20, bits_per_byte=1.0)
    html = report.write(tmp_path).read_text()
    assert "0 ␣ ⏎ ⇥ 0d 1 < & A c8 00 <256>" in Parsed(html).text
    assert [int(n) for n in re.findall(r'<i class="s(\d)"', html)] == [4, 3, 2, 1, 4, 1, 1, 1, 1, 1]
