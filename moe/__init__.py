"""The layer. Start at `layer.py`."""

from .adapters.lora import add_lora, lora_parameters, merge_lora, unmerge_lora
from .autotune.results import Tuned, Tuning
from .autotune.tuning import autotune
from .auxiliary import aux_loss
from .capacity import capacity, capacity_limit
from .experts.base import Experts
from .experts.zero_computation import FreeExperts
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
from .layer import MoE
from .losses import balance_loss, z_loss
from .parallel.check import check
from .parallel.expert_bias import balance_biases
from .parallel.grad_scaler import GradScaler
from .parallel.gradients import clip_grad_norm_, param_groups, sync_gradients
from .parallel.loads import load
from .parallel.parallelize import expert_parameters, fully_shard_experts, parallelize
from .parallel.replicas import ReplicaError, check_replicas
from .routing import Routing
from .stats import Load, Stats
from .upcycling.upcycle import upcycle

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
    "ReplicaError",
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
    "check_replicas",
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
