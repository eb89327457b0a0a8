"""Checkpoints that any number of ranks can read, and that are read whole or not at all.

torch.distributed.checkpoint keeps the contents. What is spread over ranks are DTensors, experts in global order, and
what stages of a pipeline hold goes by the names of the whole model: a checkpoint of one mesh loads on any other.
The rest is the same on every rank and saved once. A checkpoint is written under another name, with the checksum of
each file, and renamed when all of it has reached the disk. What fails on one rank is raised on all of them; so all
ranks call each function here, `newest` excepted. One process needs no process group.

`model` is a module, or the stages of a pipeline that this rank runs, in a list (`ParallelModel.parts`). One optimizer
has the parameters of all of them.
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
