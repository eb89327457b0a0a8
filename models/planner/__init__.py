"""Choose the layout of a job before it runs: what a step takes and holds, from the sizes of model and cluster.

`python -m turnout.models.planner` is the command. Start at `estimate.py`; `search.py` tries all layouts.
"""

from .architecture import Architecture
from .breakdown import Breakdown, Estimate
from .cluster import Cluster
from .estimate import Estimator
from .layout import Layout
from .memory import Memory
from .search import Found, search
from .simulator import Simulation, simulate

__all__ = [
    "Architecture",
    "Breakdown",
    "Cluster",
    "Estimate",
    "Estimator",
    "Found",
    "Layout",
    "Memory",
    "Simulation",
    "search",
    "simulate",
]
