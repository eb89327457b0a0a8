"""A trained mixture of experts made smaller: by a dense student, and by fewer experts."""

from __future__ import annotations

import json
from pathlib import Path

import prune
import pytest
import torch
from main_job import ROOT, result, run
from scripts import script
from turnout.models import GPT, GPTConfig

SUBWORDS = ("--tokenizer", "bpe:300")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, text) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("teacher")
    return result(run(out, "--steps", "6", "--lr", "2e-2", "--data", text, *SUBWORDS)), out


def done(example: str, *words: object, ranks: int = 1) -> dict:
    ended = script(ROOT / "examples" / example, *map(str, words), ranks=ranks, alone=ranks == 1)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


STUDENT = ("--steps", 4, "--batch", 4, "--eval-size", 4, "--lr", 2e-2, "--until", 3)


def test_a_student_learns_from_its_teacher(teacher, tmp_path):
    figures, out = teacher
    two = done("distill.py", out, tmp_path, *STUDENT, ranks=2)
    assert two["teacher"] == pytest.approx(figures["val_bpb"], rel=1e-4)
    assert two["after"] < two["before"]
    assert (tmp_path / "step-4").is_dir()
    assert (tmp_path / "tokenizer.json").read_text() == (out / "tokenizer.json").read_text()


@pytest.mark.thorough
def test_a_student_learns_alike_on_one_rank_and_two(teacher, tmp_path):
    one, two = (done("distill.py", teacher[1], tmp_path / str(n), *STUDENT, ranks=n) for n in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)
    again = script(ROOT / "examples" / "distill.py", str(teacher[1]), str(tmp_path / "1"), alone=True)
    assert again.returncode == 1
    assert "holds a checkpoint: name another folder" in again.stderr


def test_fewer_experts_are_compared_and_trained_on(teacher, text, tmp_path):
    figures, out = teacher
    flags = ("--batch", 4, "--eval-size", 4, "--batches", 2, "--experts", 3)
    pruned = done("prune.py", out, tmp_path / "pruned", *flags)
    assert pruned["before"] == pytest.approx(figures["val_bpb"], rel=1e-5)
    assert 0 < pruned["left_out"] < 0.25
    assert pruned["parameters"][1] == pruned["parameters"][0] - 16 - 3 * 16 * 16  # a row of the router, and an expert
    assert (tmp_path / "pruned" / "tokenizer.json").is_file()
    more = run(
        tmp_path / "pruned", "--data", text, *SUBWORDS, "--lr", "2e-2", "--experts", "3", "--steps", "8", "--resume"
    )
    assert result(more)["steps"] == 8
    assert "resuming after step 6" in more.stderr


def test_loads_of_further_tokens_are_counted():
    model = GPT(GPTConfig(dim=16, layers=2, heads=2, hidden=8, num_experts=4, seq_len=8, mtp=1))
    loads = prune.loads_of(model, [torch.randint(256, (3, 9)) for _ in range(2)])
    assert {name: int(tokens.sum()) for name, tokens in loads.items()} == {
        "blocks.1.feed_forward": 2 * 3 * 8 * 2,
        "mtp.0.blocks.0.feed_forward": 2 * 3 * 8 * 2,
    }


@pytest.mark.thorough
def test_numbers_of_experts_that_do_not_fit_are_refused(teacher, tmp_path):
    _, out = teacher
    wrong = script(ROOT / "examples" / "prune.py", str(out), str(tmp_path / "x"), "--experts", "4", alone=True)
    assert wrong.returncode == 1
    assert "--experts (4) must be from 2, --top-k, to 3" in wrong.stderr
    none = ("--experts", "3", "--batches", "0")
    wrong = script(ROOT / "examples" / "prune.py", str(out), str(tmp_path / "x"), *none, alone=True)
    assert wrong.returncode == 1
    assert "--batches must be positive" in wrong.stderr


@pytest.mark.thorough
def test_merged_experts_are_others(teacher, tmp_path):
    flags = ("--batch", 4, "--eval-size", 4, "--batches", 2, "--experts", 2)
    pruned = done("prune.py", teacher[1], tmp_path / "pruned", *flags)
    merged = done("prune.py", teacher[1], tmp_path / "merged", *flags, "--merge")
    assert merged["parameters"] == pruned["parameters"]
    assert merged["after"] != pruned["after"]
