"""The report: what it reads from a log, what its page says, and that a real browser shows it."""

import base64
import io
import re
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import browser, chromium
from report_logs import Run, large, small

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install -e ".[train]"')

from matplotlib.image import imread
from turnout.models import report
from turnout.models.report.__main__ import main
from turnout.models.report.curves import MOST, Series, chart
from turnout.models.report.log import LogError, read
from turnout.models.report.maps import COLUMNS, load, picture
from turnout.models.report.page import page

HOSTILE = (
    """<script>document.title='run'</script><img src=x onerror="document.title='run'">'"&amp;</style> $x^2$ {css}"""
)
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


def test_a_page_that_follows_a_run_loads_itself_until_the_run_ends(tmp_path):
    run = Run(tmp_path)
    run.start()
    following = threading.Thread(target=main, args=([str(tmp_path), "--follow", "1"],))
    following.start()
    while not (tmp_path / "report.html").exists():
        time.sleep(0.01)
    assert Parsed((tmp_path / "report.html").read_text()).count("meta", **{"http-equiv": "refresh", "content": "1"})
    run.step(10)
    run.end(10)
    following.join(timeout=60)
    assert not following.is_alive()
    page = (tmp_path / "report.html").read_text()
    assert 'class="state done"' in page
    assert "refresh" not in page
    assert "refresh" not in report.write(tmp_path, refresh=None).read_text()


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
    assert "no word" not in page(log, now=log.time + 299)
    assert 'class="state silent">no word for 1 h 0 min</span>' in page(log, now=log.time + 3600)
    run.end(10)
    log = read(run.path)
    assert "no word" not in page(log, now=log.time + 3600)


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
    run.start(out=HOSTILE, **{HOSTILE: [HOSTILE, 1]})
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


def test_columns_of_a_map_are_spread_over_the_steps(tmp_path):
    run = Run(tmp_path, layers=2, experts=2)
    run.start()
    for step, tokens in {10: [4, 4], 20: [8, 0], 60: [0, 2], 80: [0, 0]}.items():
        run.step(step, tokens=[[1, 1], tokens])
    share = load(read(run.path).steps, layer=1)  # the edges are 0, 20, 40, 60, 80
    np.testing.assert_allclose(share, [[1.5, 0, 0, np.nan], [0.5, 2, 2, np.nan]])
    run.start(80)
    run.step(90, tokens=[[3, 3]])  # the model lost a layer
    assert load(read(run.path).steps, layer=1).shape == (2, 4)
    assert load(read(run.path).steps, layer=0).shape == (2, 5)
    for step in range(100, 1000):
        run.step(step, tokens=[[step, 1]])
    assert load(read(run.path).steps, layer=0).shape == (2, COLUMNS)


def test_colours_of_a_map():
    uri = picture(np.array([[0.0, 0.5, 1.0], [2.0, 9.0, np.nan]]))
    assert uri.startswith("data:image/png;base64,")
    pixels = (imread(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) * 255).round().astype(int).tolist()
    less, more = [0, 114, 178], [213, 94, 0]
    assert pixels == [[[*less, 255], [*less, 127], [0, 0, 0, 0]], [[*more, 255], [*more, 255], [128, 128, 128, 127]]]


def test_a_curve_of_many_points_is_thinned_and_keeps_its_range():
    steps = list(range(1, 10 * MOST + 1))
    values = [1.0 if step % 10 else 5.0 for step in steps]
    values[0] = None
    drawing = chart("many", [Series("", steps, values)], last=steps[-1])
    assert len(drawing) < 60_000
    assert len(chart("few", [Series("", steps[:20], values[:20])], last=20)) < 8_000
    assert drawing.count("var(--blue)") == 2  # the means, and the band around them
    assert "#0072b2" not in drawing


def test_restarts_and_spikes_are_marked(tmp_path):
    run = small(tmp_path / "calm")
    calm = report.write(run.path).read_text()
    run = Run(tmp_path / "wild")
    run.start()
    run.steps(0, 50)
    run.line("spike", 40, loss=3.0, median=1.0, parameter="w", rank=0)
    run.start(50)
    run.steps(50, 100)
    run.end(100)
    wild = report.write(run.path).read_text()
    assert "stroke-dasharray" not in calm
    assert wild.count("stroke-dasharray") == wild.count("<svg")  # a line in each drawing
    assert (calm.count("var(--orange)"), 'class="key spike"' in calm) < (wild.count("var(--orange)"), True)


def test_names_in_drawings_do_not_clash(tmp_path):
    html = report.write(small(tmp_path).path).read_text()
    drawings = [set(re.findall(r' id="([^"]*)"', part)) for part in html.split("<svg")[1:]]
    for drawing, part in zip(drawings, html.split("<svg")[1:], strict=True):
        used = {a or b for a, b in re.findall(r'xlink:href="#([^"]*)"|url\(#([^)]*)\)', part.partition("</svg>")[0])}
        assert used <= drawing


@pytest.fixture(scope="module")
def tab():
    path = chromium()
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browser(path) as tab:
        yield tab


TOO_WIDE = """
  [...document.querySelectorAll("body *")].filter(element => {
    const box = element.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5
      || element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display != "inline"
      && !element.closest("svg"));
  }).map(element => element.outerHTML.slice(0, 120))
"""
IMAGES = "[...document.images].map(image => image.complete && image.naturalWidth * image.naturalHeight)"


def begun(folder: Path) -> Run:
    run = Run(folder)
    run.start()
    return run


def hostile(folder: Path) -> Run:
    run = Run(folder / "a<b>&'")
    run.start(out=HOSTILE * 5, data=[f"/a/very/long/path/{'x' * 200}"], **{"a" * 100: HOSTILE})
    run.steps(0, 100, sent_bytes={f"{'y' * 90} all_reduce": 1.0, f"{HOSTILE} x": 2.0})
    run.line("spike", 90, loss=3.0, median=1.0, parameter="z" * 300, rank=1)
    run.start(90, restart=True)
    run.end(100, HOSTILE + "w" * 500)
    return run


@pytest.fixture(scope="module", params=[begun, small, large, hostile], ids=lambda log: log.__name__)
def run(request, tmp_path_factory, large_run) -> Run:
    if request.param is large:
        return large_run
    run = request.param(tmp_path_factory.mktemp("runs") / request.param.__name__)
    report.write(run.path)
    return run


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(tab, run, width):
    tab.open(run.path.with_name("report.html"), width, dark=width == 400)
    title = tab.value("document.title")
    assert run.path.parent.name in title
    tab.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.value("document.documentElement.scrollWidth") == width
    assert tab.value(TOO_WIDE) == []
    images = tab.value(IMAGES)
    assert len(images) == (0 if run.path.parent.name == "begun" else run.layers)
    assert all(size > 10 for size in images)
    shown = tab.value(
        "[...document.querySelectorAll('svg')].filter(each => each.getBoundingClientRect().height > 100).length"
    )
    assert (shown > 8) == (run.path.parent.name != "begun")
    dark = tab.value("getComputedStyle(document.body).backgroundColor")
    assert dark == ("rgb(18, 20, 23)" if width == 400 else "rgb(246, 246, 243)")
    assert tab.errors == []
    assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in tab.requests) == 1  # the page itself


def test_the_browser_test_sees(tab, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<title>x</title><div style='width:3000px'>wide</div><img src='data:image/png;base64,AAAA'>"
        "<img src='nowhere.png'><script>console.error('hello'); throw new Error('no')</script>"
    )
    tab.open(path, 400)
    assert "wide" in tab.value(TOO_WIDE)[0]
    assert tab.value(IMAGES) == [0, 0]
    assert len(tab.errors) >= 2
    assert any("nowhere.png" in url for url in tab.requests)
