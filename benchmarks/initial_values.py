"""The main job with other initial values of its routers and experts: does it learn better?

    OMP_NUM_THREADS=1 python benchmarks/initial_values.py --scale-routers 0 --config examples/configs/quick.toml

It takes all flags of examples/pretrain.py as well. docs/records/quality.md has the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # before the imports from there

import pretrain
import steps
from turnout.models import ParallelModel
from turnout.moe.layer import moe_layers


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scale-routers", type=float, default=1.0, help="factor of the weights of routers")
    parser.add_argument("--scale-experts", type=float, default=1.0, help="factor of the weights of experts")
    scales, flags = parser.parse_known_args()
    build = steps.build

    @torch.no_grad()
    def scaled(*args, **options) -> ParallelModel:
        model = build(*args, **options)
        for layer in moe_layers(model).values():
            for p in layer.gate.parameters():
                p.mul_(scales.scale_routers)
            for p in layer.experts.parameters():
                p.mul_(scales.scale_experts)
        return model

    steps.build = scaled
    sys.argv[1:] = flags
    return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
