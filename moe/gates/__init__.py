"""Gates by name. A gate of your own needs no entry here: pass an instance to ``MoE(gate=...)``."""

from .base import Gate
from .gshard import GShardGate
from .switch import SwitchGate
from .topk import TopKGate

GATES: dict[str, type[Gate]] = {"topk": TopKGate, "switch": SwitchGate, "gshard": GShardGate}

__all__ = ["GATES", "GShardGate", "Gate", "SwitchGate", "TopKGate"]
