"""Constants of the cost model: the hardware of a cluster, and what its software does. Read from TOML.

`clusters/` has the presets. Every constant there names its source.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ...dispatch.autoselect.profile import Flop, Link, Profile
from ..pipeline.partition import PER_RANK
from .layout import RECOMPUTE, ZERO

PRESETS = Path(__file__).parent / "clusters"


@dataclass(frozen=True)
class Device:
    """One GPU, or one process on a CPU."""

    memory_gb: float
    sms: int  # multiprocessors, or cores: what the tiles of a matrix product are spread over
    half_tflops: float  # peak, dense, of float16 and bfloat16
    single_tflops: float  # peak of float32 as products compute it
    product_share: float  # of the peak that large matrix products reach
    fused_attention_share: float  # of the peak that a fused attention kernel reaches
    memory_gbs: float  # bandwidth of device memory
    memory_share: float  # of that, what element-wise kernels reach
    kernel_us: float  # a kernel that does nothing

    def __post_init__(self) -> None:
        _check_positive("device", self, "kernel_us")

    def peak(self, dtype: str) -> float:
        """FLOP/s by the datasheet; dtype is "bf16", "fp16" or "fp32"."""
        return 1e12 * (self.single_tflops if dtype == "fp32" else self.half_tflops)


@dataclass(frozen=True)
class Wire:
    """Links inside nodes, or between them: the costs for one rank while all ranks use them."""

    gbs: float  # bandwidth of a rank, one direction
    step_us: float  # a collective, however small
    message_us: float  # each further message of it

    def __post_init__(self) -> None:
        _check_positive("inside and between", self, "step_us", "message_us")

    def link(self) -> Link:
        """The costs in seconds, as the cost model of the transports takes them."""
        return Link(1e-6 * self.step_us, 1e-6 * self.message_us, 1e-9 / self.gbs)


@dataclass(frozen=True)
class Software:
    """What the training software does, and how much of the communication it hides behind computing."""

    attention: str  # "fused" (FlashAttention), or "unfused": scores go through memory
    fused: bool  # element-wise operations that follow each other are one kernel
    fused_accumulation: bool  # the product that makes a gradient adds it to those of earlier micro-batches
    dropout: bool
    sequence_parallel: tuple[str, ...]  # modes of recompute in which tensor parallelism splits sequences as well
    scatter_gather: bool  # a stage sends each of its tp ranks' part once, and gathers it behind the link
    recompute: tuple[str, ...]  # what a search may choose from
    zero: tuple[int, ...]  # what a search may choose from
    schedules: tuple[str, ...]  # what a search may choose from
    micro_batches: tuple[int, ...]  # sequences at a time that a search may choose from
    weight_bytes: float  # of a parameter in a step
    gradient_bytes: float
    optimizer_bytes: float  # of a parameter, moments and master weights
    gradient_wire_bytes: float  # of a gradient on its way between data ranks
    step_bytes: float  # of a parameter, read and written by the optimizer's step and by clipping
    tp_overlap: float  # share of an axis' communication that may hide behind computing
    pp_overlap: float
    dp_overlap: float
    ep_overlap: float
    whole_reduce_scatter: bool  # a reduce-scatter sums everything on every rank, as gloo's does
    wrapper_us: float  # host time of a collective that DTensor or FSDP2 makes, beside its own; 0: there is no wrapper
    reserve_gb: float  # memory that no tensor has
    fragmentation: float  # of activations

    def __post_init__(self) -> None:
        options = {"recompute": RECOMPUTE, "zero": range(len(ZERO)), "schedules": tuple(PER_RANK)}
        for name, known in {**options, "sequence_parallel": RECOMPUTE}.items():
            given = getattr(self, name)
            if (unknown := [each for each in given if each not in known]) or not (given or name == "sequence_parallel"):
                raise ValueError(f"[software] {name} must be some of {list(known)}; got {unknown or 'none'}")
        if self.attention not in ("fused", "unfused"):
            raise ValueError(f'[software] attention must be "fused" or "unfused"; got {self.attention!r}')
        if not self.micro_batches or not all(isinstance(n, int) and n > 0 for n in self.micro_batches):
            raise ValueError(f"[software] micro_batches must be positive integers; got {list(self.micro_batches)}")
        for name in ("tp_overlap", "pp_overlap", "dp_overlap", "ep_overlap"):
            if getattr(self, name) > 1:
                raise ValueError(f"[software] {name} is a share in [0, 1]; got {getattr(self, name)}")


@dataclass(frozen=True)
class Fabric:
    """Network between nodes, with nodes that are slow or down."""

    nodes: int = 0  # that there are; 0: as many as a job asks for
    pod: int = 0  # neighbours under one leaf or rail group; 0: all of them
    oversubscription: float = 1.0  # bandwidth of a pod's nodes over that of its links to other pods
    rails: bool = False  # ranks of equal place in their nodes share a leaf, all others meet above it
    slow: tuple[tuple[int, float], ...] = ()  # (node, share of its bandwidth that is left), as of 7 of 8 adapters
    down: tuple[int, ...] = ()  # nodes that are lost

    def __post_init__(self) -> None:
        if wrong := [each for each in self.slow if not isinstance(each, tuple) or len(each) != 2]:
            raise ValueError(f"[fabric] slow: write pairs [node, share of its bandwidth]; got {wrong[0]}")
        for node, share in self.slow:
            if not 0 < share <= 1:
                raise ValueError(f"[fabric] slow: node {node} has a share in (0, 1] of its bandwidth; got {share}")
        if self.oversubscription < 1:
            raise ValueError(f"[fabric] oversubscription must be at least 1; got {self.oversubscription}")


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes.

    >>> Cluster.load("selene").device.sms
    108
    """

    about: str
    ranks_per_node: int
    cores: int  # of a node, where its ranks compute on them; 0: each rank has what it needs
    device: Device
    inside: Wire
    between: Wire
    software: Software
    fabric: Fabric = Fabric()

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be positive; got {self.ranks_per_node}")

    @classmethod
    def load(cls, name: str | Path) -> Cluster:
        """Read a preset by its name, or a TOML file.

        Raises:
            ValueError: no such preset or file, or one with keys or values that do not fit.
        """
        path = PRESETS / f"{name}.toml"
        if not path.exists():
            path = Path(name)
        if path.suffix != ".toml":
            raise ValueError(f"--cluster {name}: no such preset; take {', '.join(presets())}, or a file NAME.toml")
        try:
            return _filled(cls, tomllib.loads(path.read_text()), str(path))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"--cluster {name}: {error}") from None

    def changed(self, assignments: list[str]) -> Cluster:
        """The cluster with other constants. Each assignment is written as in ``"software.fused=false"``, in TOML."""
        cluster = self
        for assignment in assignments:
            key, _, value = assignment.partition("=")
            table, _, name = key.strip().rpartition(".")
            try:
                given = tomllib.loads(f"x = {value}")["x"]
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"--set {assignment}: {error}; write it as in --set software.fused=false") from None
            owner = getattr(cluster, table, None) if table else cluster
            if owner is None or name not in {f.name for f in fields(owner)}:
                raise ValueError(f"--set {assignment}: there is no constant {key.strip()!r} in a cluster's file")
            value = _value(get_type_hints(type(owner))[name], given, f"--set {key}")
            changed = replace(owner, **{name: value})
            cluster = replace(cluster, **{table: changed}) if table else changed
        return cluster

    def with_links(self, profile: Profile) -> Cluster:
        """The cluster with the links and the rate of matrix products that a probe has measured."""

        def wire(link: Link, before: Wire) -> Wire:
            gbs = 1e-9 / link.byte if link.byte else before.gbs
            return Wire(gbs, 1e6 * link.step, 1e6 * link.message)

        device = self.device
        if profile.flop.bfloat16:
            device = replace(device, half_tflops=1e-12 / profile.flop.bfloat16 / device.product_share)
        if profile.flop.float32:
            device = replace(device, single_tflops=1e-12 / profile.flop.float32 / device.product_share)
        return replace(
            self,
            ranks_per_node=profile.locals,
            inside=wire(profile.inside, self.inside),
            between=wire(profile.between, self.between),
            device=device,
        )

    def profile(self, nodes: int, locals: int, between: float = 1.0) -> Profile:
        """The `Profile` from which the runtime chooses a transport, for `nodes` nodes of `locals` ranks.

        The bandwidth between nodes is divided by `between`.
        """
        away = replace(self.between, gbs=self.between.gbs / between)
        return Profile(nodes, locals, self.inside.link(), away.link(), Flop())


def presets() -> list[str]:
    """Names of the clusters that come with the planner."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


Made = TypeVar("Made")


def _check_positive(table: str, constants: Any, *may_be_zero: str) -> None:
    for field in fields(constants):
        value = getattr(constants, field.name)
        if field.name not in may_be_zero and not value > 0:
            raise ValueError(f"[{table}] {field.name} must be positive; got {value}")


def _filled(kind: type[Made], given: dict[str, Any], where: str) -> Made:
    hints = get_type_hints(kind)
    if unknown := sorted(given.keys() - hints.keys()):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(hints))}")
    values = {
        name: _filled(hints[name], value, f"{where} [{name}]")
        if isinstance(value, dict)
        else _value(hints[name], value, f"{where}, {name}")
        for name, value in given.items()
    }
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; clusters/selene.toml in the package has all of them") from None


def _value(hint: Any, given: Any, where: str) -> Any:
    if hint in (int, float):
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < inf:
            raise ValueError(f"{where} must be a number of at least 0; got {given!r}")
        if hint is int and given != int(given):
            raise ValueError(f"{where} must be a whole number; got {given!r}")
        return hint(given)
    if hint in (str, bool):
        if not isinstance(given, hint):
            raise ValueError(f"{where} must be a {hint.__name__}; got {given!r}")
        return given
    if not isinstance(given, list):
        raise ValueError(f"{where} must be a list; got {given!r}")
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in given)
