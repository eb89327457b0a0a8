"""The main job: what it prints and writes, alike on one rank and two, resumed, and its errors."""

import shutil
from pathlib import Path

import pytest
from log import read
from main_job import ROOT, result, run
from scripts import script


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, text) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("one")
    return result(run(out, "--steps", "6", "--data", text)), out


@pytest.mark.slow
def test_prints_its_figures_and_draws_its_report(one_rank):
    figures, out = one_rank
    assert {"steps", "loss", "val_bpb", "tokens_per_s"} <= figures.keys()
    assert figures["steps"] == 6
    assert 0 < figures["val_bpb"] < 8.5
    assert 'class="state done"' in (out / "report.html").read_text()
    assert not (out / "log.json").exists()
    assert (out / "step-6").is_dir()


@pytest.mark.slow
def test_logs_a_line_every_few_steps(tmp_path, text, one_rank):
    """In a file and, where standard error is no terminal, there; a loss is the mean since the line before."""
    flags = ("--steps", "6", "--data", text, "--pp", "2")
    each, some = (run(tmp_path / n, *flags, "--log-every", n, ranks=2) for n in "14")
    assert result(some)["loss"] != result(each)["loss"]
    lines = {n: [event for event in read(tmp_path / n / "log.jsonl") if event["event"] == "step"] for n in "14"}
    losses = [line["loss"] for line in lines["1"]]
    assert [line["step"] for line in lines["4"]] == [4, 6]
    assert [line["loss"] for line in lines["4"]] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2], rel=1e-4)
    for line, single in zip(lines["4"], (lines["1"][:4], lines["1"][4:]), strict=True):
        assert line["tokens"] == [[sum(n) for n in zip(*(each["tokens"][0] for each in single), strict=True)]]
        assert line["imbalance"] == [max(line["tokens"][0]) * 4 / sum(line["tokens"][0])]
        assert line["dropped"] == [0.0]
    assert lines["4"][0].keys() == {
        *("event", "time", "step", "loss", "lr", "gradient_norm", "tokens_per_s", "tflops_per_s", "memory_bytes"),
        *("sent_bytes", "skipped", "dropped", "imbalance", "tokens"),
    }
    head, *said = some.stderr.splitlines()
    assert head.startswith("GPT of 2 blocks (4 experts, top 2), ")
    assert head.endswith("cpu, ranks 2: pp 2, dp 1, tp 1, ep 1, etp 1; steps 1 to 6")
    assert [line.partition(":")[0] for line in said] == ["step 4 of 6", "step 6 of 6", "report"]
    assert said[-1] == f"report: {tmp_path / '4' / 'report.html'}; log: {tmp_path / '4' / 'log.jsonl'}"


@pytest.mark.slow
def test_a_report_that_cannot_be_made_fails_no_job(tmp_path, text):
    (tmp_path / "report.html").mkdir()
    done = run(tmp_path, "--steps", "1", "--data", text)
    assert result(done)["steps"] == 1
    assert "report: none, " in done.stderr


@pytest.mark.slow
def test_two_ranks_learn_the_same_and_one_goes_on_with_it(tmp_path, text, one_rank):
    whole, _ = one_rank
    two = result(run(tmp_path / "two", "--steps", "6", "--data", text, ranks=2))
    assert two["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert two["val_bpb"] == pytest.approx(whole["val_bpb"], rel=1e-4)
    assert two["ranks"] == 2

    more = tmp_path / "more"
    result(run(more, "--steps", "6", "--data", text, "--save-every", "3", ranks=2))
    for path in (more / "step-6").iterdir():  # as if it had been stopped after step 3
        path.unlink()
    (more / "step-6").rmdir()
    resumed = result(run(more, "--steps", "6", "--data", text, "--resume"))
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert resumed["val_bpb"] == pytest.approx(whole["val_bpb"], rel=1e-4)


@pytest.mark.slow
def test_a_mesh_of_other_axes_goes_on_with_it(tmp_path, text, one_rank):
    whole, _ = one_rank
    flags = ("--steps", "6", "--data", text, "--micro-batches", "2")
    many = result(run(tmp_path, *flags, "--pp", "2", "--tp", "2", "--ep", "2", "--save-every", "3", ranks=4))
    assert many["mesh"] == {"pp": 2, "tp": 2, "ep": 2, "etp": 1}
    assert {"pp send", "tp all_gather", "ep all_to_all"} <= many["sent_bytes"].keys()
    shutil.rmtree(tmp_path / "step-6")  # as if it had been stopped after step 3
    fewer = result(run(tmp_path, *flags, "--data-parallel", "zero1", "--peak-tflops", "1", "--resume", ranks=2))
    assert 0 < fewer["mfu"] == pytest.approx(fewer["tflops_per_s"] / 2)
    for figures in (many, fewer):
        assert figures["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert figures["val_bpb"] == pytest.approx(whole["val_bpb"], rel=1e-4)


@pytest.mark.slow
def test_rows_in_chunks_and_in_fewer_bytes_teach_the_same(tmp_path, text, one_rank):
    whole, _ = one_rank
    flags = ("--overlap", "2", "--wire", "bf16")
    other = result(run(tmp_path / "other", "--steps", "6", "--data", text, *flags, ranks=2))
    assert other["loss"] == pytest.approx(whole["loss"], rel=1e-2)
    assert other["loss"] != pytest.approx(whole["loss"], rel=1e-7)  # rows were rounded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ep", "3"], "must be a multiple of 3"),
        (["--data", "no/such/folder"], "there is no such file"),
        (["--resume"], "there is no checkpoint"),
        (["--steps", "0"], "--steps must be positive"),
        (["--lr", "nan"], "--lr must be positive; got nan"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
        (["--config", "no/such/file"], "No such file"),
    ],
)
def test_errors_say_once_what_is_wrong(tmp_path, flags, message):
    done = run(tmp_path, *flags, ranks=2)
    assert done.codes == [2, 2]
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_errors_without_torchrun(tmp_path, text):
    done = run(tmp_path, "--data", text, "--dim", "15")
    assert done.returncode == 2
    assert "--dim (15) must be a multiple of 4 = 2 x heads" in done.stderr


@pytest.mark.slow
def test_help_is_shown_once():
    done = script(ROOT / "examples" / "pretrain.py", "--help", ranks=2)
    assert done.codes == [0, 0]
    assert done.stdout.count("steps between two evaluations (default: 50)") == 1
