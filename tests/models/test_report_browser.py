"""The report in a real browser: nothing fails, nothing is cut off, and it asks for nothing."""

from pathlib import Path

import pytest
from browser import browser, chromium
from report_logs import HOSTILE, Run, large, small

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install -e ".[train]"')

from turnout.models import report


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
def run(request, tmp_path_factory) -> Run:
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
