"""Write the newest checkpoint of pretrain.py as a model of Hugging Face, with its tokenizer.

    python examples/to_hf.py runs/pretrain trained                        # one process
    torchrun --standalone --nproc-per-node 4 examples/to_hf.py runs/pretrain trained     # what one cannot hold

The model has to be one that Mixtral can be (--moe-every 1) or Qwen3-MoE (--qk-norm); with any other setting that
they have not, nothing is written, and the setting is named.
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import timedelta
from pathlib import Path

import launch
import steps
from launch import say
from options import Job
from transformers import PreTrainedTokenizerFast
from turnout.dispatch import Meshes
from turnout.models import checkpoint
from turnout.models.data.tokenizing import FILE
from turnout.models.hf.gpt_format import byte_tokenizer, to_hf
from turnout.moe.parallel.parallelize import moe_layers


def convert(out: Path, folder: Path, device_type: str, dropless: bool = False) -> None:
    newest = checkpoint.newest(out)
    if newest is None:
        raise ValueError(f"{out} has no checkpoint: name the --out of a run of pretrain.py")
    _, extra = checkpoint.described(newest)
    known = {name: value for name, value in extra["job"].items() if name in Job.__dataclass_fields__}
    exact = {"bf16": False, "fp16": False, "data_parallel": "fsdp" if launch.RANKS > 1 else "replicate"}
    sizes = {"pp": 1, "cp": 1, "tp": 1, "ep": 0, "etp": 1, "micro_batches": 1}
    sizes |= {"batch": launch.RANKS, "eval_size": launch.RANKS}
    job = Job(**known | exact | sizes).fit(launch.RANKS)
    model = steps.build(job, Meshes.of(device_type, ep=job.ep))
    checkpoint.load(newest, model.parts, steps.adamw(model, job.lr))
    for layer in moe_layers(model).values() if dropless else ():
        layer.capacity = None
    to_hf(model, folder)
    if launch.RANK == 0:
        tokenizer_of(out).save_pretrained(folder)
    say(f"{newest} is in {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}) reads it")


def tokenizer_of(out: Path) -> PreTrainedTokenizerFast:
    """Tokenizer of the data that the run was trained on."""
    if not (out / FILE).exists():
        return byte_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_file=str(out / FILE), clean_up_tokenization_spaces=False)


def main() -> int:
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="--out of the run")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--dropless", action="store_true", help="leave out the capacity: then no token is dropped")
    args = parser.parse_args()
    with launch.process_group(timedelta(minutes=10)) as device:
        try:
            convert(args.out, args.folder, device.type, args.dropless)
        except (ValueError, checkpoint.CheckpointError) as error:
            launch.once(str(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
