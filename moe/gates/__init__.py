"""Gates by name. A gate of your own needs no entry here: pass an instance to ``MoE(gate=...)``."""

from .base import Gate
from .gshard import GShardGate
from .hash import HashGate
from .hierarchical import HierarchicalGate
from .noisy_topk import NoisyTopKGate
from .random_gate import RandomGate
from .switch import SwitchGate
from .topk import TopKGate

GATES: dict[str, type[Gate]] = {
    "topk": TopKGate,
    "switch": SwitchGate,
    "gshard": GShardGate,
    "noisy_topk": NoisyTopKGate,
    "hierarchical": HierarchicalGate,
    "random": RandomGate,
    "hash": HashGate,
}

__all__ = [
    "GATES",
    "GShardGate",
    "Gate",
    "HashGate",
    "HierarchicalGate",
    "NoisyTopKGate",
    "RandomGate",
    "SwitchGate",
    "TopKGate",
]
