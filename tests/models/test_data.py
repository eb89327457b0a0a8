"""Token shards: what is written is read, in an order that seed and step give; what is wrong is named."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turnout.models.data import Batches, DataError, HeldOut, Prefetcher, Source, prepare
from turnout.models.data.__main__ import main
from turnout.models.data.order import permuted, shares
from turnout.models.data.shards import Shard, write_header
from turnout.models.data.writing_shards import ShardWriter


def texts(folder: Path, number: int = 300) -> Path:
    """JSONL of documents of different lengths, each of its own number."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"document {i} é " * (i % 7 + 1)}) for i in range(number)]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("data")
    return prepare(folder / "shards", [texts(folder / "text")], shard_tokens=5000)


# ---- the format


def test_documents_come_back_and_some_are_held_out(source):
    assert len(source.train.shards) > 2
    number = {name: sum(s.documents for s in getattr(source, name).shards) for name in ("train", "held_out")}
    assert sum(number.values()) == 300
    assert 5 < number["held_out"] < 40
    found = [bytes(source.document(i, name).tolist()).decode() for name, many in number.items() for i in range(many)]
    assert sorted(found) == sorted(f"document {i} é " * (i % 7 + 1) for i in range(300))
    for tokens in (source.train, source.held_out):
        ids = tokens.read(0, len(tokens))
        assert (ids == source.eod).sum() == sum(shard.documents for shard in tokens.shards)
        assert len(tokens) == tokens.bytes + (ids == source.eod).sum()
    with pytest.raises(IndexError):
        source.document(number["train"])


def test_numpy_maps_the_files(source):
    (shard, *_), folder = source.train.shards, source.folder
    ids = np.memmap(folder / f"{shard.name}.tokens", "<u2", mode="r")
    places = np.memmap(folder / f"{shard.name}.documents", "<u8", mode="r")
    assert (ids[places] == source.eod).all()
    assert source.train.read(7, 90).tolist() == ids[7:97].tolist()


def test_too_few_documents_to_split_are_each_cut(tmp_path):
    (tmp_path / "one.txt").write_text("abcdefghijklmnop" * 10)
    source = prepare(tmp_path / "out", [tmp_path / "one.txt"])
    assert (len(source.train), len(source.held_out)) == (151, 11)


def test_large_vocabularies_take_four_bytes(tmp_path):
    with ShardWriter("train", tmp_path, "<u4", eod=0, shard_tokens=100) as writer:
        writer.add([70_000, 1], text_bytes=9)
    write_header(tmp_path, {"train": writer.shards, "held_out": []}, tokenizer="x", vocab=70_001, eod=0, dtype="<u4")
    assert Source.open(tmp_path).train.read(0, 3).tolist() == [0, 70_000, 1]


# ---- the order


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_a_permutation_without_memory(size, key):
    assert sorted(permuted(np.arange(size), size, [key]).tolist()) == list(range(size))


def test_keys_give_other_permutations_and_no_pattern():
    one, other = (permuted(np.arange(10_000), 10_000, [0, 0, epoch]) for epoch in (0, 1))
    assert (one == other).sum() < 20
    assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.05


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 2**40))
def test_each_source_has_its_share_of_any_rows(weights, start):
    source, number = shares(np.arange(start, start + 500), weights)
    for index, weight in enumerate(weights):
        mine = number[source == index]
        assert (np.diff(mine) == 1).all()  # as if counted from the first row on
        share = weight / sum(weights)
        assert abs(len(mine) - 500 * share) < 2 + len(weights)
    if start < 2**20:
        assert abs(number[source == 0][:1] - start * weights[0] / sum(weights)).sum() < 3


def test_an_epoch_has_each_row_once_and_is_cut_elsewhere(source):
    batches = Batches([(source, 1.0)], 32, seed=3, batch=1)
    (rows,) = batches.rows
    epochs = [batches._starts(0, np.arange(rows) + epoch * rows) for epoch in (0, 1)]
    for starts in epochs:
        assert len(set(starts.tolist())) == rows
        assert set(np.diff(np.sort(starts)).tolist()) == {32}
        assert starts.min() < 32
        assert starts.max() + 33 <= len(source.train)
    assert {int(starts[0] % 32) for starts in epochs} != {int(epochs[0][0] % 32)}
    assert (np.sort(epochs[0]) != epochs[0]).any()


def test_a_batch_depends_on_seed_and_step_alone(source):
    sources = [(source, 2.0), (source, 1.0)]
    whole = Batches(sources, 16, seed=1, batch=12)
    steps = [whole(step) for step in range(5)]
    assert steps[0].dtype == torch.int64
    assert torch.equal(Batches(sources, 16, seed=1, batch=12)(4), steps[4])  # without the steps before
    assert not torch.equal(Batches(sources, 16, seed=2, batch=12)(4), steps[4])
    for ranks, micro_batches in ((2, 1), (3, 2), (1, 4)):
        parts = [
            Batches(sources, 16, seed=1, batch=12, rank=r, ranks=ranks, micro_batches=micro_batches)(4).chunk(
                micro_batches
            )
            for r in range(ranks)
        ]
        found = [torch.cat([part[m] for part in parts]) for m in range(micro_batches)]
        assert torch.equal(torch.cat(found), steps[4])
    assert whole.passes(10)[0] == pytest.approx(10 * 12 * 2 / 3 / whole.rows[0])


def test_held_out_rows_are_spread_and_do_not_depend_on_ranks(source):
    held_out = HeldOut([(source, 1.0)], 16)
    whole = held_out(8)
    assert torch.equal(whole[0], torch.from_numpy(source.held_out.read(0, 17)))
    assert torch.equal(whole[-1], torch.from_numpy(source.held_out.read(len(source.held_out) - 17, 17)))
    assert torch.equal(torch.stack([held_out(8, r, 2) for r in range(2)], 1).flatten(0, 1), whole)
    assert 0.9 < held_out.bytes_per_token < 1


def test_a_thread_reads_ahead_and_its_errors_arrive():
    asked = []

    def read(step: int) -> torch.Tensor:
        asked.append(step)
        if step == 3:
            raise DataError("torn")
        return torch.tensor(step)

    with Prefetcher(read, end=6) as batch:
        assert int(batch(1)) == 1
        while len(asked) < 3:
            time.sleep(0.001)
        assert asked[:3] == [1, 2, 3]
        assert int(batch(2)) == 2
        with pytest.raises(DataError, match="torn"):
            batch(3)
        assert int(batch(0)) == 0  # any other


# ---- what is wrong


def test_a_hundred_gigabytes_open_at_once_in_flat_memory(tmp_path):
    tokens = 50 * 10**9
    shards = []
    for index in range(5):
        with open(tmp_path / f"train-{index:05}.tokens", "wb") as file:
            try:
                file.truncate(tokens // 5 * 2)
            except OSError:
                pytest.skip("no sparse files here")
        with open(tmp_path / f"train-{index:05}.documents", "wb") as file:
            file.truncate(10**8 * 8)
        modified = (tmp_path / f"train-{index:05}.tokens").stat().st_mtime_ns
        shards.append(Shard(f"train-{index:05}", tokens // 5, 10**8, tokens // 5, "", "", modified))
    write_header(tmp_path, {"train": shards, "held_out": []}, tokenizer="bytes", vocab=256, eod=0, dtype="<u2")
    begun, before = time.perf_counter(), resident()
    source = Source.open(tmp_path)
    source.check()
    batches = Batches([(source, 1.0)], 4096, seed=0, batch=64)
    batches(0)
    assert time.perf_counter() - begun < 2
    read = sum(batches(step).numel() for step in range(10**6, 10**6 + 10))
    assert read > 2 * 10**6
    assert resident() - before < 30 * 2**20


def resident() -> int:
    """Bytes of memory that this process has, pages of files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def copy(tmp_path) -> Path:
    prepare(tmp_path / "out", [texts(tmp_path / "text")])
    return tmp_path / "out"


def altered(file: Path, keep_time: bool = False) -> None:
    time_ns, data = file.stat().st_mtime_ns, bytearray(file.read_bytes())
    data[100:102] = b"\xff\xff"
    file.write_bytes(data)
    os.utime(file, ns=(time_ns, time_ns + (0 if keep_time else 10**9)))


def test_torn_missing_and_changed_shards_are_named(copy):
    file = copy / "train-00000.tokens"
    altered(file)
    source = Source.open(copy)
    with pytest.raises(DataError, match=r"train-00000.tokens has changed since it was prepared"):
        source.check()
    source.check(part=1, parts=2)  # another rank's
    assert main(["verify", str(copy)]) == 2
    with pytest.raises(DataError, match=r"train-00000.tokens has token 65535 at 50, outside its vocabulary of 256"):
        source.train.read(20, 60)
    os.truncate(file, 60)
    with pytest.raises(DataError, match=r"train-00000.tokens has become shorter"):
        source.train.read(20, 60)
    with pytest.raises(DataError, match=r"train-00000.tokens is torn: it has 60 bytes of"):
        Source.open(copy)
    file.unlink()
    with pytest.raises(DataError, match=r"train-00000.tokens is missing"):
        Source.open(copy)


def test_a_copy_with_other_times_is_the_same_data(copy):
    before = Source.open(copy).fingerprint
    os.utime(copy / "train-00000.tokens")
    source = Source.open(copy)
    source.check()
    assert source.fingerprint == before
    altered(copy / "train-00000.tokens", keep_time=True)  # only `verify` looks
    assert main(["verify", str(copy)]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{}", "no header of the format"),
        (None, "has no header.json"),
        ('{"format": "turnout tokens 1", "splits": {"train": [], "held_out": []}}', "is damaged .KeyError"),
        (
            '{"format": "turnout tokens 1", "splits": {"train": [{"name": "t"}], "held_out": []}}',
            "is damaged .TypeError",
        ),
    ],
)
def test_headers_that_are_wrong(copy, text, message):
    (copy / "header.json").unlink() if text is None else (copy / "header.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Source.open(copy)


def test_mixtures_that_do_not_fit(source, tmp_path):
    pytest.importorskip("tokenizers")
    other = prepare(tmp_path / "other", [texts(tmp_path / "text")], "bpe:300")
    with pytest.raises(DataError, match="has another vocabulary than"):
        Batches([(source, 1.0), (other, 1.0)], 16, seed=0, batch=4)
    with pytest.raises(DataError, match="has too little text to hold out for sequences of 4096 tokens"):
        HeldOut([(source, 1.0)], 4096)
    with pytest.raises(DataError, match="positive weights"):
        HeldOut([(source, 0.0)], 16)


def test_preparing_refuses_what_it_cannot_use(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": "no"}\n')
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": "\xff"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image").write_bytes(b"\xff\xfe")
    out = str(tmp_path / "out")
    for flags, message in (
        ([str(tmp_path / "bad.jsonl")], "bad.jsonl, line 2, is no JSON object with a text under 'text'"),
        ([str(tmp_path / "bytes.jsonl")], "bytes.jsonl, line 3, is no JSON object"),
        ([str(tmp_path / "deep.jsonl")], "deep.jsonl, line 1, is no JSON object"),
        ([str(tmp_path / "empty.txt"), "--shard-tokens", "0"], "--shard-tokens must be positive; got 0"),
        ([str(tmp_path / "no")], "there is no such file or folder"),
        ([str(tmp_path / "empty.txt"), str(tmp_path / "image")], "there is no text in"),
        ([str(tmp_path), "--tokenizer", "bpe:9"], "257 tokens or more"),
        ([str(tmp_path), "--tokenizer", "words"], "words is no tokenizer"),
    ):
        assert main(["prepare", out, *flags]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["prepare", out, str(texts(tmp_path / "text"))]) == 0
    assert "300" not in capsys.readouterr().err
    assert main(["prepare", out, str(tmp_path / "text")]) == 2
    assert "exists" in capsys.readouterr().err


# ---- subwords


def test_subwords_are_trained_saved_and_read(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    folder = texts(tmp_path / "text")
    with open(folder / "all.jsonl", "a") as file:
        file.write(json.dumps({"text": "<|endoftext|> is ordinary text, \0 too"}) + "\n")
    one = prepare(tmp_path / "one", [folder], "bpe:320")
    assert (one.vocab, one.eod) == (320, 0)
    assert one.train.bytes / len(one.train) > 2
    for tokens in (one.train, one.held_out):
        ids = tokens.read(0, len(tokens))
        assert ids.max() < 320
        assert (ids == 0).sum() == sum(shard.documents for shard in tokens.shards)  # no text ends a document
    again = prepare(tmp_path / "two", [folder], str(tmp_path / "one"))  # its tokenizer.json
    assert [s.sha256 for s in again.train.shards] == [s.sha256 for s in one.train.shards]
    assert main(["show", str(tmp_path / "one"), "--document", "0"]) == 0
    assert capsys.readouterr().out.startswith("document 0 é")
    assert (
        main(["prepare", str(tmp_path / "x"), str(folder), "--tokenizer", str(tmp_path / "one"), "--eod", "</s>"]) == 2
    )
    assert "the tokenizer has no token </s>" in capsys.readouterr().err
