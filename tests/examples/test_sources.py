"""The data of the main job: prepared folders and their weights, subwords, and what is refused before the first step."""

import math
import os
import shutil
from pathlib import Path

import options
import pytest
import ranks
import sources
from log import read
from main_job import ROOT, result, run
from turnout.dispatch import Meshes
from turnout.models import report
from turnout.models.data import Source, prepare


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text) -> tuple[str, str]:
    out = tmp_path_factory.mktemp("tokens")
    pytest.importorskip("tokenizers")
    prepare(out / "a", [text], "bpe:280")
    prepare(out / "b", [ROOT / "LICENSE"], str(out / "a"))
    return str(out / "a"), str(out / "b")


@pytest.mark.slow
def test_sources_and_weights_on_any_mesh(tmp_path, folders):
    a, b = folders
    flags = ("--steps", "4", "--log-every", "2", "--data", f"{a}:3", f"{b}:1")
    one = result(run(tmp_path / "one", *flags))
    many = result(run(tmp_path / "many", *flags, "--pp", "2", "--micro-batches", "2", ranks=2))
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert many["val_bpb"] == pytest.approx(one["val_bpb"], rel=1e-4)
    start, *events = read(tmp_path / "one" / "log.jsonl")
    assert start["job"]["vocab"] == 280
    assert start["bytes_per_token"] > 1.5
    nats = next(event["loss"] for event in events if event["event"] == "step")
    log = report.log.read(tmp_path / "one" / "log.jsonl")
    assert log.steps[0].loss == pytest.approx(nats / start["bytes_per_token"])  # the report's is in nats per byte
    assert one["val_bpb"] < 1.2 * math.log2(280) / start["bytes_per_token"]  # bits of a token, over its bytes
    assert (tmp_path / "one" / "tokenizer.json").exists()
    other = run(tmp_path / "one", *flags[:-1], f"{b}:2", "--resume")
    assert other.returncode == 2
    assert "the data of --data (its tokens or weights differ)" in other.stderr


@pytest.mark.slow
def test_a_shard_that_changed_is_named_before_the_first_step(tmp_path, folders):
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    file = next(copy.glob("train-*.tokens"))
    assert result(run(tmp_path / "out", "--steps", "1", "--data", str(copy)))["steps"] == 1
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    done = run(tmp_path / "out", "--steps", "2", "--data", str(copy), "--resume", ranks=2)
    assert done.codes == [2, 2]
    assert done.stderr.count(f"{file} has changed since it was prepared") == 1
    os.truncate(file, 20)
    assert f"{file} is torn" in run(tmp_path / "out", "--steps", "2", "--data", str(copy), "--resume").stderr


@pytest.mark.slow
def test_more_passes_than_epochs_are_refused(tmp_path, folders):
    flags = ("--steps", "9000", "--data", folders[0])
    done = run(tmp_path, *flags, "--epochs", "4", ranks=2)
    assert done.codes == [2, 2]
    rows = len(Source.open(folders[0]).train) // 16 - 1
    assert (
        f"9000 steps pass {9000 * 4 / rows:,.1f} times over {folders[0]}, more often than --epochs (4)" in done.stderr
    )
    assert not list(Path(tmp_path).glob("step-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data {a}:1 {b}", "give a weight to every folder"),
        ("--data {a} {text}", "takes prepared folders, which may have weights, or text without weights"),
        ("--data {text}:2", "or text without weights"),
        ("--data {a} --vocab 100", r"--vocab \(100\) must be at least 280"),
        ("--data {a} --tokenizer bpe:300", "is for text, and --data is prepared"),
        ("--data {a} --eod 7", r"--eod \(7\) must be \d, the token that begins a document"),
        ("--data {a}:0", "weights must be positive numbers; got 0"),
        ("--data {a}:nan {b}:1", "weights must be positive numbers; got nan"),
        ("--data no/such", "there is no such file or folder"),
        ("--tokenizer words", "words is no tokenizer"),
    ],
)
def test_flags_that_do_not_fit(folders, text, flags, message):
    given = flags.format(a=folders[0], b=folders[1], text=text).split()
    with pytest.raises(ValueError, match=message):
        sources.with_vocabulary(options.parse(given))


def test_an_evaluation_does_not_read_the_held_out_text_over_and_over(tmp_path, text):
    source = prepare(tmp_path / "text", [text], "bytes")
    there = len(source.held_out) // 16

    def held_out(size: int) -> int:
        job = options.parse(["--seq", "16", "--eval-size", str(size)])
        return len(sources.Data([(source, 1.0)], "").held_out(job, Meshes.of("cpu")).tokens)

    assert ranks.run(1, held_out, 4 * there) == [4 * there]
    (error,) = ranks.errors(1, held_out, 4 * there + 1)
    assert error.startswith(
        f"DataError: --eval-size ({4 * there + 1:,}) must be at most {4 * there:,}: the held-out text"
    )


def test_the_vocabulary_comes_from_the_data(folders):
    assert sources.with_vocabulary(options.parse([])).config().eod == 0
    job = sources.with_vocabulary(options.parse(["--data", folders[0], "--vocab", "320"]))
    assert (job.config().vocab, job.config().eod) == (320, Source.open(folders[0]).eod)
    assert sources.with_vocabulary(options.parse(["--join-documents"])).config().eod is None
    assert options.parse([]).config().eod is None  # of runs before there were documents
    assert sources.with_vocabulary(options.parse(["--tokenizer", "bpe:512"])).config().vocab == 512


@pytest.mark.parametrize(("name", "ranks"), [("one_node", 8), ("cluster", 512)])
def test_large_configurations_name_data_for_a_few_passes(name, ranks):
    job = options.parse(["--config", str(ROOT / "examples" / "configs" / f"{name}.toml"), "--plan"])
    job = sources.with_vocabulary(job).fit(ranks)
    tokens = {"fineweb_edu_10bt": 10e9, "fineweb_edu_100bt": 100e9}[Path(job.data[0]).name]
    assert 0.5 < job.steps * job.batch * job.seq / tokens < job.epochs == 4
