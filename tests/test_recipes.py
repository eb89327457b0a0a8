"""The recipes of CONTRIBUTING, followed to the letter in a copy: the tests of every gate then hold for the new one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", "__pycache__", "build", "runs", "*.egg-info", ".*_cache", ".hypothesis")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def recipe(title: str) -> list[tuple[str, str]]:
    """(language, text) of each block under a heading of CONTRIBUTING."""
    (section,) = re.findall(
        rf"^### {title}\n(.*?)(?=^##)", (ROOT / "CONTRIBUTING.md").read_text() + "\n## ", re.MULTILINE | re.DOTALL
    )
    return FENCE.findall(section)


def follow(diff: str, copy: Path) -> None:
    """Add the lines with a plus below the one above them, which the file that is named first has once."""
    name, anchor, *added = diff.splitlines()
    path = copy / name.removeprefix(" # ")
    lines = path.read_text().splitlines()
    assert lines.count(anchor[1:]) == 1, f"{anchor[1:]!r} is not one line of {path}"
    assert all(line.startswith("+") for line in added)
    place = lines.index(anchor[1:]) + 1
    path.write_text("\n".join([*lines[:place], *(line[1:] for line in added), *lines[place:], ""]))


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, and a folder in which it is the package `turnout`."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "turnout").symlink_to(root)
    return root


def passed(copy: Path, *arguments: str) -> str:
    """What pytest says in the copy."""
    env = os.environ | {"PYTHONPATH": str(copy.parent / "path")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_gate(copy):
    (_, code), *diffs = recipe("A gate")
    (source,) = re.findall(r"^class .*?(?=^\S(?!lass))", code, re.MULTILINE | re.DOTALL)
    imports = "import torch\n\nfrom ..routing import Routing\nfrom .gate import Gate\n\n\n"
    header = '"""The sigma-MoE gate: sigmoid scores."""\n\n'
    (copy / "moe/gates/sigma.py").write_text(header + imports + source.rstrip() + "\n")
    for language, diff in diffs:
        assert language == "diff"
        follow(diff, copy)
    tests = ["tests/test_house.py", "tests/moe/test_every_gate.py", "tests/moe/test_gate_contract.py"]
    assert int(re.findall(r"(\d+) passed", passed(copy, *tests, "-k", "sigma or house"))[0]) > 10
    passed(copy, "tests/distributed/test_fuzz.py", "-k", "knows_every or reach_everything")
