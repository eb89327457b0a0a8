"""The command: what it prints, what it refuses, and that it needs neither ranks nor matplotlib."""

import ast
import builtins
import json
import time
from pathlib import Path

import pytest
from turnout.models.planner.__main__ import architecture, main, parser
from turnout.models.planner.job_file import JobFile, toml
from turnout.models.planner.layout import Layout

MODELS = Path(__file__).parents[2] / "models"
GPT3_ANYHOW = "--cluster selene --layers 96 --dim 12288 --heads 96 --gpus 1024 --batch 1536"
GPT3 = f"{GPT3_ANYHOW} --tp 8 --pp 8"
DEEPSEEK = (
    "--cluster h100 --layers 61 --dim 7168 --heads 128 --ffn 18432 --vocab 129280 --seq 4096 --experts 256 --top-k 8 "
    "--hidden 2048 --moe-every 1 --shared 1 --batch 16384"
)
KEYS = {
    *("seconds_per_step", "tflops_per_gpu", "mfu", "tokens_per_s", "memory_bytes", "bubble", "micro_batch", "virtual"),
    *("schedule", "breakdown"),
}
PARTS = {"compute", "pipeline_bubble", "tp", "pp", "dp", "ep", "optimizer", "exposed"}


def test_json_is_one_object_and_with_top_a_list(capsys):
    assert main([*GPT3.split(), "--experts", "0", "--vocab", "51200", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert set(one) == KEYS
    assert set(one["breakdown"]) == PARTS
    assert one["tokens_per_s"] == pytest.approx(1536 * 2048 / one["seconds_per_step"])
    assert main([*GPT3.split(), "--json", "--top", "3"]) == 0
    three = json.loads(capsys.readouterr().out)
    assert three[0] == one
    assert len(three) == 3
    assert [each["seconds_per_step"] for each in three] == sorted(each["seconds_per_step"] for each in three)


def test_the_page_says_what_is_best_and_why_others_lost(capsys, tmp_path):
    file, png, timeline = tmp_path / "best.toml", tmp_path / "bar.png", tmp_path / "time.png"
    sizes = "--cluster selene --layers 24 --dim 2048 --heads 16 --gpus 64 --batch 128 --pp 4"
    assert main([*sizes.split(), "--save", str(file), "--png", str(png), "--timeline", str(timeline)]) == 0
    shown = capsys.readouterr().out
    for words in ("| 1 |", "why others lost", "bubble", "tp leaves the node", "| weights |", "| the step |"):
        assert words in shown, words
    assert "examples/multi_node.sh --config" in shown
    assert "sbatch --nodes=8" in shown
    assert file.read_text() in shown
    assert png.stat().st_size > 5000
    assert timeline.stat().st_size > 5000


def test_the_saved_file_is_one_of_the_job(capsys, tmp_path):
    import options

    file = tmp_path / "best.toml"
    given = ["--cluster", "h100", "--config", "examples/configs/one_node.toml", "--gpus", "8"]
    given[3] = str(Path(__file__).parents[2] / given[3])
    assert main([*given, "--save", str(file)]) == 0
    job = options.parse(["--config", str(file)]).fit(8)
    assert (job.dim, job.layers, job.experts, job.batch, job.bf16) == (1024, 12, 32, 256, True)
    assert "ep, micro_batches, data_parallel, recompute are left aside" in capsys.readouterr().err
    for experts in ([], ["--experts", "8", "--hidden", "64", "--capacity", "1.5"]):
        sizes = "--cluster laptop --layers 4 --dim 64 --heads 4 --vocab 256 --seq 64 --gpus 4 --batch 16 --dtype fp32"
        assert main([*sizes.split(), *experts, "--save", str(file)]) == 0
        options.parse(["--config", str(file)]).fit(4)


def test_every_flag_of_the_job_is_known():
    import dataclasses

    import options
    from turnout.models import GPTConfig
    from turnout.models.planner.architecture import Architecture
    from turnout.models.planner.job_file import LAYOUT, MODEL, OTHERS

    known = [*MODEL, *LAYOUT, *OTHERS, "batch", "bf16", "fp16"]
    assert sorted(known) == sorted(field.name for field in dataclasses.fields(options.Job))
    assert Architecture.of(options.Job().config()) == Architecture.of(GPTConfig())  # what a file leaves out


def test_a_job_of_another_model_is_not_planned(tmp_path):
    (tmp_path / "job.toml").write_text('objective = "mlm"\n')
    with pytest.raises(ValueError, match=r"job.toml: objective is mlm, and the planner knows GPTs alone"):
        JobFile.read(tmp_path / "job.toml")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tp 7", "--tp 7"),
        ("--pp 8 --tp 8 --dp 8", "does not divide --gpus"),
        ("--ep 2", "the model has none"),
        ("--virtual 13 --pp 8", "--pp x --virtual = 104"),
        ("--micro-batch 7 --pp 8", "--micro-batch"),
        ("--recompute none --pp 2 --tp 1", "nothing fits into 80 GB"),
        ("--schedule zbv --pp 64 --virtual 2", "cannot fill"),
        ("--kv-heads 5", "--kv-heads (5)"),
        ("--top-k 2", "give --experts"),
        ("--set software.fast=true", "software.fast"),
        ("--cluster frontier", "no such preset"),
        ("--topp 3", "unrecognized"),
        ("--top 0", "--top must be positive"),
        ("--experts 8 --imbalance 0.5", "--imbalance"),
        ("--experts 8 --imbalance nan", "--imbalance"),
        ("--imbalance 1.5", "give --experts"),
        ("--capacity 1.25", "give --experts"),
        ("--experts 8 --capacity -1", "--capacity"),
        ("--experts 8 --shared -1", "--shared"),
        ("--experts 8 --moe-every 0", "--moe-every (0)"),
        ("--experts 8 --moe-every 97", "no block is a mixture"),
        ("--experts 8 --ep 3", "choose a divisor of 8"),
        ("--pp 2 --virtual 99", "cannot fill"),
        ("--set ranks_per_node=0", "ranks_per_node must be positive"),
        ("--set device.memory_share=0", "memory_share must be positive"),
        ("--set device.memory_gb=nan", "device.memory_gb"),
        ("--set device.sms=2.5", "whole number"),
        ("--set between.gbs=0", "gbs must be positive"),
        ("--set fabric.slow=[3]", "write pairs"),
        ("--set software.zero=[7]", "zero must be some of"),
        ("--set software.micro_batches=[0]", "micro_batches must be positive"),
        ("--set software.tp_overlap=1.5", "share in [0, 1]"),
        ("--config none.toml", "none.toml"),
    ],
)
def test_what_does_not_fit_is_named(capsys, flags, words):
    given = f"{GPT3_ANYHOW} --json"
    assert main([*given.split(), *flags.split()]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    assert words in heard.err


def test_flags_beside_a_file_change_its_model_as_the_job_would(tmp_path):
    """Dense blocks of the job are as wide as a token's experts; what the written file builds is what was planned."""
    file = tmp_path / "job.toml"
    sizes = "dim = 64\nheads = 4\nhidden = 128\nlayers = 4\nexperts = 8\ntop-k = 1\nshared = 1\n"
    file.write_text(sizes)

    def model(flags):
        return architecture(parser().parse_args(f"--cluster h100 --gpus 8 --config {file} {flags}".split()))

    assert model("--hidden 256").ffn == model("--top-k 3").ffn == 512
    assert not model("--activation gelu").gated
    assert "without a gate" in toml(model("--activation gelu"), Layout(), 8)
    assert "dense blocks 300 wide" in toml(model("--ffn 300"), Layout(), 8)
    dense = model("--experts 0")
    text = toml(dense, Layout(), 8)
    assert "hidden = 256" in text
    assert "top-k = 1" in text
    file.write_text(text)
    assert model("").parameters == dense.parameters


def test_thousands_of_gpus_in_seconds(capsys):
    start = time.process_time()
    assert main([*DEEPSEEK.split(), "--gpus", "4096", "--json"]) == 0
    assert time.process_time() - start < 20  # 2 s on the machine it was written on
    found = json.loads(capsys.readouterr().out)
    assert 0.2 < found["mfu"] < 0.6
    assert found["breakdown"]["ep"] > 0


def test_uneven_load_and_padding_cost_time(capsys):
    seconds = []
    for extra in ([], ["--imbalance", "1.5"], ["--capacity", "1.25"]):
        assert (
            main([*DEEPSEEK.split(), "--gpus", "1024", "--ep", "8", "--tp", "1", "--pp", "16", "--json", *extra]) == 0
        )
        seconds.append(json.loads(capsys.readouterr().out)["seconds_per_step"])
    assert seconds[0] < seconds[2] < seconds[1]


def test_without_matplotlib_there_is_no_picture_and_a_message(capsys, monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main([*GPT3.split(), "--json", "--png", str(tmp_path / "bar.png")]) == 0
    heard = capsys.readouterr()
    assert set(json.loads(heard.out)) == KEYS
    assert "turnout[train]" in heard.err
    assert not (tmp_path / "bar.png").exists()


def test_models_are_imported_without_the_planner():
    """Importing turnout.models must not take longer for it: no module outside imports it at its top."""
    for path in MODELS.rglob("*.py"):
        if "planner" not in path.parts:
            tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            words = [ast.unparse(node) for node in tops]  # torch's checkpoints have planners as well
            assert not [each for each in words if "planner" in each and "torch.distributed" not in each], path
