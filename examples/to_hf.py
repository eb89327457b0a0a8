"""Write the newest checkpoint of pretrain.py as a model of Hugging Face, with its tokenizer.

    python examples/to_hf.py runs/pretrain trained                        # one process
    torchrun --standalone --nproc-per-node 4 examples/to_hf.py runs/pretrain trained     # what one cannot hold

The model has to be one that Mixtral can be (--moe-every 1) or Qwen3-MoE (--qk-norm); with any other setting that
they have not, nothing is written, and the setting is named. A run with --ema writes the average weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import launch
import trained
from command_line import Parser
from launch import say
from turnout.models.data.tokenizing import FILE
from turnout.moe.layer import moe_layers

try:
    from transformers import PreTrainedTokenizerFast
    from turnout.models.hf.gpt_format import byte_tokenizer, to_hf
except ModuleNotFoundError as error:
    launch.missing(error, "hf")


def convert(out: Path, folder: Path, device_type: str, dropless: bool = False) -> None:
    found = trained.newest(out, device_type, "fsdp" if launch.RANKS > 1 else "replicate")
    model = found.model
    for layer in moe_layers(model).values() if dropless else ():
        layer.capacity = None
    with found.averaged():
        to_hf(model, folder)
    if launch.RANK == 0:
        tokenizer_of(out).save_pretrained(folder)
    say(f"{found.path} is in {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}) reads it")


def tokenizer_of(out: Path) -> PreTrainedTokenizerFast:
    """Tokenizer of the data that the run was trained on."""
    if not (out / FILE).exists():
        return byte_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_file=str(out / FILE), clean_up_tokenization_spaces=False)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, help="--out of the run")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--dropless", action="store_true", help="leave out the capacity: then no token is dropped")
    return trained.run(parser, lambda args, device: convert(args.out, args.folder, device.type, args.dropless))


if __name__ == "__main__":
    sys.exit(main())
