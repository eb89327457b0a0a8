"""What pretrain.py has trained: the model of its newest checkpoint, and the frame of the scripts that work on it."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import launch
import steps
import torch
from command_line import Parser
from options import Job
from turnout.dispatch import Meshes
from turnout.models import EMA, ParallelModel, checkpoint
from turnout.models.data_parallel import Data


class Trained(NamedTuple):
    """A trained model, its checkpoint and its job, and the average of its weights if the job kept one."""

    path: Path
    job: Job
    model: ParallelModel
    ema: EMA | None

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the model has its average weights, or its own if the job kept no average."""
        return self.ema.applied() if self.ema else nullcontext()


def newest(out: Path, device_type: str, data: Data = "replicate") -> Trained:
    """Load the newest checkpoint of a run, with its experts spread over all ranks, which all call it.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = checkpoint.newest(out)
    if path is None:
        raise ValueError(f"{out} has no checkpoint: name the --out of a run of pretrain.py")
    _, extra = checkpoint.described(path)
    if (task := extra["job"].get("objective", "clm")) != "clm":
        raise ValueError(f"{out} was trained by --objective {task}: only a GPT (--objective clm) says next tokens")
    known = {name: value for name, value in extra["job"].items() if name in Job.__dataclass_fields__}
    exact = {"bf16": False, "fp16": False, "fp8": False, "compile": False, "forced_balance": False, "recompute": "none"}
    exact |= {"adapt": False, "place": False, "cp_attention": ""}
    axes = {"pp": 1, "cp": 1, "tp": 1, "ep": 0, "etp": 1, "micro_batches": 1, "accumulate": 1, "data_parallel": data}
    sizes = {"batch": launch.RANKS, "eval_size": launch.RANKS}
    job = Job(**known | exact | axes | sizes).fit(launch.RANKS)
    model = steps.build(job, Meshes.of(device_type, ep=job.ep))
    ema = steps.average_of(model, job)
    checkpoint.load(path, steps.saved(model, ema), steps.optimizer_of(model, job))
    return Trained(path, job, model, ema)


def run(parser: Parser, work: Callable[[Namespace, torch.device], str | None]) -> int:
    """Call `work` with the flags and this rank's device, print what it returns on rank 0, and return the exit status.

    The status is 1 for wrong flags or files and for NaN, which are said in one sentence.
    """
    logging.basicConfig(format="%(message)s")
    try:
        args = parser.parse_args()
    except ValueError as error:
        launch.once(str(error))
        return 1
    with launch.process_group(timedelta(minutes=10)) as device:
        try:
            answer = work(args, device)
        except (ValueError, checkpoint.CheckpointError, steps.NonFiniteError) as error:
            launch.once(str(error))
            return 1
    if launch.RANK == 0 and answer is not None:
        print(answer, flush=True)
    return 0
