"""Heat maps of expert load, as small PNGs. An even load is transparent, so they fit light and dark themes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.image import imsave

from .log import Step

COLUMNS = 160  # most columns of a map; more log lines are summed
LESS, MORE, NOTHING = (0, 114, 178), (213, 94, 0), (128, 128, 128)  # blue, vermilion: safe for colour-blind readers
LEVELS = 16  # levels of opacity; few, so that files stay small


def load(steps: Sequence[Step], layer: int) -> np.ndarray:
    """Load of a layer's experts over the even share, float64 [experts, columns].

    Columns are evenly spread over the steps. A column without a log line repeats the line that covers it. NaN is where
    no expert got a token.
    """
    steps = [step for step in steps if layer < len(step.tokens)]
    steps = [step for step in steps if len(step.tokens[layer]) == len(steps[-1].tokens[layer])]  # E may have changed
    counts = np.array([step.tokens[layer] for step in steps], np.float64)
    ends = np.array([step.step for step in steps])
    edges = np.linspace(0, ends[-1], min(len(ends), COLUMNS) + 1).round(6)  # a line on an edge counts to the left
    first, after = np.searchsorted(ends, edges[:-1], "right"), np.searchsorted(ends, edges[1:], "right")
    first = np.minimum(first, len(ends) - 1)
    columns = np.array([counts[a : max(b, a + 1)].sum(0) for a, b in zip(first, after, strict=True)]).T
    total = columns.sum(0)
    return np.divide(columns * len(columns), total, out=np.full(columns.shape, np.nan), where=total > 0)


def picture(share: np.ndarray) -> str:
    """PNG as a data: URI, one pixel per entry: blue is 0, transparent 1, vermilion 2 and more, grey NaN."""
    known = np.isfinite(share)
    off = np.clip(np.where(known, share, 1.5) - 1, -1, 1)
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = np.where(known[..., None], np.where(off[..., None] > 0, MORE, LESS), NOTHING)
    pixels[..., 3] = np.round(np.abs(off) * LEVELS) * 255 // LEVELS
    pixels[pixels[..., 3] == 0] = 0
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
