"""Token dispatch and combine over expert-parallel ranks. Start at `plan.py`, `dispatcher.py` and `flat.py`."""

from .agreement import DispatchError
from .autoselect.auto import AutoDispatcher
from .autoselect.profile import Profile
from .bounded import BoundedDispatcher
from .collectives import (
    Travel,
    all_to_all,
    all_to_all_start,
    all_to_all_two_phase,
    check_sizes,
    exchange_sizes,
)
from .compressed import CompressedDispatcher
from .dispatcher import Batch, Dispatcher, SteppedDispatcher
from .expert_tp import TensorParallelDispatcher
from .flat import FlatDispatcher
from .hierarchical import HierarchicalDispatcher, all_to_all_2d
from .local import LocalDispatcher
from .mesh import Meshes
from .node import NodeDispatcher
from .overlap import OverlapDispatcher
from .plan import Plan
from .reorder import decode, encode
from .scatter_gather import gather, scatter

__all__ = [
    "AutoDispatcher",
    "Batch",
    "BoundedDispatcher",
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
