"""Pipeline parallelism: stages, schedules, and what travels between stages. Start at `engine.py`."""

from .boundary import Boundary
from .engine import Losses, Pipeline
from .partition import Stages

__all__ = ["Boundary", "Losses", "Pipeline", "Stages"]
