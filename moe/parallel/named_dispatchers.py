"""Dispatchers and what they are called: made from arguments of `parallelize`, and read back for `Adaptive`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from torch.distributed.device_mesh import DeviceMesh

from ...dispatch import mesh as axes
from ...dispatch.autoselect.auto import AutoDispatcher
from ...dispatch.autoselect.profile import Choice, Profile
from ...dispatch.compressed import CompressedDispatcher
from ...dispatch.dispatcher import Dispatcher, NodeLocalDispatcher, SteppedDispatcher
from ...dispatch.expert_tp import TensorParallelDispatcher
from ...dispatch.flat import FlatDispatcher
from ...dispatch.hierarchical import HierarchicalDispatcher
from ...dispatch.local import LocalDispatcher
from ...dispatch.node import NodeDispatcher
from ...dispatch.overlap import OverlapDispatcher
from ...dispatch.wire import WIRES, Wire

BY_NODE: dict[str, type[NodeLocalDispatcher]] = {"2dh": HierarchicalDispatcher, "node": NodeDispatcher}
DISPATCHERS = ("auto", "flat", *BY_NODE)


def named_dispatcher(
    name: str, mesh: DeviceMesh, ep: DeviceMesh | None, profile: str | Path | Profile | None, chunks: bool = False
) -> Dispatcher:
    """The dispatcher that a name stands for on a mesh. `chunks`: whether "auto" chooses them without nodes, too."""
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher must be one of {', '.join(DISPATCHERS)} or a Dispatcher; got {name!r}")
    etp = axes.axis(mesh, axes.ETP)
    if ep is not None and etp is not None and etp.size() > 1:
        inner = named_dispatcher(name, mesh[tuple(axis for axis in axes.names(mesh) if axis != axes.ETP)], ep, profile)
        inner = FlatDispatcher(ep.get_group()) if isinstance(inner, LocalDispatcher) else inner
        if isinstance(inner, AutoDispatcher):  # its costs lack the exchange inside the etp group: it chooses no chunks
            inner = replace(inner, degrees=(1,))
        return TensorParallelDispatcher(cast(SteppedDispatcher, inner), etp.get_group())
    if ep is None or ep.size() == 1:
        return LocalDispatcher()
    by_node = {axes.NODE, axes.LOCAL} <= set(axes.names(mesh)) and axes.EP not in axes.names(mesh)
    if name == "auto" and (by_node or chunks):
        return AutoDispatcher.of(mesh, profile)
    return BY_NODE[name].of(mesh) if name in BY_NODE else FlatDispatcher(ep.get_group())


def check_options(dispatcher: str | Dispatcher, overlap: Any, wire: Any) -> None:
    """Raise ValueError for options of `parallelize` that are wrong or do not go together."""
    number = isinstance(overlap, int) and not isinstance(overlap, bool) and overlap > 0
    if overlap not in (None, "auto") and not number:
        raise ValueError(f'overlap must be None, "auto" or a positive integer; got {overlap!r}')
    if wire is not None and wire not in WIRES:
        raise ValueError(f"wire must be None or one of {', '.join(WIRES)}; got {wire!r}")
    if overlap is not None and isinstance(dispatcher, OverlapDispatcher):
        raise ValueError(f"overlap={overlap!r}, but the dispatcher overlaps already: leave one of them out")
    if wire is not None and isinstance(dispatcher, CompressedDispatcher):
        raise ValueError(f"wire={wire!r}, but the dispatcher compresses already: leave one of them out")


def equipped(
    dispatcher: Dispatcher, row_flops: float, overlap: int | Literal["auto"] | None, wire: Wire | None
) -> Dispatcher:
    """Add overlap and wire format to a dispatcher. An `AutoDispatcher` also gets the experts' work, for its costs."""
    if isinstance(dispatcher, AutoDispatcher):
        dispatcher = replace(
            dispatcher, row_flops=dispatcher.row_flops or row_flops, wire=dispatcher.wire if wire is None else wire
        )
        if isinstance(overlap, int):
            return replace(dispatcher, degrees=(overlap,))
        return dispatcher if overlap is None else OverlapDispatcher(replace(dispatcher, degrees=(1,)), overlap)
    if wire is not None:
        dispatcher = CompressedDispatcher(dispatcher, wire)  # pyright: ignore[reportArgumentType]  # it raises TypeError
    return dispatcher if overlap is None else OverlapDispatcher(dispatcher, overlap)


def nested(dispatcher: Dispatcher | None) -> Iterator[Dispatcher]:
    """A dispatcher, the one inside it, and so on, from the outside to the transport."""
    while dispatcher is not None:
        yield dispatcher
        dispatcher = getattr(dispatcher, "inner", None)


def auto_of(dispatcher: Dispatcher) -> AutoDispatcher | None:
    """The `AutoDispatcher` among `nested` dispatchers, whose transport and chunks may be chosen; None without one."""
    return next((each for each in nested(dispatcher) if isinstance(each, AutoDispatcher)), None)


def with_auto(dispatcher: Any, auto: AutoDispatcher) -> Dispatcher:
    """The same dispatcher with another `AutoDispatcher` in place of its own."""
    if isinstance(dispatcher, AutoDispatcher):
        return auto
    return replace(dispatcher, inner=with_auto(dispatcher.inner, auto))


def wire_of(dispatcher: Dispatcher) -> Wire | None:
    """The format in which a dispatcher sends rows; None if it sends them as they are."""
    for each in nested(dispatcher):
        if isinstance(each, AutoDispatcher | CompressedDispatcher):
            return each.wire
    return None


def choice_of(dispatcher: Dispatcher) -> Choice:
    """The transport of a dispatcher without an `AutoDispatcher`, by its name in a `Profile`, and its chunks."""
    name, degree = "flat", 1
    for each in nested(dispatcher):
        if isinstance(each, OverlapDispatcher) and isinstance(each.degree, int):
            degree = each.degree
        if isinstance(each, HierarchicalDispatcher):
            name = "2dh"
        if isinstance(each, NodeDispatcher):
            name = "node" if each.pieces == 1 else "node in pieces"
    return Choice(name, degree)
