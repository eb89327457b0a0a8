"""The site that `make docs` builds: no warnings, every public name with its docstring, and a browser shows it whole."""

import html
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser, chromium

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(page.stem for page in (ROOT / "docs" / "api").glob("*.md"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason='needs Sphinx: pip install -e ".[docs]"'),
]


def build(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what `make docs` runs, with this Python."""
    recipe = re.search(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe, "no target docs in the Makefile"
    python, *arguments, pages, built = shlex.split(recipe[1])
    assert (python, pages, built) == ("$(VENV)/bin/python", "docs", "build/docs")
    command = [sys.executable, *arguments, str(source), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "docs", folder)
    assert (result.returncode, result.stderr) == (0, "")  # a broken link, or a name that does not exist, is a warning
    return folder


def shown(pages: list[str], name: str) -> str | None:
    """What the reference says of a name, as text: from its signature to the next one; None if it is not there."""
    for page in pages:
        _, found, rest = page.partition(f' id="{name}"')
        if found:
            own = re.split(r'<dl class="py (?:class|method|function|property|attribute)', rest)[0]
            return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", own)))
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_with_its_docstring(site, package):
    pages = [page.read_text() for page in (site / "api").glob("turnout.*.html")]
    module = importlib.import_module(package)
    for name in module.__all__:
        value = vars(module)[name]
        if not callable(value):  # a constant's __doc__ is its type's
            continue
        made_up = not value.__doc__ or value.__doc__.startswith(f"{name}(")  # by a dataclass or NamedTuple
        assert not made_up, f"{package}.{name} has no docstring"
        found = [text for place in PACKAGES if (text := shown(pages, f"{place}.{name}"))]  # where it is public
        assert found, f"{package}.{name} is not in the reference"
        words = re.findall(r"\w{4,}", value.__doc__)[:3]
        assert any(all(word in text for word in words) for text in found), f"{package}.{name} is without its docstring"


def test_the_packages_that_users_import_from_are_there():
    parts = (
        "moe moe.gates moe.adapters moe.upcycling moe.replay moe.autotune dispatch models models.checkpoint models.hf"
    )
    assert {f"turnout.{part}" for part in [*parts.split(), "models.report"]} <= set(PACKAGES)


def test_private_names_are_not_there(site):
    names = {name for page in (site / "api").glob("*.html") for name in re.findall(r' id="([\w.]+)"', page.read_text())}
    assert {"turnout.moe.MoE", "turnout.moe.MoE.forward", "turnout.dispatch.Plan.of"} <= names
    assert [name for name in names if re.search(r"^turnout.*\._", name)] == []


def test_broken_references_fail(tmp_path):
    broken = ["[](nowhere.md)", "[](index.md#nothing)", "![](nowhere.png)", "`turnout.moe.Nothing`"]
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    (docs / "index.md").write_text("\n\n".join(["# Page", "`turnout.moe.MoE`, `turnout.moe.MoE(8, 16, 4)`", *broken]))
    result = build(docs, tmp_path / "out")
    assert result.returncode != 0
    complaints = sorted(line for line in result.stderr.splitlines() if "WARNING" in line)
    assert len(complaints) == len(broken), complaints  # and none of the names that exist
    for name in ("nowhere.md", "nothing", "nowhere.png", "turnout.moe.Nothing"):
        assert any(name in complaint for complaint in complaints), name


def test_pictures_are_drawn_from_the_records(tmp_path):
    draw = runpy.run_path(str(ROOT / "docs" / "images" / "draw.py"))
    assert draw["dispatch"]() == (ROOT / "docs" / "images" / "dispatch.svg").read_text()
    for name in ("quality", "transports"):
        draw[name](tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_it(site):
    looks = {  # what is on a page
        "index.html": "document.images[0].naturalWidth > 0 && document.body.innerText.includes('Glossary')",
        "api/turnout.moe.html": "document.getElementById('turnout.moe.MoE').innerText.includes('top_k')",
        "guides/training_loop.html": "document.querySelectorAll('.highlight span').length > 99",  # code in colours
    }
    with browser(chromium() or "") as tab:
        for page, look in looks.items():
            for width in (400, 1400):
                tab.open(site / page, width)
                assert tab.value(look), page
                assert tab.value("document.documentElement.scrollWidth") <= width, page
                assert tab.errors == [], page
                assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == [], page
