"""Kernels on the CPU under sanitizers, and which of their lines ran."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runner
from runner import COVERAGE, Runner, installed, library
from sanitized import CASES, USED, sound
from turnout.cuda import launch

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run kernels on the CPU"),
]


def library_of(name):
    """Where g++ has a library of its own, None if it has it not."""
    done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    found = Path(done.stdout.strip())
    return found if found.is_absolute() else None


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What each case of sanitized.py wrote to its standard error."""
    asan = library_of("libasan.so")
    if asan is None:
        pytest.skip("needs libasan")
    folder = tmp_path_factory.mktemp("sanitized")
    path = os.pathsep.join([str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
    settings = {"LD_PRELOAD": str(asan), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", str(HERE / "sanitized.py"), str(folder)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {case.__name__: (folder / case.__name__).read_text() for case in CASES}


def test_kernels_touch_what_is_theirs(errors):
    assert errors["sound"] == "done"


@pytest.mark.parametrize(
    ("case", "finding"),
    [
        ("past_the_end", "heap-buffer-overflow"),
        ("past_shared_memory", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_planted_bugs_are_seen(errors, case, finding):
    assert finding in errors[case]
    assert "planted.cu" in errors[case]
    assert "done" not in errors[case]


@pytest.mark.skipif(shutil.which("gcov") is None, reason="needs gcov")
def test_every_line_of_the_kernels_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "INSTANCES", USED)
    with installed(Runner(flags=COVERAGE)):
        sound()
    lines = {}
    for kernels in USED.values():
        built = library(kernels[0], COVERAGE)
        built.library.dump_coverage()
        counts = built.path.parent.glob(f"{built.path.stem}*.gcda")  # several, if several processes have compiled it
        notes = max(counts, key=lambda path: path.stat().st_mtime).with_suffix(".gcno")
        command = ["gcov", "--json-format", "--stdout", str(notes)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        for file in json.loads(done.stdout)["files"]:
            if Path(file["file"]).parent == launch.FOLDER:
                ran = lines.setdefault(Path(file["file"]).name, {})
                for line in file["lines"]:
                    ran[line["line_number"]] = ran.get(line["line_number"], 0) + line["count"]
    assert set(lines) >= set(USED)
    missed = {name: [number for number, count in ran.items() if not count] for name, ran in lines.items()}
    assert not any(missed.values()), missed
