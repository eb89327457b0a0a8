"""The layer. Start at `layer.py`."""

from .capacity import capacity, capacity_limit
from .experts import Experts
from .gates import Gate, GShardGate, HashGate, HierarchicalGate, NoisyTopKGate, RandomGate, SwitchGate, TopKGate
from .gradients import clip_grad_norm_, param_groups, sync_gradients
from .layer import MoE, aux_loss
from .losses import balance_loss, z_loss
from .parallel import expert_parameters, fully_shard_experts, parallelize
from .routing import Routing
from .scaler import GradScaler
from .stats import Stats

__all__ = [
    "Experts",
    "GShardGate",
    "Gate",
    "GradScaler",
    "HashGate",
    "HierarchicalGate",
    "MoE",
    "NoisyTopKGate",
    "RandomGate",
    "Routing",
    "Stats",
    "SwitchGate",
    "TopKGate",
    "aux_loss",
    "balance_loss",
    "capacity",
    "capacity_limit",
    "clip_grad_norm_",
    "expert_parameters",
    "fully_shard_experts",
    "parallelize",
    "param_groups",
    "sync_gradients",
    "z_loss",
]
