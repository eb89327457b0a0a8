"""What the main job has trained, read by transformers: the same bits per byte."""

import json
import math

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


def test_transformers_finds_what_the_job_found(tmp_path, text):
    out, flags = tmp_path / "run", ["--qk-norm", "--untied", "--kv-heads", "1", "--steps", "4", "--data", text]
    trained = result(run(out, *flags, ranks=2))
    done = to_hf(out, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "from_pretrained" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (shards,) = (out / "data").iterdir()
    held_out = HeldOut([(Source.open(shards), 1.0)], 16)
    tokens = held_out(4)
    assert not (tokens[:, 1:-1] == held_out.eod).any()  # transformers attends to other documents as well
    with torch.no_grad():
        loss = cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    bits = float(loss) / math.log(2) / held_out.bytes_per_token
    assert bits == pytest.approx(trained["val_bpb"], rel=1e-5)
    assert model.config.eos_token_id == held_out.eod == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("fox").input_ids == list(b"fox")


def test_a_setting_that_no_family_has_is_named(tmp_path, text):
    run(tmp_path / "run", "--moe-every", "1", "--capacity-factor", "1.25", "--steps", "1", "--data", text)
    done = to_hf(tmp_path / "run", tmp_path / "model")
    assert done.returncode == 1
    assert "Capacity(factor=1.25" in done.stderr
    assert not (tmp_path / "model").exists()
    assert to_hf(tmp_path / "run", tmp_path / "model", "--dropless").returncode == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "mixtral"
