"""Pipeline parallelism: cut a model into stages, and run schedules of micro-batches. Start at `engine.py`."""

from .boundary import Boundary
from .engine import Losses, Pipeline
from .partition import Stages

__all__ = ["Boundary", "Losses", "Pipeline", "Stages"]
