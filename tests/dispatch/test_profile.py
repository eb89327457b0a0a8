"""The model that chooses transport and chunks: made-up clusters whose answer is known, files that are no profile."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turnout.dispatch import Profile
from turnout.dispatch.autoselect.profile import Flop, Link, Message, Work

SMALL = Message(tokens=4, row_bytes=256, top_k=2, num_experts=64)
LARGE = Message(tokens=4096, row_bytes=4096, top_k=8, num_experts=64)
FREE, USUAL, UNKNOWN = Link(0.0, 0.0, 0.0), Link(1e-5, 1e-5, 1e-10), Flop()


def cluster(
    nodes: int = 4, locals: int = 2, inside: Link = USUAL, between: Link = USUAL, flop: Flop = UNKNOWN
) -> Profile:
    return Profile(nodes, locals, inside, between, flop)


@pytest.mark.parametrize(
    ("profile", "message", "choice"),
    [
        (cluster(between=Link(0.0, 1e-2, 1e-8)), SMALL, "2dh"),  # messages that cost much
        (cluster(nodes=8, locals=8, between=Link(1e-4, 1e-3, 1e-8)), SMALL, "2dh"),
        (cluster(between=Link(1e-5, 1e-5, 1e-7)), LARGE, "node in pieces"),  # a slow link, many picks
        (cluster(between=Link(1e-5, 1e-2, 1e-7)), replace(LARGE, tokens=256), "node"),  # and messages that cost much
        (cluster(between=Link(1e-5, 1e-5, 1e-7)), replace(LARGE, top_k=1), "flat"),  # nothing to deduplicate
        (cluster(inside=Link(1e-3, 1e-3, 1e-8)), LARGE, "flat"),  # a detour inside that is dearer than the way
        (cluster(nodes=1, locals=8), LARGE, "flat"),
        (cluster(nodes=8, locals=1, between=Link(0.0, 1e-2, 1e-7)), LARGE, "flat"),
        (cluster(inside=FREE, between=FREE), LARGE, "flat"),  # no difference: the simplest
    ],
)
def test_the_choice(profile, message, choice):
    assert profile.choose(message) == (choice, 1)  # nothing is known of the experts, so there is nothing to hide behind


LONG, PRODUCTS = Link(1e-5, 1e-5, 1e-8), Flop(1e-12)
WORK = replace(LARGE, row_flops=1e7)


@pytest.mark.parametrize(
    ("profile", "message", "degree"),
    [
        (cluster(between=LONG, flop=PRODUCTS), WORK, 4),  # travel and experts both take long
        (
            cluster(between=LONG, flop=PRODUCTS),
            replace(SMALL, row_flops=1e5),
            1,
        ),  # an exchange costs more than its bytes
        (cluster(between=Link(2e-2, 0.0, 1e-8), flop=PRODUCTS), WORK, 2),  # four times the exchanges are too many
        (cluster(inside=FREE, between=FREE, flop=PRODUCTS), WORK, 1),  # there is no travel to hide
        (cluster(between=LONG, flop=PRODUCTS), LARGE, 1),  # experts that cost nothing
        (cluster(between=LONG), WORK, 1),  # of a file without a rate
        (cluster(between=LONG, flop=PRODUCTS), replace(WORK, narrow=True), 1),
        (cluster(between=LONG, flop=Flop(0.0, 1e-12)), replace(WORK, narrow=True), 4),
        (cluster(nodes=1, inside=LONG, flop=PRODUCTS), WORK, 2),
    ],
)
def test_the_number_of_chunks(profile, message, degree):
    assert profile.choose(message).degree == degree
    assert profile.choose(message, (1,)).degree == 1


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_chunks_against_a_simulation(degree):
    """The formula against a link and a processor that each take one chunk at a time, in the order of `interleave`."""
    for alpha, beta, flop in product((0.0, 0.01), (0.1, 1.0, 3.0), (0.0, 0.3, 1.0, 5.0)):
        profile = cluster(2, 1, FREE, Link(alpha, 0.0, beta), flop=Flop(flop))
        message = Message(tokens=1, row_bytes=1, top_k=1, num_experts=2, row_flops=1.0)
        total = alpha  # sizes
        for compute in (flop, 2 * flop):
            out, home = (
                2 * alpha + beta / 2 / degree,
                alpha + beta / 2 / degree,
            )  # half of the rows go to the other node
            total += simulated([out, home], compute / degree, degree)
        found = profile.predict(message, degree)["flat"]
        assert found == pytest.approx(total, rel=0.15)
        if degree == 1 or flop in (0.0, 5.0):  # one of them is always the longer
            assert found == pytest.approx(total)


def simulated(travel: list[float], compute: float, chunks: int) -> float:
    """Seconds until all chunks are home: a link and a processor, each does one thing at a time."""
    out, home = travel
    link = processor = 0.0
    waiting: list[float] = []  # when the experts are done with chunks that are not home yet
    for chunk in range(chunks + 1):
        if chunk < chunks:
            link += out
            done = processor = max(processor, link) + compute
            waiting.append(done)
        if chunk and waiting:
            link = max(link, waiting.pop(0)) + home
    return link


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
            "node in pieces": 4 * (8 * 100 + 8 * 10 + 7 * 3) + rows * 5 / 3 / 2 + rows * 2 / 2 * 0.5 / 4,
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


@given(st.builds(Profile, st.integers(1, 64), st.integers(1, 64), LINKS, LINKS, st.builds(Flop, SECONDS, SECONDS)))
def test_json_round_trip(tmp_path_factory, profile):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile


def test_a_file_without_a_rate_of_products(tmp_path):
    path, profile = tmp_path / "profile.json", cluster()
    profile.save(path)
    given = json.loads(path.read_text())
    del given["flop"]
    path.write_text(json.dumps(given))
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
        lambda given: json.dumps({**given, "flop": {"float32": -1e-9}}),
        lambda given: json.dumps({**given, "flop": {"int8": 1e-12}}),
        lambda given: json.dumps({**given, "flop": [1e-9, 1e-9]}),
    ],
)
def test_what_is_no_profile(tmp_path, change):
    path = tmp_path / "profile.json"
    cluster().save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"profile\.json is not a profile .*; make one with python -m"):
        Profile.load(path)


SHARES = st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda s: sum(s) > 0.01)


@given(SHARES, st.floats(0.1, 1))
def test_uneven_shares_against_a_sum_over_ranks(drawn, travels):
    """3 nodes of 2: bytes that each rank sends and receives, by the way that each transport takes."""
    shares = [travels * s / sum(drawn) for s in drawn]
    n, m, k, ranks = 3, 2, 2, range(6)
    between = {name: ([0.0] * 6, [0.0] * 6) for name in ("flat", "2dh")}  # sent, received
    inside = {name: ([0.0] * 6, [0.0] * 6) for name in ("flat", "2dh")}

    def send(links, source: int, target: int, rows: float) -> None:
        links[0][source] += rows
        links[1][target] += rows

    for source, target in product(ranks, ranks):
        rows = k * shares[target]
        if source // m != target // m:
            send(between["flat"], source, target, rows)
        elif source != target:
            send(inside["flat"], source, target, rows)
        middle = source // m * m + target % m  # the rank of the own node with the target's local number
        if middle != source:
            send(inside["2dh"], source, middle, rows)
        if middle // m != target // m:
            send(between["2dh"], middle, target, rows)

    def busiest(links) -> float:
        return max(*links[0], *links[1])

    message = Message(tokens=1, row_bytes=1, top_k=k, num_experts=60, shares=tuple(shares))
    for name in ("flat", "2dh"):
        assert cluster(n, m, FREE, Link(0, 0, 1.0)).predict(message)[name] == pytest.approx(4 * busiest(between[name]))
        assert cluster(n, m, Link(0, 0, 1.0), FREE).predict(message)[name] == pytest.approx(4 * busiest(inside[name]))
    found = cluster(n, m, FREE, Link(0, 0, 1.0)).predict(message)["node"]
    assert found <= 4 * busiest(between["2dh"]) * (1 + 1e-9)  # a token crosses at most as often as its rows


def test_work_that_was_measured_counts_for_the_rank_with_most_rows():
    message = Message(tokens=10, row_bytes=1, top_k=2, num_experts=8, shares=(0.5, 0.2, 0.2, 0.1), work=Work(1.0, 3.0))
    found = cluster(4, 1, FREE, FREE).predict(message)["flat"]
    assert found == pytest.approx(3 * max(1.0 * 80 * 0.5, 3.0 * 20))  # the processors of four ranks are one
