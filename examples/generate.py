"""Let the model of pretrain.py's newest checkpoint continue a prompt, token by token.

    python examples/generate.py runs/pretrain --prompt "def main(" --length 100
    python examples/generate.py runs/pretrain --temperature 0              # greedy: always the most likely token
    torchrun --standalone --nproc-per-node 4 examples/generate.py runs/pretrain    # experts spread over 4 ranks

The text goes to standard output. Prompt and text together have at most as many tokens as --seq of the run.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
import trained
from command_line import Parser
from turnout.models import generate
from turnout.models.data.tokenizing import FILE, Bytes, tokenizer_of, words_of


def texts(args: Namespace, device: torch.device) -> list[str]:
    """The prompt with what each sample adds to it. All ranks return the same."""
    tokenizer = tokenizer_of(str(args.out)) if (args.out / FILE).exists() else Bytes()
    (ids,) = tokenizer.encode([args.prompt])
    prompt = torch.tensor([list(ids)], dtype=torch.int64, device=device)
    if not prompt.numel():
        raise ValueError("--prompt is empty: give at least one token to continue")
    if args.samples < 1:
        raise ValueError(f"--samples must be positive; got {args.samples}")
    found = trained.newest(args.out, device.type)
    length = found.job.seq - prompt.shape[1] if args.length is None else args.length
    with found.averaged():
        tokens = generate(
            found.model.parts[0],
            prompt.expand(args.samples, -1),
            length,
            temperature=args.temperature,
            top_p=args.top_p,
            generator=torch.Generator(device).manual_seed(args.seed),
            group=dist.group.WORLD,
        )
    words = words_of(args.out)
    return [words(row) for row in tokens.tolist()]


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, help="--out of the run")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    parser.add_argument("--length", type=int, help="number of tokens to add (default: up to --seq of the run)")
    parser.add_argument("--temperature", type=float, default=0.8, help="divisor of the logits; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95, help="probability of the tokens to sample from")
    parser.add_argument("--samples", type=int, default=1, help="number of texts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    return trained.run(parser, lambda args, device: "\n\n".join(texts(args, device)))


if __name__ == "__main__":
    sys.exit(main())
