"""transformers' auxiliary loss in a step: the same at every number of ranks and micro-batches."""

import os
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.models.hf import replace_moe, restore_moe
from turnout.moe import parallelize, sync_gradients

pytest.importorskip("accelerate", reason='needs transformers and accelerate: pip install -e ".[hf]"')
from hf_families import FAMILIES, LOSSLESS, tiny
from hf_families import batch as asked_of
from reference import close
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from turnout.models.hf.trainer import MoETrainer

STEADY = {"router_aux_loss_coef": 0.7}  # as large as the rest of the loss


def sequences(number: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Of 2 to 9 tokens, padded; some tokens are of no loss."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (number, 9), generator=draw)
    real = torch.arange(9) < torch.randint(2, 10, (number, 1), generator=draw)
    told = real & (torch.rand(number, 9, generator=draw) < 0.7)
    return {"input_ids": ids.where(real, 0), "labels": ids.where(told, -100), "attention_mask": real.long()}


def step(model: nn.Module, batches: list[dict], world: int, mesh=None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step, all ranks' together, and its gradients, whole."""
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    rank, total = (dist.get_rank() if world > 1 else 0), torch.zeros(())
    for batch in batches:
        mine = {name: t.tensor_split(world)[rank] for name, t in batch.items()}
        loss = model(**mine, num_items_in_batch=items, output_router_logits=True).loss
        (loss * world).backward()
        total += loss.detach()
    if mesh is not None:
        sync_gradients(model, mesh)
        dist.all_reduce(total)
        restore_moe(model)
    return float(total), {name: p.grad.clone() for name, p in model.named_parameters()}


def spread(steps: list[list[dict]]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Each of the steps, from the same weights."""
    world, taken = dist.get_world_size(), []
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    for batches in steps:
        model = parallelize(replace_moe(tiny("qwen3_moe", **STEADY).train()), mesh, dispatcher="flat")
        taken.append(step(model, batches, world, mesh))
    return taken


def assert_same(got: tuple, expected: tuple) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for name, grad in expected[1].items():
        assert close(got[1][name], grad, 1e-4), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_is_that_of_one_rank_without_accumulation(world):
    """Micro-batches of the same sequences, so that each has the f and P of all of them."""
    once = sequences(5)
    both = {name: torch.cat([t, t]) for name, t in once.items()}
    expected = step(tiny("qwen3_moe", **STEADY).train(), [both], 1)
    for got in ranks.run(world, spread, [[both], [once, once]])[0]:
        assert_same(got, expected)


def test_other_micro_batches_are_averaged_by_their_labels():
    """On two ranks as on one; and the loss is that of transformers for each micro-batch, by its share of labels."""
    batches, model = [sequences(3, seed=1), sequences(4, seed=2)], tiny("qwen3_moe", **STEADY).train()
    [[one]], [[two], _] = ranks.run(1, spread, [batches]), ranks.run(2, spread, [batches])
    assert_same(two, one)
    labels = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    means = [float(model(**each, output_router_logits=True).loss.detach()) for each in batches]
    assert labels[0] != labels[1]
    assert one[0] == pytest.approx(sum(n * mean for n, mean in zip(labels, means, strict=True)) / sum(labels), rel=1e-5)


def test_means_and_other_blocks_are_left_alone():
    asked = {**sequences(5), "output_router_logits": True}
    plain = tiny("qwen3_moe", **STEADY)
    bridged = replace_moe(replace_moe_twice(tiny("qwen3_moe", **STEADY)))
    expected = plain(**asked)
    got = bridged(**asked)
    torch.testing.assert_close((got.loss, got.aux_loss), (expected.loss, expected.aux_loss))
    half = plain(**asked, num_items_in_batch=7).loss
    torch.testing.assert_close(restore_moe(bridged)(**asked, num_items_in_batch=7).loss, half)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - LOSSLESS - {"qwen3_moe", "switch_transformers"}))
def test_each_family_has_the_loss_that_is_scaled(family):
    model, asked = replace_moe(tiny(family)), asked_of(family)
    whole = model(**asked, num_items_in_batch=(asked["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(whole.loss, model(**asked).loss)
    half = model(**asked, num_items_in_batch=2 * (asked["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(half.loss, whole.loss / 2)


def replace_moe_twice(model: nn.Module) -> nn.Module:
    """The second bridge has no second hook."""
    return restore_moe(replace_moe(model))


def test_what_cannot_be_scaled_is_refused(monkeypatch):
    model = replace_moe(tiny("qwen3_moe", **STEADY))
    asked = {**sequences(5), "num_items_in_batch": 20, "output_router_logits": True}
    with pytest.raises(ValueError, match="return_dict=False"):
        model(**asked, return_dict=False)
    known = "transformers.models.qwen3_moe.modeling_qwen3_moe.load_balancing_loss_func"
    monkeypatch.setattr(known, lambda logits, *_: logits[0].square().mean())
    with pytest.raises(ValueError, match="cannot be scaled for num_items_in_batch"):
        model(**asked)


class InOrder(MoETrainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset or self.train_dataset)


def by_trainer(out: Path, accumulation: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """(Loss, gradient norm) of each of two steps of 8 sequences, which are twice the same 4, and the weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in given.items()}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 8 // world // accumulation, "gradient_accumulation_steps": accumulation}
    args = TrainingArguments(str(out), max_steps=2, learning_rate=1e-2, **quiet, **sizes)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    model = parallelize(replace_moe(tiny("qwen3_moe", **STEADY, output_router_logits=True)), mesh, dispatcher="flat")
    four = [sequences(4, seed=1), sequences(4, seed=2)]
    data = [{name: t[i] for name, t in each.items()} for each in four for _ in range(2) for i in range(4)]
    trainer = InOrder(model=model, args=args, train_dataset=data, mesh=mesh)
    trainer.train()
    restore_moe(model)
    logged = [(each["loss"], each["grad_norm"]) for each in trainer.state.log_history if "grad_norm" in each]
    return logged, {name: p.detach().clone() for name, p in model.named_parameters()}


def by_trainer_too(out: Path) -> list[tuple]:
    return [by_trainer(out, accumulation) for accumulation in (1, 2)]


def test_by_trainer(tmp_path):
    [[expected, *got]], [more, _] = ranks.run(1, by_trainer_too, tmp_path), ranks.run(2, by_trainer_too, tmp_path)
    assert len(expected[0]) == 2
    for logged, weights in (*got, *more):
        assert logged == [pytest.approx(step, rel=1e-4) for step in expected[0]]
        for name, weight in expected[1].items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
