"""The trip: plan, encode, carry, decode. Start at `plan.py`, then `base.py` and `flat.py`."""

from .agreement import DispatchError
from .base import Batch, Dispatcher
from .collectives import all_to_all, exchange_sizes
from .flat import FlatDispatcher
from .local import LocalDispatcher
from .node import NodeDispatcher
from .ops import decode, encode
from .plan import Plan

__all__ = [
    "Batch",
    "DispatchError",
    "Dispatcher",
    "FlatDispatcher",
    "LocalDispatcher",
    "NodeDispatcher",
    "Plan",
    "all_to_all",
    "decode",
    "encode",
    "exchange_sizes",
]
