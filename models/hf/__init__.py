"""Bridges to Hugging Face models (`turnout[hf]`). Start at `replace.py`."""

from .adapters import load_adapters, merge_adapters, save_adapters
from .block_experts import FusedExperts, ListedExperts
from .block_gates import RouterGate
from .dense_models import replace_dense
from .replace import BridgedExperts, BridgedMoE, Parts, replace_moe, restore_moe
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
