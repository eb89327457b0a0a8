"""The layer. Start at `layer.py`."""

from .auxiliary import aux_loss
from .biases import balance_biases
from .capacity import capacity, capacity_limit
from .check import check
from .experts import Experts
from .free import FreeExperts
from .gates import (
    BalancedGate,
    BiasedGate,
    CosineGate,
    ExpertChoiceGate,
    Gate,
    GShardGate,
    HashGate,
    HierarchicalGate,
    NoisyTopKGate,
    RandomGate,
    SigmoidGate,
    SinkhornGate,
    SwitchGate,
    TopKGate,
)
from .gradients import clip_grad_norm_, param_groups, sync_gradients
from .layer import MoE
from .loads import load
from .lora import add_lora, lora_parameters, merge_lora, unmerge_lora
from .losses import balance_loss, z_loss
from .parallel import expert_parameters, fully_shard_experts, parallelize
from .routing import Routing
from .scaler import GradScaler
from .stats import Load, Stats
from .tuned import Tuned, Tuning
from .tuning import autotune
from .upcycle import upcycle

__all__ = [
    "BalancedGate",
    "BiasedGate",
    "CosineGate",
    "ExpertChoiceGate",
    "Experts",
    "FreeExperts",
    "GShardGate",
    "Gate",
    "GradScaler",
    "HashGate",
    "HierarchicalGate",
    "Load",
    "MoE",
    "NoisyTopKGate",
    "RandomGate",
    "Routing",
    "SigmoidGate",
    "SinkhornGate",
    "Stats",
    "SwitchGate",
    "TopKGate",
    "Tuned",
    "Tuning",
    "add_lora",
    "autotune",
    "aux_loss",
    "balance_biases",
    "balance_loss",
    "capacity",
    "capacity_limit",
    "check",
    "clip_grad_norm_",
    "expert_parameters",
    "fully_shard_experts",
    "load",
    "lora_parameters",
    "merge_lora",
    "parallelize",
    "param_groups",
    "sync_gradients",
    "unmerge_lora",
    "upcycle",
    "z_loss",
]
