"""Drop or merge the least used experts of what pretrain.py has trained, and compare the loss before and after.

    python examples/prune.py runs/pretrain runs/pruned --experts 6
    python examples/prune.py runs/pretrain runs/merged --experts 6 --merge

Loads are counted on the text that the run was trained on. Each layer drops its own experts.
pretrain.py --resume trains on, with the flags of the run and --experts.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import launch
import sources
import steps
import torch
import torch.nn.functional as F
import trained
from command_line import Parser, at_least
from launch import say
from torch import Tensor
from turnout.dispatch import Meshes
from turnout.models import GPT, ParallelModel, checkpoint
from turnout.moe import Gate
from turnout.moe.experts.sharded import whole
from turnout.moe.layer import moe_layers
from turnout.moe.upcycling import merge_experts, prune_experts


def pruned(args: Namespace, device: torch.device) -> dict[str, Any]:
    """Prune or merge the experts, save the model, and return figures."""
    if launch.RANKS > 1:
        raise ValueError("experts are dropped on one rank: start prune.py without torchrun")
    found = trained.newest(args.run, device.type)
    job = replace(found.job, batch=args.batch, eval_size=args.eval_size, epochs=10**9, out=str(args.out)).fit(1)
    if job.dense or not job.top_k <= args.experts < job.experts:
        raise ValueError(f"--experts ({args.experts}) must be from {job.top_k}, --top-k, to {job.experts - 1}")
    at_least(1, args, "batches")
    if checkpoint.newest(args.out):
        raise ValueError(f"{args.out} holds a checkpoint: name another folder")
    data = sources.Data.open(job)
    args.out.mkdir(parents=True, exist_ok=True)
    data.keep_tokenizer(args.out)
    meshes = Meshes.of(device.type)
    held_out, batches = data.held_out(job, meshes), data.batches(job, meshes)

    def bits(model: ParallelModel) -> float:
        return steps.evaluate(model, held_out.tokens, job, held_out.bytes_per_token)

    model = found.model
    with found.averaged():
        before = bits(model)
        loads = loads_of(model.parts[0], (batches(step).to(device) for step in range(args.batches)))
        plain = GPT(job.config()).to(device)  # a copy that `parallelize` has not spread
        plain.load_state_dict({name: whole(t) for name, t in model.parts[0].state_dict().items()})
    lost = []
    for name, tokens in loads.items():
        layer = moe_layers(plain)[name]
        groups = grouped(layer.gate, tokens, args.experts)
        lost.append(1 - float(sum(tokens[group[0]] for group in groups) / tokens.sum()))
        if args.merge:
            merge_experts(layer, groups, tokens)
        else:
            prune_experts(layer, [group[0] for group in groups])
        say(f"{name}: tokens of the experts {tokens.tolist()}; {lost[-1]:.1%} were of experts that are left out")
    job = replace(job, experts=args.experts, ep=1, ema=0.0).fit(1)
    smaller = steps.build(job, meshes)
    smaller.parts[0].load_state_dict(plain.state_dict())
    after = bits(smaller)
    optimizer = steps.optimizer_of(smaller, job)
    step = checkpoint.described(found.path)[0]
    checkpoint.save(args.out, smaller.parts, optimizer, step, {"job": asdict(job), "text": data.fingerprint})
    sizes = [sum(p.numel() for p in each.parameters()) for each in (model.parts[0], smaller.parts[0])]
    return {"before": before, "after": after, "parameters": sizes, "left_out": max(lost)}


def loads_of(model: GPT, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Tokens of each expert of each MoE layer, int64 [E], over batches of token ids, int64 [B, S + 1]."""
    layers, sums = moe_layers(model), {}
    model.eval()
    model.training = model.config.mtp > 0  # blocks of further tokens run in training alone; routers stay in eval mode
    for tokens in batches:
        model(tokens[:, :-1], targets=tokens[:, 1:])
        for name, layer in layers.items():
            sums[name] = sums.get(name, 0) + layer.stats.tokens_per_expert.cpu()
    return sums


def grouped(gate: Gate, tokens: Tensor, number: int) -> list[list[int]]:
    """The most used experts, each with those of the others whose row of the router is most like its own."""
    order = tokens.argsort(descending=True, stable=True).tolist()
    kept, rest = sorted(order[:number]), order[number:]
    assert isinstance(gate.weight, Tensor)
    rows = F.normalize(gate.weight.detach(), dim=1)
    groups = [[expert] for expert in kept]
    for expert in rest:
        groups[int((rows[kept] @ rows[expert]).argmax())].append(expert)
    return groups


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="--out of the run")
    parser.add_argument("out", type=Path, help="folder for the smaller model")
    parser.add_argument("--experts", type=int, required=True, help="number of experts that each layer keeps")
    parser.add_argument("--merge", action="store_true", help="merge the others into those whose router rows are alike")
    parser.add_argument("--batches", type=int, default=8, help="number of batches to count loads on")
    parser.add_argument("--batch", type=int, default=32, help="number of sequences in a batch")
    parser.add_argument("--eval-size", type=int, default=128, help="number of held-out sequences")
    return trained.run(parser, lambda args, device: json.dumps(pruned(args, device)))


if __name__ == "__main__":
    sys.exit(main())
