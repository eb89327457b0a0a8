"""Starting the main job in tests, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
TINY = (
    "--batch 4 --seq 16 --dim 16 --heads 2 --layers 2 --hidden 16 --experts 4 --eval-size 4 --eval-every 3 --warmup 2"
)


def run(out: Path, *flags: str, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = [*LAUNCH, str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "examples/pretrain.py", *TINY.split(), "--out", str(out), *flags]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
