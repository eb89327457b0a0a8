"""Checkpoints that load on any mesh, are complete or not there, and are checked before they are loaded.

Contents are in the format of torch.distributed.checkpoint. Spread parameters are saved as DTensors, with experts in
global order, and pipeline stages use the names of the whole model. So a checkpoint of one mesh loads on any other.
Experts that `place_experts` has moved are copied to be saved, which takes as much memory as they and their state do.

A checkpoint is written under a temporary name, with a checksum of each file, and renamed once all of it is on the disk.
An error on one rank is raised on all of them. So all ranks must call each function here, except `newest`. A single
process needs no process group.

`model` is a module, or a list of the pipeline stages that this rank runs (`ParallelModel.parts`). One optimizer has the
parameters of all stages on the rank.
"""

from .background import AsyncCheckpointer, Saved
from .store import Loaded, described, load, load_newest, newest, prune, save
from .together import CheckpointError, DamagedError, WriteError

__all__ = [
    "AsyncCheckpointer",
    "CheckpointError",
    "DamagedError",
    "Loaded",
    "Saved",
    "WriteError",
    "described",
    "load",
    "load_newest",
    "newest",
    "prune",
    "save",
]
