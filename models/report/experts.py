"""Sections on experts: balance and load over the run, and the bytes that each expert specialises in."""

from __future__ import annotations

from collections.abc import Sequence

from .log import HeldOut, Log, Step
from .maps import load, picture
from .panels import balance
from .parts import NONE, Section, details, panel, printable, text

OPEN = 4  # up to so many layers are unfolded; if there are more, only the first one is
SCALE = (
    '<p class="scale"><span>0</span><i></i><span>2 times the even share and more</span>'
    '<i class="nothing"></i><span>no tokens</span></p>'
)


def experts(log: Log) -> list[Section]:
    """Sections on experts; none for a model without MoE layers."""
    newest = next((step for step in reversed(log.steps) if step.tokens), None)
    parts = []
    if newest:
        maps = "".join(heat_map(log.steps, newest, layer) for layer in range(len(newest.tokens)))
        across = f"steps 0 to {newest.step:,} from left to right, experts from top to bottom"
        note = (
            f"Tokens of each expert: {across}. On the right of a title stands the busiest expert of the newest column."
        )
        parts = [
            Section("Balance", balance(log)),
            Section("Load of the experts", f'{SCALE}<div class="grid maps">{maps}</div>', note),
        ]
    evaluation = next((each for each in reversed(log.held_out) if each.bytes), None)
    if evaluation:
        parts.append(specialisation(evaluation))
    return parts


def heat_map(steps: Sequence[Step], newest: Step, layer: int) -> str:
    """HTML of a heat map: load of a layer's experts over the run."""
    share = load(steps, layer)
    name = f"MoE layer {layer + 1}"
    worst = share[:, -1].argmax()
    said = f"expert {worst}: {share[worst, -1]:.2f}" if share[worst, -1] > 0 else ""
    # a whole number of pixels per expert, and about 128 in all
    height = max(1, round(128 / len(share))) * len(share)
    image = (
        f'<img class="map" src="{picture(share)}" style="height:{height}px" '
        f'alt="{text(f"Load of the {len(share)} experts of {name} over the steps up to {newest.step}")}">'
    )
    return panel(name, image, note=said)


def specialisation(evaluation: HeldOut) -> Section:
    """Section with the bytes that each expert of each layer gets most of."""
    layers = evaluation.bytes or []
    html = "\n".join(
        details(
            f"MoE layer {index + 1}",
            f'<div class="experts">{"".join(takes(expert, pairs) for expert, pairs in enumerate(layer))}</div>',
            is_open=index == 0 or len(layers) <= OPEN,
        )
        for index, layer in enumerate(layers)
    )
    note = (
        f"Bytes that each expert gets most above its even share, in the evaluation of step {evaluation.step:,}. A "
        "darker byte has more tokens. ␣ is a space, ⏎ a line feed, ⇥ a tab; two digits are hex."
    )
    return Section("What each expert takes", f'<div class="folded">{html}</div>', note)


def takes(expert: int, pairs: Sequence[Sequence[int]]) -> str:
    """HTML line of an expert's bytes, shaded by their numbers of tokens."""
    most = max((tokens for _, tokens in pairs), default=0)
    signs = "".join(
        f'<i class="s{max(1, -(-4 * tokens // most)) if most else 1}" title="{tokens:,}">{text(printable(byte))}</i>'
        for byte, tokens in pairs
    )
    return f"<p><span>{expert}</span>{signs or NONE}</p>"
