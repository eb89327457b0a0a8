"""What README and docs show is run, and what they link to exists."""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from scripts import script

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cuda" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what a fence says, and the numbers of ranks its block runs on; on several it must print the same numbers, to 1 %
RANKS = {"python torchrun": (2,), "python torchrun 4": (4,), "python torchrun 1 4": (1, 4)}
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")  # file, heading


def blocks(path: Path, kind: str) -> list[str]:
    """Code blocks of a page whose fence says exactly `kind`, each moved down to its own line number."""
    text = path.read_text()
    found = [match for match in FENCE.finditer(text) if match[1].strip() == kind]
    return ["\n" * text[: match.start(2)].count("\n") + match[2] for match in found]


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def test_readme_has_an_example_of_each_kind():
    readme = ROOT / "README.md"
    assert blocks(readme, "python")
    assert blocks(readme, "python torchrun")


@each(PAGES)
def test_every_python_block_is_of_a_kind_that_is_run(path):
    kinds = {match[1].strip() for match in FENCE.finditer(path.read_text())}
    assert {kind for kind in kinds if kind.startswith("python")} <= {"python", *RANKS}


@each([path for path in PAGES if blocks(path, "python")])
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what they write
    namespace = {"__name__": path.stem}
    with torch.random.fork_rng():
        for code in blocks(path, "python"):
            exec(compile(code, str(path), "exec"), namespace)


@pytest.mark.slow
@each([path for path in PAGES if any(blocks(path, kind) for kind in RANKS)])
def test_torchrun_blocks_run(path, tmp_path, monkeypatch):
    job = tmp_path / "job.py"
    for numbers, code in [(numbers, code) for kind, numbers in RANKS.items() for code in blocks(path, kind)]:
        job.write_text(code)
        losses = {}
        for ranks in numbers:
            monkeypatch.chdir(tempfile.mkdtemp(dir=tmp_path))  # what they write
            done = script(job, ranks=ranks)
            assert done.returncode == 0, done.stderr
            losses[ranks] = [float(number) for number in re.findall(r"loss ([\d.]+)", done.stdout)]
        assert all(found == pytest.approx(losses[numbers[0]], rel=0.01) for found in losses.values()), losses
        assert losses[1] if len(numbers) > 1 else True


@pytest.mark.slow
def test_a_block_of_the_readme_runs_under_torchrun(tmp_path):
    job = tmp_path / "job.py"
    job.write_text(blocks(ROOT / "README.md", "python torchrun")[0])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(2):
        done = subprocess.run([*launch, str(job)], capture_output=True, text=True, timeout=240, check=False)
        if "terminate called without an active exception" not in done.stderr:
            break  # else a thread of gloo's outlived the interpreter: rare, torch 2.13's, see examples/launch.py
    assert done.returncode == 0, done.stderr


@each(PAGES)
def test_links_lead_somewhere(path):
    links = [(path.parent / file if file else path, heading) for file, heading in linked(path)]
    assert [file for file, _ in links if not file.exists()] == []
    assert [(file.name, heading) for file, heading in links if heading and heading not in headings(file)] == []


def linked(path: Path) -> list[tuple[str, str]]:
    """Links of a page that lead to files here: the file, "" for the page itself, and the heading or ""."""
    return [link for link in LINK.findall(FENCE.sub("", path.read_text())) if "://" not in link[0]]


def headings(path: Path) -> set[str]:
    """A page's headings, as links name them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_index_has_every_page():
    docs = ROOT / "docs"
    linked_to = {file for file, _ in linked(docs / "index.md")} | {"index.md"}
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert {page for page in pages - linked_to if not page.startswith("api/")} == set()


def test_contributing_lists_the_names_that_users_import():
    rows = re.findall(r"^\| `turnout\.([\w.]+)` \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} >= {"moe", "moe.gates", "dispatch", "models"}
    for package, names in rows:
        assert set(re.findall(r"`(\w+)`", names)) == set(importlib.import_module(f"turnout.{package}").__all__), package
