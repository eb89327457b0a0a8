"""Routers (gates) by name. Your own needs no entry here: pass an instance to ``MoE(gate=...)``."""

from .balanced import BalancedGate
from .biased import BiasedGate
from .cosine import CosineGate
from .expert_choice import ExpertChoiceGate
from .gate import Gate
from .gshard import GShardGate
from .hash import HashGate
from .hierarchical_gate import HierarchicalGate
from .noisy_topk import NoisyTopKGate
from .random_gate import RandomGate
from .sigmoid import SigmoidGate
from .sinkhorn import SinkhornGate
from .switch import SwitchGate
from .topk import TopKGate

GATES: dict[str, type[Gate]] = {
    "topk": TopKGate,
    "switch": SwitchGate,
    "gshard": GShardGate,
    "noisy_topk": NoisyTopKGate,
    "hierarchical": HierarchicalGate,
    "sigmoid": SigmoidGate,
    "expert_choice": ExpertChoiceGate,
    "cosine": CosineGate,
    "sinkhorn": SinkhornGate,
    "base": BalancedGate,
    "random": RandomGate,
    "hash": HashGate,
}

__all__ = [
    "GATES",
    "BalancedGate",
    "BiasedGate",
    "CosineGate",
    "ExpertChoiceGate",
    "GShardGate",
    "Gate",
    "HashGate",
    "HierarchicalGate",
    "NoisyTopKGate",
    "RandomGate",
    "SigmoidGate",
    "SinkhornGate",
    "SwitchGate",
    "TopKGate",
]
