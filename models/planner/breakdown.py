"""The estimate of a layout: seconds of a step by part, memory, and rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .layout import Layout
from .memory import Memory
from .placement import Placement
from .share import bubble


@dataclass(frozen=True)
class Breakdown:
    """Seconds of the parts of a step.

    The step takes compute + pipeline_bubble + optimizer + exposed + cores. Fields tp, cp, pp, dp and ep have all the
    communication along an axis. `exposed` is the share of it, over all axes, that computing does not hide.
    """

    compute: float = 0.0  # on the rank that has most to do
    pipeline_bubble: float = 0.0
    tp: float = 0.0
    pp: float = 0.0
    dp: float = 0.0
    ep: float = 0.0
    optimizer: float = 0.0
    exposed: float = 0.0
    cp: float = 0.0
    cores: float = 0.0  # waiting for a processor core, where ranks have to share them

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.pipeline_bubble + self.optimizer + self.exposed + self.cores


@dataclass(frozen=True)
class Estimate:
    """Predicted time and memory of a layout."""

    layout: Layout
    breakdown: Breakdown
    memory: Memory
    fits: bool
    tokens: int  # in a step
    flops: float  # in a step, with recomputation
    model_flops: float  # in a step, without recomputation
    peak: float  # FLOP/s of a rank by the datasheet
    transport: str = ""  # name of the transport between ranks that share experts
    placement: Placement | None = None

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.breakdown.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the peak, without recomputation."""
        return self.model_flops / self.seconds / self.layout.ranks / self.peak

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        layout, parts = asdict(self.layout), asdict(self.breakdown)
        parts = {name: time for name, time in parts.items() if time or name not in ("cp", "cores")}
        return {
            "seconds_per_step": self.seconds,
            "tflops_per_gpu": 1e-12 * self.flops / self.seconds / self.layout.ranks,
            "mfu": self.mfu,
            "tokens_per_s": self.tokens / self.seconds,
            "memory_bytes": round(self.memory.total),
            "bubble": bubble(self.layout) if self.layout.pp > 1 else 0.0,
            "micro_batch": layout.pop("micro_batch"),
            "virtual": layout.pop("virtual"),
            "schedule": layout.pop("schedule"),
            "breakdown": parts,
        }
