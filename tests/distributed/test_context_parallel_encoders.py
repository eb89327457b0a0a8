"""A BERT or T5 whose sequences are split over ranks trains as one rank does: losses, gradients, and weights after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import close, whole
from ranks import run
from test_tensor_parallel_encoders import build
from torch import Tensor
from turnout.dispatch import Meshes
from turnout.models import (
    BERT,
    T5,
    BERTConfig,
    ParallelModel,
    SequenceSplit,
    T5Config,
    context_parallel,
    data_parallel,
    next_token_loss,
    parallel_model,
    recompute,
    tensor_parallel,
)
from turnout.models.blocks import Attention, Block
from turnout.models.context_parallel import Ulysses
from turnout.moe import Balance, aux_loss, parallelize, param_groups
from turnout.moe.parallel.parallelize import moe_layers


@dataclass(frozen=True)
class Case:
    """Ranks, axes, and how a model is built and trained on them."""

    ranks: int
    axes: dict[str, int]
    longest: float | None = 1.0  # of the sequences without their padding, as a share; None: no masks
    over: str | None = "sequence"  # tokens of a balance loss; None: a dense model
    data: str = "replicate"
    recompute: str = "none"
    compile: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, kind: str) -> BERT | T5:
        if self.over is None:
            return build(kind, seq_len=12, moe_every=0, **self.options)
        moe = {"balance": Balance(0.1, over=self.over, z_loss=1e-2), "shared": 1, **self.options.get("moe", {})}
        return build(kind, seq_len=12, **self.options | {"moe": moe})

    def spread(self, kind: str) -> ParallelModel:
        meshes = Meshes.of("cpu", **self.axes)
        model = recompute(self.build(kind), self.recompute)
        split = SequenceSplit.of(model.config, meshes)
        context_parallel(tensor_parallel(model, meshes.dense["tp"]), split)
        if moe_layers(model):
            parallelize(model, meshes)
        for block in model.modules() if self.compile else ():
            if isinstance(block, Block):
                block.compile(backend="eager")
        data_parallel(model, meshes, self.data)
        return ParallelModel([model], split, 1, self.data, None, activations_on_cpu=False)


CASES = {
    "cp2 tp2 ep4": Case(4, {"cp": 2, "tp": 2, "ep": 4}, options={"qk_norm": True, "attention_bias": True}),
    "cp2": Case(2, {"cp": 2}, longest=None, over="local", options={"moe_every": 1}),
    "dp2 cp2 ep2 fsdp": Case(4, {"cp": 2, "ep": 2}, over="global", data="fsdp"),
    "cp2 ep2 zero2": Case(2, {"cp": 2, "ep": 2}, over="local", data="zero2", recompute="full"),
    "cp4 few kv heads": Case(4, {"cp": 4, "ep": 2}, 0.5, recompute="selective", options={"kv_heads": 1}),
    "dp2 cp2 dense zero1": Case(4, {"cp": 2}, over=None, data="zero1", options={"qk_norm": True}),
    "cp2 tp2 hash": Case(
        4, {"cp": 2, "tp": 2, "ep": 2}, options={"moe": {"gate": "hash", "balance": Balance(0.1, over="sequence")}}
    ),
    "cp2 compiled": Case(2, {"cp": 2, "ep": 2}, compile=True, options={"layers": 1, "moe_every": 1}),
}


def batch(kind: str, longest: float | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs and targets of four sequences; in some, padding fills the second half, and no target is there at all."""
    lengths = torch.tensor([[1.0], [0.5], [0.2], [0.8]]) * (longest or 1.0)
    generator = torch.Generator().manual_seed(1)
    read, written = (torch.randint(250, (4, length), generator=generator) for length in (8, 4))
    real, known = (torch.arange(n) / n < lengths for n in (8, 4))
    if kind == "bert":
        targets = read.flip(1).masked_fill(~real, -100)
        targets[:, 4:] = -100
        return ((read, real, (read > 100).long()), targets) if longest else ((read,), read.flip(1))
    targets = written.flip(1).masked_fill(~known, -100)
    targets[:, 2:] = -100
    return ((read, written, real, known), targets) if longest else ((read, written), written.flip(1))


def of_one(kind: str, case: Case, data_ranks: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Losses [2, 2] of two steps, and the gradients of the first one and the weights after both."""
    model = case.build(kind)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    given, targets = batch(kind, case.longest)
    losses, gradients = [], {}
    for _ in range(2):
        parts = zip(model(*given).chunk(data_ranks), targets.chunk(data_ranks), strict=True)
        task, aux = torch.stack([next_token_loss(x, y) for x, y in parts]).mean(), torch.as_tensor(aux_loss(model))
        (task + aux).backward()
        losses.append(torch.stack([task, aux]).detach().double())
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), [gradients, {name: p.detach() for name, p in model.named_parameters()}]


def of_many(kind: str, case: Case, losses: Tensor, expected: list[dict[str, Tensor]]) -> None:
    model = case.spread(kind)
    assert all(isinstance(module.core, Ulysses) for module in model.modules() if isinstance(module, Attention))
    dp = model.meshes.dense["dp"]
    inputs, targets = batch(kind, case.longest)
    *given, targets = [x.chunk(dp.size())[dp.get_local_rank()] for x in (*inputs, targets)]
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    for number, expectation in enumerate(losses):
        found = torch.stack(model.step(tuple(given), targets))
        torch.distributed.all_reduce(found)
        close(found / torch.distributed.get_world_size(), expectation, 1e-12, "losses")
        for name, p in model.parts[0].named_parameters() if not number else ():
            close(whole(p.grad), expected[0][name.replace("_orig_mod.", "")], 1e-13, name)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.parts[0].named_parameters():
        close(whole(p), expected[1][name], 1e-9, name)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("bert", "t5") for name in CASES])
def test_split_sequences_train_as_on_one_rank(kind, name):
    case = CASES[name]
    data_ranks = 2 if name.startswith("dp2") else 1
    run(case.ranks, of_many, kind, case, *of_one(kind, case, data_ranks))


def dropped() -> list[Tensor]:
    model = context_parallel(build("t5", dropout=0.4), SequenceSplit.of(build("t5").config, Meshes.of("cpu", cp=2)))
    seen = []
    for part in (model.dropout, model.encoder_dropout, model.decoder_dropout):
        part.register_forward_hook(lambda *call: seen.append(call[-1] == 0))
    source, target = batch("t5")[0]
    torch.manual_seed(7)
    model(source, target)
    return seen


def test_ranks_drop_different_elements_of_their_part_of_source_and_target():
    first, second = run(2, dropped)
    assert [tuple(each.shape) for each in first] == [(4, 4, 16), (4, 4, 16), (4, 2, 16), (4, 2, 16)]
    for one, two in zip(first, second, strict=True):
        assert all(0.2 < each.double().mean() < 0.6 for each in (one, two))
        assert not torch.equal(one, two)


def in_bf16(kind: str, cp: int, data: str) -> tuple[float, Tensor]:
    torch.manual_seed(0)
    sizes = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 12, "seq_len": 8, "norm": "layer"}
    config = BERTConfig(**sizes) if kind == "bert" else T5Config(**sizes)
    model = parallel_model(config, Meshes.of("cpu", cp=cp), data=data, bf16=True)
    inputs, targets = batch(kind, 1.0)
    loss = model.step(inputs if kind == "t5" else inputs[:2], targets).task
    block = model.parts[0].blocks[0] if kind == "bert" else model.parts[0].decoder[0]
    return float(loss), whole((block.cross or block.attention).query.weight.grad)


@pytest.mark.parametrize("data", ["replicate", "fsdp"])
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_bf16_agrees_with_one_rank(kind, data):
    ((loss, gradient),) = run(1, in_bf16, kind, 1, data)
    for found, again in run(2, in_bf16, kind, 2, data):
        assert found == pytest.approx(loss, abs=1e-4)
        assert (again - gradient).norm() < 0.02 * gradient.norm()
