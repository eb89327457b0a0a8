"""Node-deduplicated dispatch in pieces: same bits, both links busy at once, and few pieces for little data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from exchange_log import ExchangeLog
from ranks import run
from test_node import EXPERTS, both, same_bits, tickets, trip
from torch import Tensor
from torch.distributed import ProcessGroup
from turnout.dispatch import NodeDispatcher, Plan, node


def pieces_and_whole() -> None:
    node.PIECE = 1  # in this process alone, which ends with the test
    dispatcher, _ = both((2, 2))
    for kind, k, pieces in [("any", 3, 4), ("drops", 3, 4), ("one expert", 3, 2), ("mixed k", 3, 3), ("nobody", 3, 4)]:
        for capacity in (None, 9):
            expert, weight = tickets(dist.get_rank(), kind, k, 2)
            several = trip(replace(dispatcher, pieces=pieces), expert, weight, torch.float64, capacity)
            one = trip(replace(dispatcher, pieces=1), expert, weight, torch.float64, capacity)
            assert same_bits(several[0] + several[1], one[0] + one[1]), (kind, capacity)


def test_the_number_of_pieces_changes_no_bit():
    run(4, pieces_and_whole)


class Log(ExchangeLog):
    """The exchanges of rows of a width between nodes (b) and inside them (i)."""

    def __init__(self, between: ProcessGroup, width: int) -> None:
        super().__init__()
        self.between, self.width = between, width

    def name(self, x: Tensor, group: ProcessGroup | None) -> str | None:
        if x.shape[1] != self.width:
            return None
        return "b" if group is self.between else "i"


def events(tokens: int, width: int) -> list[list[str]]:
    """Events of dispatch, combine, and the backward of both."""
    dispatcher = replace(both((2, 2))[0], pieces=4)
    expert = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(dist.get_rank())).argsort(1)[:, :3]
    x, weight = torch.randn(tokens, width, requires_grad=True), torch.rand(tokens, 3)
    found = []
    with Log(dispatcher.node, width) as log:
        batch = dispatcher.dispatch(x, Plan.of(expert.contiguous(), EXPERTS), weight)
        found, log.events = [*found, log.events], []
        y = dispatcher.combine(batch.rows * batch.weight.unsqueeze(1), batch.receipt)
        found, log.events = [*found, log.events], []
        y.sum().backward()
        found += [log.events[: len(log.events) // 2], log.events[len(log.events) // 2 :]]
    return found


def test_one_piece_travels_between_nodes_while_another_does_inside():
    for phases in run(4, events, 64, 512):  # 128 KB
        for seen in phases:
            assert seen.count("start b") == seen.count("wait b") == seen.count("start i") == seen.count("wait i") == 4
            under_way, idle = 0, []
            for event in seen:
                under_way += {"start b": 1, "wait b": -1}.get(event, 0)
                idle.append(under_way == 0)
            first, last = seen.index("start b"), len(seen) - seen[::-1].index("wait b") - 1
            assert not any(idle[first:last]), seen  # the link between nodes is busy from its first piece to its last
            assert seen[first:last].count("start i") >= 2  # meanwhile pieces travel inside


def test_few_tokens_travel_in_one_piece():
    for phases in run(4, events, 8, 16):
        assert [seen.count("start b") for seen in phases] == [1, 1, 1, 1]


def test_a_wrong_number_of_pieces():
    with pytest.raises(ValueError, match="pieces must be a positive integer; got 0"):
        NodeDispatcher(None, None, pieces=0)  # pyright: ignore[reportArgumentType]
