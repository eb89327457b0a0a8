"""Starting the main job in tests, small."""

import json
import subprocess
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  forked ranks need not import it
from scripts import Done, script

ROOT = Path(__file__).parents[2]
TEXT = str(ROOT / "LICENSE")  # for --data, where any text will do
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
TINY = (
    "--batch 4 --seq 16 --dim 16 --heads 2 --layers 2 --hidden 16 --experts 4 --eval-size 4 --eval-every 3 --warmup 2 "
    "--epochs 1000"
)


def run(out: Path, *flags: str, ranks: int = 1) -> Done:
    return script(
        ROOT / "examples" / "pretrain.py", *TINY.split(), "--out", str(out), *flags, ranks=ranks, alone=ranks == 1
    )


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
