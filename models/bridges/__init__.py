"""Bridges to Hugging Face models (`turnout[hf]`). Start at `replace.py`."""

from .dense import replace_dense
from .experts import FusedExperts, ListedExperts
from .gates import RouterGate
from .replace import BridgedMoE, Parts, replace_moe, restore_moe
from .saving import restored, save_adapters, save_pretrained

__all__ = [
    "BridgedMoE",
    "FusedExperts",
    "ListedExperts",
    "Parts",
    "RouterGate",
    "replace_dense",
    "replace_moe",
    "restore_moe",
    "restored",
    "save_adapters",
    "save_pretrained",
]
