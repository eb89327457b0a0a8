"""Memory and time of the update after a backward: the optimizer, and an average of the weights."""

from __future__ import annotations

from typing import NamedTuple

from ..muon import STEPS
from .architecture import Architecture
from .cluster import Device
from .layout import Layout
from .roofline import Kernels
from .share import Share

OPTIMIZERS = ("adamw", "muon")
AVERAGE_BYTES = 4  # of a parameter in `EMA`: float32, as the weights that the optimizer steps
MOMENT_BYTES = 4  # of a parameter in one of an optimizer's averages, in float32


class Update(NamedTuple):
    """How weights are updated.

    Attributes:
        optimizer: "adamw", or "muon" for hidden matrices and AdamW for the rest, as `Muon` does.
        ema: whether an average of the weights is kept.
    """

    optimizer: str = "adamw"
    ema: bool = False

    def saved_bytes(self, hidden: float) -> float:
        """Bytes of optimizer state that are saved against AdamW: Muon keeps one average, not two."""
        return MOMENT_BYTES * hidden if self.optimizer == "muon" else 0.0

    def orthogonalising(self, model: Architecture, layout: Layout, share: Share, device: Device, zero: int) -> float:
        """Seconds of `newton_schulz` for a rank's share of the hidden matrices; 0 with AdamW.

        Ranks that hold parts of the same matrices share the work. Ranks that hold the same matrices all do it.
        """
        if self.optimizer != "muon":
            return 0.0
        half = device.half_tflops > device.single_tflops  # bfloat16 on a GPU, float32 on a CPU
        kernels = Kernels(device, 1e12 * max(device.half_tflops, device.single_tflops), 2 if half else 4)
        dim, experts = model.dim, model.experts / layout.ep
        dense = 1 / layout.tp / (layout.replicas if zero else 1)
        split = 1 / layout.etp / (layout.edp if zero else 1)
        matrices = (  # width and number on this rank
            (model.q_dim, 2 * share.blocks * dense),
            (model.kv_dim, 2 * share.blocks * dense),
            (model.ffn, model.matrices * share.dense * dense),
            (model.hidden, model.matrices * share.mixtures * experts * split),
            (model.hidden * model.shared, model.matrices * share.mixtures * (1 / layout.replicas if zero else 1)),
        )
        seconds = 0.0
        for width, number in matrices:
            m, n = sorted((dim, width))
            products = (m, m, n), (m, m, m), (m, n, m)  # x x^T, its square, and their sum times x
            seconds += STEPS * sum(number * kernels.product(*sizes) for sizes in products)
        return seconds


ADAMW = Update()
