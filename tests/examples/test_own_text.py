"""The page docs/guides/own_text.md: its five commands run in order, on a small text and a smaller model."""

import re
import shlex

import pytest
from main_job import ROOT, result
from scripts import script
from turnout.models.data.__main__ import main

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from transformers import Qwen3MoeForCausalLM  # noqa: F401  forked ranks need not import it

PAGE = (ROOT / "docs" / "guides" / "own_text.md").read_text()
SMALLER = {"steps": 4, "batch": 4, "seq": 16, "dim": 16, "layers": 2, "heads": 2, "hidden": 16}
OTHERS = "experts = 4\neval-size = 4\neval-every = 2\nsave-every = 4\nepochs = 1000\n"


def block(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def smaller(config: str) -> str:
    """The page's configuration with sizes that take seconds."""
    lines = [line for line in config.splitlines() if line.split(" = ")[0] not in ("eval-every", "save-every")]
    values = [line.partition(" = ")[::2] for line in lines]
    return "".join(f"{key} = {SMALLER.get(key, value)}\n" for key, value in values) + OTHERS


@pytest.mark.slow
def test_its_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text").mkdir()
    for i in range(300):
        (tmp_path / "my_text" / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 4 + str(i))
    (config,), commands = block("toml"), [line for text in block("sh") for line in text.splitlines()]
    (tmp_path / "mine.toml").write_text(smaller(config))
    prepare, plan, one, four, resume, export = map(shlex.split, commands)

    assert prepare[:4] == ["python", "-m", "turnout.models.data", "prepare"]
    assert main([word.replace("bpe:4096", "bpe:300") for word in prepare[3:]]) == 0
    assert "300 token ids, subwords" in capsys.readouterr().out
    assert "times over the" in started(plan).stdout
    alone, many = result(started(one)), result(started(four))
    assert (alone["ranks"], many["ranks"]) == (1, 4)
    assert many["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert many["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-4)
    assert resume[resume.index("--steps") + 1] == "600"
    again = started([word.replace("600", "6") for word in resume])
    assert "resuming after step 4" in again.stderr
    assert result(again)["steps"] == 6
    assert started(export).returncode == 0
    (generate,) = block("py")
    exec(compile(generate, "own_text.md", "exec"), {})
    assert "The " in capsys.readouterr().out


def started(words: list[str]):
    """A command of the page, on forked ranks."""
    ranks = int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    done = script(ROOT / words[at], *words[at + 1 :], ranks=ranks, alone=words[0] == "python")
    assert done.returncode == 0, done.stderr
    return done
