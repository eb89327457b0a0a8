"""What the main job has trained, read by transformers: the same bits per byte, and the same text."""

import json
import math
from pathlib import Path

import pytest
import torch
from main_job import ROOT, result, run
from scripts import script
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from transformers import AutoModelForCausalLM, AutoTokenizer
from turnout.models.data import HeldOut, Source


def to_hf(out, folder, *flags: str):
    return script(ROOT / "examples" / "to_hf.py", str(out), str(folder), *flags, alone=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text) -> tuple[dict, Path, Path]:
    """What a run printed, its folder, and the model of transformers: of the average of its weights."""
    out, folder = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("hf") / "model"
    flags = ["--qk-norm", "--untied", "--kv-heads", "1", "--steps", "4", "--optimizer", "muon", "--ema", "0.5"]
    figures = result(run(out, *flags, "--data", text, ranks=2))
    done = to_hf(out, folder)
    assert done.returncode == 0, done.stderr
    assert "from_pretrained" in done.stderr
    return figures, out, folder


def test_transformers_finds_what_the_job_found(trained, text):
    figures, out, folder = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    (shards,) = (out / "data").iterdir()
    held_out = HeldOut([(Source.open(shards), 1.0)], 16)
    tokens = held_out(4)
    assert not (tokens[:, 1:-1] == held_out.eod).any()  # transformers attends to other documents as well
    with torch.no_grad():
        loss = cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    bits = float(loss) / math.log(2) / held_out.bytes_per_token
    assert bits == pytest.approx(figures["val_bpb"], rel=1e-5)
    assert model.config.eos_token_id == held_out.eod == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("fox").input_ids == list(b"fox")


def test_two_ranks_write_what_transformers_writes(trained):
    """With a cache of ours and experts on two ranks, against the whole sequence at each step."""
    _, out, folder = trained
    flags = ["--prompt", "lazy dog", "--temperature", "0", "--samples", "2"]
    done = script(ROOT / "examples" / "generate.py", str(out), *flags, ranks=2)
    assert done.codes == [0, 0], done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([list(b"lazy dog")])
    with torch.no_grad():
        while tokens.shape[1] < 16:
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    written = bytes(tokens[0].tolist()).decode(errors="replace")
    assert done.stdout == f"{written}\n\n{written}\n"


def test_a_prompt_that_is_too_long_is_refused(trained):
    flags = ["--prompt", "the quick brown fox"]
    done = script(ROOT / "examples" / "generate.py", str(trained[1]), *flags, alone=True)
    assert done.returncode == 1
    said = "a prompt of 19 tokens and length=-3 must fit into seq_len=16: shorten the prompt or the length\n"
    assert done.stderr.endswith(said)
    assert "Traceback" not in done.stderr


def test_a_setting_that_no_family_has_is_named(tmp_path, text):
    run(tmp_path / "run", "--moe-every", "1", "--capacity-factor", "1.25", "--steps", "1", "--data", text)
    done = to_hf(tmp_path / "run", tmp_path / "model")
    assert done.returncode == 1
    assert "Capacity(factor=1.25" in done.stderr
    assert done.stderr.count("rank 0: ") == 1
    assert not (tmp_path / "model").exists()
    assert to_hf(tmp_path / "run", tmp_path / "model", "--dropless").returncode == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "mixtral"
