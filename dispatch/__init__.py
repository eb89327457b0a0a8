"""The trip: plan, encode, carry, decode. Start at `plan.py`, then `base.py`, `steps.py` and `flat.py`."""

from .agreement import DispatchError
from .auto import AutoDispatcher
from .base import Batch, Dispatcher, SteppedDispatcher
from .collectives import (
    Travel,
    all_to_all,
    all_to_all_start,
    all_to_all_two_phase,
    check_sizes,
    exchange_sizes,
    gather,
    scatter,
)
from .compressed import CompressedDispatcher
from .flat import FlatDispatcher
from .hierarchical import HierarchicalDispatcher, all_to_all_2d
from .local import LocalDispatcher
from .mesh import Meshes
from .node import NodeDispatcher
from .ops import decode, encode
from .overlap import OverlapDispatcher
from .plan import Plan
from .profile import Profile
from .tensor_parallel import TensorParallelDispatcher

__all__ = [
    "AutoDispatcher",
    "Batch",
    "CompressedDispatcher",
    "DispatchError",
    "Dispatcher",
    "FlatDispatcher",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "Meshes",
    "NodeDispatcher",
    "OverlapDispatcher",
    "Plan",
    "Profile",
    "SteppedDispatcher",
    "TensorParallelDispatcher",
    "Travel",
    "all_to_all",
    "all_to_all_2d",
    "all_to_all_start",
    "all_to_all_two_phase",
    "check_sizes",
    "decode",
    "encode",
    "exchange_sizes",
    "gather",
    "scatter",
]
