"""What a wheel holds, and that the folder `cuda/` does not get in the way of NVIDIA's package of that name."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import turnout

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("dispatch", "moe", "cuda", "models")

pytestmark = pytest.mark.slow


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Run `python -c` in `cwd`, which is then first on sys.path, as for a user who starts Python there."""
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": str(path)}
    code = f"import sys\nassert sys.path[0] == '', 'the working directory is not on sys.path'\n{code}"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built from a copy: a build leaves files behind."""
    place = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, place / "source", ignore=left_out)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(place)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(place / "source")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = place.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"turnout-{turnout.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"turnout", info}
    assert f"{info}/licenses/LICENSE" in names
    sources = [
        path for room in ROOMS for kind in ("*.py", "*.cu", "*.cuh", "*.toml") for path in (ROOT / room).rglob(kind)
    ]
    expected = {f"turnout/{path.relative_to(ROOT).as_posix()}" for path in sources}
    expected |= {"turnout/__init__.py", "turnout/py.typed", "turnout/cuda/README.md"}
    assert {name for name in names if name.startswith("turnout/")} == expected


def test_wheel_imports_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import turnout.moe, turnout.models\nprint(turnout.moe.__file__)"
    file = python(code, cwd=tmp_path, path=tmp_path / "site")
    assert Path(file) == tmp_path / "site" / "turnout" / "moe" / "__init__.py"


def test_package_imports_with_the_root_as_working_directory():
    ours = python(
        "import turnout.moe\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.split('.')[0] == 'cuda' and getattr(module, '__file__', None): print(module.__file__)",
        cwd=ROOT,
    )
    # A bare namespace `cuda` is fine (torch looks for cuda.bindings), a module of ours under that name is not.
    assert not [file for file in ours.splitlines() if Path(file).is_relative_to(ROOT / "cuda")]


def test_somebody_elses_cuda_is_found_from_the_root(tmp_path):
    # NVIDIA's `cuda` is a namespace package; this one stands for it where CuPy is not installed.
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "pathfinder.py").touch()
    file = python("import cuda.pathfinder\nprint(cuda.pathfinder.__file__)", cwd=ROOT, path=tmp_path)
    assert Path(file) == tmp_path / "cuda" / "pathfinder.py"


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
def test_cupy_imports_with_the_root_as_working_directory():
    file = python("import cupy, cuda.pathfinder\nprint(cuda.pathfinder.__file__)", cwd=ROOT)
    assert not Path(file).is_relative_to(ROOT / "cuda")
