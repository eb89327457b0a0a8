"""Heat maps of the experts' load as small PNGs. What is as it should be is transparent, so they fit light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.image import imsave

from .log import Step

COLUMNS = 160  # of a map; more log lines are added up
LESS, MORE, NOTHING = (0, 114, 178), (213, 94, 0), (128, 128, 128)  # blue and vermilion: fit for colour-blind readers
LEVELS = 16  # of opacity: files stay small


def load(steps: Sequence[Step], layer: int) -> np.ndarray:
    """[experts, columns]: share of the tokens over the even share, columns evenly spread over the steps.

    A column without lines shows the line that covers it; NaN where no expert got a token.
    """
    steps = [step for step in steps if layer < len(step.tokens)]
    steps = [step for step in steps if len(step.tokens[layer]) == len(steps[-1].tokens[layer])]  # as the model is now
    counts = np.array([step.tokens[layer] for step in steps], np.float64)
    ends = np.array([step.step for step in steps])
    edges = np.linspace(0, ends[-1], min(len(ends), COLUMNS) + 1).round(6)  # a line on an edge belongs to its left
    first, after = np.searchsorted(ends, edges[:-1], "right"), np.searchsorted(ends, edges[1:], "right")
    first = np.minimum(first, len(ends) - 1)
    columns = np.array([counts[a : max(b, a + 1)].sum(0) for a, b in zip(first, after, strict=True)]).T
    total = columns.sum(0)
    return np.divide(columns * len(columns), total, out=np.full(columns.shape, np.nan), where=total > 0)


def picture(share: np.ndarray) -> str:
    """A data: URI of a PNG with a pixel for each entry: blue 0, transparent 1, vermilion 2 and more, grey NaN."""
    known = np.isfinite(share)
    off = np.clip(np.where(known, share, 1.5) - 1, -1, 1)
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = np.where(known[..., None], np.where(off[..., None] > 0, MORE, LESS), NOTHING)
    pixels[..., 3] = np.round(np.abs(off) * LEVELS) * 255 // LEVELS
    pixels[pixels[..., 3] == 0] = 0
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
