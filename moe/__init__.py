"""The MoE layer, and training it with expert parallelism. Start reading at `layer.py`.

`gates` has all routers, `adapters` LoRA, `upcycling` turns dense blocks into experts, `autotune` tunes kernels.
"""

from ..dispatch.failure import DispatchError
from .auxiliary import aux_loss
from .capacity import Capacity
from .experts.base import Experts
from .experts.shared import Residual
from .gates.gate import Gate
from .layer import MoE
from .losses import Balance
from .parallel.adaptive import Adaptive
from .parallel.adaptive_layer import LayerReport
from .parallel.check import check
from .parallel.expert_bias import update_expert_biases
from .parallel.fsdp import fully_shard_experts
from .parallel.grad_scaler import GradScaler
from .parallel.gradients import clip_grad_norm_, sync_gradients
from .parallel.loads import load
from .parallel.parallelize import expert_parameters, parallelize
from .parallel.param_groups import param_groups
from .parallel.place_experts import place_experts
from .parallel.plan_placement import PlacementPlan, plan_placement
from .parallel.replicas import ReplicaError, check_replicas
from .routing import Routing
from .stats import Load, Stats

__all__ = [
    "Adaptive",
    "Balance",
    "Capacity",
    "DispatchError",
    "Experts",
    "Gate",
    "GradScaler",
    "LayerReport",
    "Load",
    "MoE",
    "PlacementPlan",
    "ReplicaError",
    "Residual",
    "Routing",
    "Stats",
    "aux_loss",
    "check",
    "check_replicas",
    "clip_grad_norm_",
    "expert_parameters",
    "fully_shard_experts",
    "load",
    "parallelize",
    "param_groups",
    "place_experts",
    "plan_placement",
    "sync_gradients",
    "update_expert_biases",
]
