"""Bridges to Hugging Face models (`turnout[hf]`): their MoE blocks become `MoE` layers. Start at `replace.py`.

A model that went through `replace_moe` is called bridged. A family is a kind of model in transformers, such as Mixtral.
"""

from .adapters import load_adapters, merge_adapters, save_adapters
from .block_experts import FusedExperts, ListedExperts
from .block_gates import RouterGate
from .block_parts import Parts
from .bridged import BridgedExperts, BridgedMoE, restore_moe
from .dense_models import replace_dense
from .replace import replace_moe
from .saving import restored, save_pretrained

__all__ = [
    "BridgedExperts",
    "BridgedMoE",
    "FusedExperts",
    "ListedExperts",
    "Parts",
    "RouterGate",
    "load_adapters",
    "merge_adapters",
    "replace_dense",
    "replace_moe",
    "restore_moe",
    "restored",
    "save_adapters",
    "save_pretrained",
]
