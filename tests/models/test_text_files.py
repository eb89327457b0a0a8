"""Text files: which are read, and what of them is text."""

from turnout.models.data import prepare
from turnout.models.data.text_files import files_in


def test_files_of_one_name_are_all_read(tmp_path):
    for parent in ("web", "code"):
        (tmp_path / parent / "text").mkdir(parents=True)
        for number in range(3):
            (tmp_path / parent / "text" / f"{number}.txt").write_text(f"{parent} {number}")
    web, code = (tmp_path / parent / "text" for parent in ("web", "code"))
    assert [name for name, _ in files_in([web])] == ["text/0.txt", "text/1.txt", "text/2.txt"]
    found = files_in([web, code, web])
    assert [path.read_text() for _, path in found] == [f"{p} {n}" for p in ("code", "web") for n in range(3)]
    assert len(dict(found)) == 6


def test_nul_characters_are_no_text(tmp_path):
    (tmp_path / "nul.txt").write_bytes(b"\0" * 9)
    (tmp_path / "some.txt").write_bytes(b"a\0b\0" * 16)
    (tmp_path / "some.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "c\\u0000d"}\r\n')
    source = prepare(tmp_path / "out", [tmp_path / "nul.txt", tmp_path / "some.txt", tmp_path / "some.jsonl"])
    tokens = [*source.train.shards, *source.held_out.shards]
    assert sum(shard.bytes for shard in tokens) == 2 * 16 + 2
    assert sum(shard.tokens - shard.documents for shard in tokens) == 2 * 16 + 2
