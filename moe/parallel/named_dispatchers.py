"""The dispatcher that arguments of `parallelize` stand for: its transport by name, overlap and wire format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from torch.distributed.device_mesh import DeviceMesh

from ...dispatch import mesh as axes
from ...dispatch.autoselect.auto import AutoDispatcher
from ...dispatch.autoselect.profile import Profile
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
