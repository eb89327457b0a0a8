"""The report: heat maps and curves."""

import base64
import io
import re

import numpy as np
import pytest
from report_logs import Run, small

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install -e ".[train]"')

from matplotlib.image import imread
from turnout.models import report
from turnout.models.report.curves import MOST, Series, chart
from turnout.models.report.log import read
from turnout.models.report.maps import COLUMNS, load, picture


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


def test_very_many_restarts_leave_the_curve_to_be_seen():
    curve = [Series("", [0, 100], [1.0, 2.0])]
    few, many = (chart("x", curve, last=100, marks=range(0, 100, gap)) for gap in (5, 2))
    assert (few.count("stroke-dasharray"), many.count("stroke-dasharray")) == (20, 0)
    assert few.count("var(--purple)") == 20
    assert many.count("var(--purple)") == 50


def test_names_in_drawings_do_not_clash(tmp_path):
    html = report.write(small(tmp_path).path).read_text()
    drawings = [set(re.findall(r' id="([^"]*)"', part)) for part in html.split("<svg")[1:]]
    for drawing, part in zip(drawings, html.split("<svg")[1:], strict=True):
        used = {a or b for a, b in re.findall(r'xlink:href="#([^"]*)"|url\(#([^)]*)\)', part.partition("</svg>")[0])}
        assert used <= drawing
