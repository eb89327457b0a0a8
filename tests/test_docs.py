"""The reference that `make docs` writes: it builds without warnings and shows every public name, and no private one."""

import html
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moe", "dispatch", "models")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason='needs pdoc: pip install -e ".[docs]"'),
]


def command(folder: Path) -> list[str]:
    """What `make docs` runs, with this Python and into `folder`."""
    recipe = re.search(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe, "no target docs in the Makefile"
    python, *arguments, build = shlex.split(recipe[1].replace("\\\n", ""))
    assert (python, build) == ("$(VENV)/bin/python", "build/docs")
    return [sys.executable, *arguments, str(folder)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    result = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert (result.returncode, result.stderr) == (0, "")  # a warning is either
    return folder


def shown(page: str, name: str) -> str:
    """The docstring of `name` on a page, as text; "" if the name or its docstring is missing."""
    section = page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
    own = section.partition('class="classattr"')[0]
    docstring = own.partition('<div class="docstring">')[2].partition("</div>")[0]
    return html.unescape(re.sub(r"<[^>]+>", "", docstring)).strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_with_its_docstring(reference, package):
    page = (reference / "turnout" / f"{package}.html").read_text()
    module = importlib.import_module(f"turnout.{package}")
    for name in module.__all__:
        if not callable(vars(module)[name]):  # a constant's __doc__ is its type's
            assert f'id="{name}"' in page, f"{name} is not in the reference"
            continue
        own = vars(module)[name].__doc__ or ""
        own = "" if own.startswith(f"{name}(") else own  # what a dataclass or NamedTuple makes up
        assert own, f"turnout.{package}.{name} has no docstring"
        first = own.split()[0].strip("`")
        assert shown(page, name).startswith(first), f"{name} is not in the reference, or without its docstring"


def test_private_names_are_not_there(reference):
    names = {name for page in reference.rglob("*.html") for name in re.findall(r' id="([\w.]+)"', page.read_text())}
    assert {"MoE", "MoE.forward", "Plan.of"} <= names
    assert [name for name in names if re.search(r"(^|\.)_(?!_init__$)", name)] == []


def test_links_between_its_pages_lead_somewhere(reference):
    pages = list(reference.rglob("*.html"))
    assert {page.relative_to(reference).as_posix() for page in pages} >= {f"turnout/{name}.html" for name in PACKAGES}
    for page in pages:
        code = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
        links = [link for link in re.findall(r'href="([^"#]+)', code) if "://" not in link]
        assert [link for link in links if not (page.parent / link).exists()] == []
