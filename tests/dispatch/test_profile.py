"""The model that chooses a transport: made-up clusters whose answer is known, and files that are no profile."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turnout.dispatch import Profile
from turnout.dispatch.profile import Link, Message

SMALL = Message(tokens=4, row_bytes=256, top_k=2, num_experts=64)
LARGE = Message(tokens=4096, row_bytes=4096, top_k=8, num_experts=64)
FREE, USUAL = Link(0.0, 0.0, 0.0), Link(1e-5, 1e-5, 1e-10)


def cluster(nodes: int = 4, locals: int = 2, inside: Link = USUAL, between: Link = USUAL) -> Profile:
    return Profile(nodes, locals, inside, between)


@pytest.mark.parametrize(
    ("profile", "message", "choice"),
    [
        (cluster(between=Link(0.0, 1e-2, 1e-8)), SMALL, "2dh"),  # messages that cost much
        (cluster(nodes=8, locals=8, between=Link(1e-4, 1e-3, 1e-8)), SMALL, "2dh"),
        (cluster(between=Link(1e-5, 1e-5, 1e-7)), LARGE, "node"),  # a slow link, many picks
        (cluster(between=Link(1e-5, 1e-5, 1e-7)), replace(LARGE, top_k=1), "flat"),  # nothing to deduplicate
        (cluster(inside=Link(1e-3, 1e-3, 1e-8)), LARGE, "flat"),  # a detour inside that is dearer than the way
        (cluster(nodes=1, locals=8), LARGE, "flat"),
        (cluster(nodes=8, locals=1, between=Link(0.0, 1e-2, 1e-7)), LARGE, "flat"),
        (cluster(inside=FREE, between=FREE), LARGE, "flat"),  # no difference: the simplest
    ],
)
def test_the_choice(profile, message, choice):
    assert profile.choose(message) == choice


def test_a_prediction_by_hand():
    """2 x 2 ranks, 4 experts, k = 2: of the 6 pairs of experts 2 lie on one node, so 5/3 nodes are visited."""
    profile = cluster(2, 2, inside=Link(0.0, 3.0, 0.5), between=Link(100.0, 10.0, 1.0))
    found = profile.predict(Message(tokens=6, row_bytes=1, top_k=2, num_experts=4))
    rows = 4 * 6  # bytes of all tokens, four times
    assert found == pytest.approx(
        {
            "flat": 7 * 100 + 7 * 2 * 10 + rows * 2 / 2 + 7 * 3 + rows * 2 / 4 * 0.5,
            "2dh": 7 * 100 + 7 * 10 + rows * 2 / 2 + 7 * 3 + rows * 2 / 2 * 0.5,
            "node": 8 * 100 + 8 * 10 + rows * 5 / 3 / 2 + 7 * 3 + rows * 2 / 2 * 0.5,
        }
    )


def test_visited_nodes_are_counted_as_they_are():
    """The expectation of distinct nodes, against all k-subsets of the experts."""
    nodes, experts, k = 3, 6, 3
    picks = [p for p in product(range(experts), repeat=k) if len(set(p)) == k]
    mean = sum(len({e // 2 for e in p}) for p in picks) / len(picks)
    profile = cluster(nodes, 2, inside=FREE, between=Link(0.0, 0.0, 1.0))
    found = profile.predict(Message(tokens=1, row_bytes=1, top_k=k, num_experts=experts))
    assert found["node"] == pytest.approx(4 * mean * 2 / 3)


SECONDS = st.floats(0, 10, allow_nan=False)
LINKS = st.builds(Link, SECONDS, SECONDS, SECONDS)


@given(st.builds(Profile, st.integers(1, 64), st.integers(1, 64), LINKS, LINKS))
def test_json_round_trip(tmp_path_factory, profile):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile


@pytest.mark.parametrize(
    "change",
    [
        lambda given: "not json",
        lambda given: "[]",
        lambda given: "{}",
        lambda given: json.dumps({**given, "nodes": 0}),
        lambda given: json.dumps({**given, "nodes": 2.5}),
        lambda given: json.dumps({**given, "speed": 1}),
        lambda given: json.dumps({**given, "between": {**given["between"], "byte": -1.0}}),
        lambda given: json.dumps({**given, "between": {**given["between"], "byte": "fast"}}),
        lambda given: json.dumps({**given, "between": {**given["between"], "byte": float("nan")}}),
        lambda given: json.dumps({**given, "inside": {"step": 0.0}}),
        lambda given: json.dumps({**given, "inside": 3}),
    ],
)
def test_what_is_no_profile(tmp_path, change):
    path = tmp_path / "profile.json"
    cluster().save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"profile\.json is not a profile .*; make one with python -m"):
        Profile.load(path)
