"""Other numbers of experts for trained weights: dense blocks become experts, and experts are dropped or merged.

Start at `upcycle.py`, or at `fewer_experts.py`.
"""

from .fewer_experts import merge_experts, prune_experts
from .upcycle import upcycle

__all__ = ["merge_experts", "prune_experts", "upcycle"]
