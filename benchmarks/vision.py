"""How fast is SwinV2-MoE on a CPU, beside its dense twin of equal active FLOPs and a padded loop over experts?

    OMP_NUM_THREADS=1 python benchmarks/vision.py
    OMP_NUM_THREADS=1 python benchmarks/vision.py --batch 4 --rounds 3 --only layers

`model` is SwinV2-T with 8 experts in every other block of its last two stages, on images of 128 x 128 pixels. `layer`
is one feed-forward network of its third or fourth stage with its norm, on the tokens of the same batch. The padded loop
has the gate and the dropping order of the layer, and its parameters. It computes one expert after the other, each on as
many rows as the capacity allows.

All contenders run in turn in each round. Results are medians over rounds, as ratios to the dense twin. Training is
forward and backward, without an optimizer's step; inference is in eval mode without gradients.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from layer import measure
from torch import Tensor, nn
from turnout.models import Swin, SwinConfig
from turnout.models.swin_blocks import SwinBlock
from turnout.moe import MoE, aux_loss
from turnout.moe.capacity import drop_over_capacity
from turnout.moe.layer import moe_layers

SIZE = 128


def padded_loop(layer: MoE, x: Tensor) -> Tensor:
    """The layer with a block of rows for each expert, padded to its capacity, in plain PyTorch."""
    tokens, experts, capacity = x.flatten(0, -2), layer.experts, layer.capacity
    assert capacity is not None
    routing = layer.gate(tokens)
    limit = capacity.limit(layer.top_k, len(tokens), layer.num_experts, layer.training)
    assert limit is not None
    kept = drop_over_capacity(routing, limit, capacity.drop)
    y = torch.zeros_like(tokens)
    matrices = (experts.w_up, experts.b_up, experts.w_down, experts.b_down)
    for e, (up, b_up, down, b_down) in enumerate(zip(*(p.unbind(0) for p in matrices), strict=True)):
        index, choice = (kept.expert == e).nonzero(as_tuple=True)
        rows = F.pad(tokens[index], (0, 0, 0, limit - len(index)))
        rows = F.gelu(torch.addmm(b_up, rows, up))
        rows = F.layer_norm(torch.addmm(b_down, rows, down), tokens.shape[1:])
        y = y.index_add(0, index, rows[: len(index)] * kept.weight[index, choice].unsqueeze(1))
    return y.view_as(x)


def looped(model: nn.Module) -> nn.Module:
    """A copy of the model whose MoE layers are padded loops."""
    model = deepcopy(model)
    for layer in moe_layers(model).values():
        layer.forward = partial(padded_loop, layer)
    return model


class Network(nn.Module):
    """The feed-forward network of a block, and its norm."""

    def __init__(self, block: SwinBlock) -> None:
        super().__init__()
        self.network, self.norm = block.feed_forward, block.feed_forward_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.network(x))


def training(model: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()

    def run() -> None:
        model.train()
        model.zero_grad()
        x.grad = None
        y = model(x)
        aux_loss(model, keep=False)
        y.square().mean().backward()

    return run


def inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model.eval()
        model(x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--only", choices=["model", "layers"], help="default: both")
    args = parser.parse_args()
    torch.manual_seed(0)
    moe, dense = Swin(SwinConfig()), Swin(SwinConfig(moe_stages=0))
    for p in [*moe.parameters(), *dense.parameters()]:
        if p.ndim == 1:  # norms start at 0, with which backward would have less to do
            nn.init.ones_(p)
    flops = [model.flops_per_image(SIZE, SIZE) / 1e9 for model in (dense, moe)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.rounds} rounds, batch {args.batch}")
    print(f"GFLOPs an image, forward and backward: dense {flops[0]:.2f}, MoE {flops[1]:.2f}\n")
    cases: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {}
    if args.only != "layers":
        cases["model"] = dense, moe, torch.randn(args.batch, 3, SIZE, SIZE)
    for stage in (2, 3) if args.only != "model" else ():
        blocks = [model.stages[stage].blocks[1] for model in (dense, moe)]
        sides = moe.config.sides(SIZE, SIZE)[stage]
        x = torch.randn(args.batch, sides[0] * sides[1], moe.config.width(stage))
        cases[f"layer of stage {stage + 1}, {x.shape[0] * x.shape[1]} tokens"] = (*map(Network, blocks), x)
    runs = {}
    for what, (one, other, x) in cases.items():
        loop = looped(other)
        torch.testing.assert_close(other.eval()(x), loop.eval()(x), atol=1e-3, rtol=1e-3)
        for how in (training, inference):
            for name, model in {"dense": one, "MoE": other, "padded loop": loop}.items():
                runs[what, how.__name__, name] = how(model, x)
    times = {key: statistics.median(seconds) for key, seconds in measure(runs, args.rounds).items()}
    print("| what | | dense ms | MoE / dense | padded loop / dense | MoE / padded loop |\n|---|---|---|---|---|---|")
    for what in cases:
        for how in ("training", "inference"):
            base, ours, loop = (times[what, how, name] for name in ("dense", "MoE", "padded loop"))
            print(f"| {what} | {how} | {base * 1e3:.1f} | {ours / base:.2f} | {loop / base:.2f} | {ours / loop:.2f} |")


if __name__ == "__main__":
    main()
