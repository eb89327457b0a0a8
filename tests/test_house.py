"""The house rules, as tests: who may import whom, how long a file is, where state may come from."""

import ast
import configparser
import doctest
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import turnout

ROOT = Path(__file__).resolve().parents[1]
RANK = {"cuda": 0, "dispatch": 1, "moe": 2, "models": 3}  # a room may import those below it
MODULES = sorted(path for room in RANK for path in (ROOT / room).rglob("*.py"))
SOURCES = MODULES + sorted(p for room in ("tests", "examples", "benchmarks") for p in (ROOT / room).rglob("*.py"))
# What a module of the package may not import by an absolute name. Not `cuda`: that is NVIDIA's, ours is `..cuda`.
OURS = {"turnout", "dispatch", "moe", "models", "examples", "benchmarks", "tests"}
MAX_LINES = 320
MAX_GATE = 50  # lines of code, without imports, docstrings, comments
NO_GATES = {"__init__", "assignment", "biased", "gate", "router", "wide_linear"}  # what several gates are made from
GATES = sorted(path for path in (ROOT / "moe" / "gates").glob("*.py") if path.stem not in NO_GATES)
MAY_READ_ENVIRONMENT: set[str] = set()  # files, relative to the root; for torchrun's own variables alone


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    assert paths, "nothing to check: has a folder moved?"
    return pytest.mark.parametrize("path", paths, ids=name)


def wrong_imports(path: str, source: str) -> list[str]:
    """Imports of the module at `path` that do not point down; absolute ones are for other people's packages."""
    room, *inner = path.split("/")
    wrong = []
    for node in ast.walk(ast.parse(source)):
        absolute, relative = [], []
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module or ""]
        elif isinstance(node, ast.ImportFrom) and node.level > len(inner):  # leaves the room
            relative = [node.module] if node.module else [alias.name for alias in node.names]
        for first in (target.split(".")[0] for target in absolute):
            if first in OURS:
                wrong.append(f"{path}:{node.lineno}: absolute import of {first}; write it relative, as in ..dispatch")
        for first in (target.split(".")[0] for target in relative):
            if RANK.get(first, len(RANK)) >= RANK[room]:
                wrong.append(f"{path}:{node.lineno}: {room} imports {first}; only models -> moe -> dispatch -> cuda")
    return wrong


def environment_reads(source: str) -> list[int]:
    """Lines that touch the process environment."""
    words = {"environ", "environb", "getenv", "getenvb", "putenv"}
    lines = []
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.Attribute) and node.attr in words
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in words for alias in node.names)
        if named or imported:
            lines.append(node.lineno)
    return lines


def private_torch(source: str) -> list[int]:
    """Lines that name a part of torch with a leading underscore, imported or reached from `torch` itself."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        parts: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".") if re.fullmatch(r"[\w.]+", ast.unparse(node)) else []
        if parts[:1] == ["torch"] and any(re.match("_[^_]", part) for part in parts):
            lines.add(node.lineno)
    return sorted(lines)


def undocumented(source: str) -> list[str]:
    """Public names without a docstring; "module" for the module itself."""

    def visit(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = {
                d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in child.decorator_list
            }
            if child.name.startswith("_") or decorators & {"setter", "overload", "override"}:
                continue
            if not ast.get_docstring(child):
                yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")

    tree = ast.parse(source)
    return ([] if ast.get_docstring(tree) else ["module"]) + list(visit(tree, ""))


def code_lines(source: str) -> int:
    """Lines with something on them that is neither an import nor a docstring nor a comment."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node = node.body[0]
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - left_out)


def test_the_package_under_test_is_this_checkout():
    assert Path(turnout.__file__).resolve() == ROOT / "__init__.py"


def test_no_two_modules_have_one_name():
    names = [path.name for path in MODULES if not path.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


@each(MODULES)
def test_imports_point_down(path):
    assert wrong_imports(name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "finds"),
    [
        ("dispatch/flat.py", "from ..moe.routing import Routing", 1),
        ("dispatch/flat.py", "from .. import models", 1),
        ("dispatch/flat.py", "from .. import __version__", 1),
        ("moe/gates/topk.py", "def f():\n    from ...models import gpt", 1),
        ("moe/gates/topk.py", "import turnout.dispatch", 1),
        ("moe/layer.py", "from turnout.dispatch import Plan", 1),
        ("moe/layer.py", "from dispatch.plan import Plan\nimport tests.reference", 2),
        ("moe/gates/topk.py", "from ..routing import Routing\nfrom ...dispatch import Plan\nfrom .base import Gate", 0),
        ("dispatch/reorder.py", "from ..cuda.kernels import launch\nimport cuda.pathfinder", 0),
    ],
)
def test_the_import_rule_sees(path, source, finds):
    assert len(wrong_imports(path, source)) == finds


@each(SOURCES)
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, the limit is {MAX_LINES}: is there a second idea inside?"


@each(GATES)
def test_a_gate_is_one_small_file(path):
    lines = code_lines(path.read_text())
    assert lines < MAX_GATE, f"{lines} lines of code, {MAX_GATE} are too many for a gate"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('"""A.\n\nB."""\nimport a\nfrom b import (\n    c,\n)\n\nx = [\n    1,  # one\n]\n# no\n', 3),
        ('class A:\n    """B."""\n\n    def f(self) -> str:\n        """C."""\n        return """a\n\nb"""\n', 5),
    ],
)
def test_lines_of_code_are_counted(source, lines):
    assert code_lines(source) == lines


@each(MODULES)
def test_nothing_reads_the_environment(path):
    lines = environment_reads(path.read_text())
    allowed = name(path) in MAY_READ_ENVIRONMENT
    assert allowed or not lines, f"environment in lines {lines}: take an argument instead"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import os\nos.environ['A']", [2]),
        ("from os import environ as e", [1]),
        ("import os\nx = os.getenv('A')", [2]),
        ("import os\nos.path.join('environ')", []),
    ],
)
def test_the_environment_rule_sees(source, lines):
    assert environment_reads(source) == lines


@each([path for path in MODULES if path.stem != "torch_internals"])
def test_private_names_of_torch_are_in_one_file(path):
    assert private_torch(path.read_text()) == [], "add it to dispatch/torch_internals.py, with the reason"


def test_the_rule_of_private_names_sees():
    source = "import torch\nfrom torch._C import a\nfrom torch.x import _b\ntorch.y._c.d()\nself._e\ntorch.__doc__\n"
    assert private_torch(source) == [2, 3, 4]


@each([ROOT / "__init__.py", *MODULES])
def test_public_names_have_docstrings(path):
    assert undocumented(path.read_text()) == []


def test_the_docstring_rule_sees():
    source = (
        "class A:\n  '''.'''\n  def f(self): ...\n  def _g(self): ...\n  @f.setter\n  def f(self, x): ...\ndef h(): ..."
    )
    assert undocumented(source) == ["module", "A.f", "h"]


@each([path for path in MODULES if ">>>" in path.read_text()])
def test_docstring_examples_run(path):
    # Not pytest --doctest-modules: with the root as the package it imports a second copy of every module.
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(["turnout", *(part for part in parts if part != "__init__")]))
    failed, attempted = doctest.testmod(module)
    assert attempted > 0, "the examples are not in docstrings"
    assert failed == 0


def test_only_the_package_itself_lies_at_the_root():
    # Any other .py there would ship inside the package: conftest lives in tests/.
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_cuda_is_not_a_package_by_itself():
    # With __init__.py, whatever runs at the root would import ours in place of NVIDIA's `cuda`, which CuPy needs.
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    places = {path.parent for path in MODULES} | {ROOT / "cuda"}
    folders = {".".join(["turnout", *place.relative_to(ROOT).parts]): name(place) for place in places}
    folders["turnout"] = "."
    assert set(config["options"]["packages"].split()) == set(folders)
    lines = config["options"]["package_dir"].strip().splitlines()
    assert dict(tuple(part.strip() for part in line.split("=")) for line in lines) == folders


@each(sorted({path.parent for path in MODULES} - {ROOT / "cuda"}))
def test_packages_have_an_init(path):
    assert (path / "__init__.py").exists()
