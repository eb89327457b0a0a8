"""Bridges to Hugging Face models (`turnout[hf]`). Start at `replace.py`."""

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
