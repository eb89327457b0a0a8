"""A Hugging Face model trains as on one rank while its experts are spread: in a loop of one's own, and by Trainer."""

import os
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.models.hf import load_adapters, replace_moe, restored
from turnout.moe import clip_grad_norm_, fully_shard_experts, parallelize, param_groups, sync_gradients
from turnout.moe.adapters import add_lora, lora_parameters

pytest.importorskip("accelerate", reason='needs transformers and accelerate: pip install -e ".[hf]"')
from hf_families import tiny
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from turnout.models.hf.trainer import MoETrainer

STEADY = {"router_jitter_noise": 0.0}  # noise is drawn by each rank
SEQUENCES = [[(2, 1, 0, 3), (1, 1, 2, 0)], [(1, 0, 0, 0), (2, 2, 1, 1)], [(0, 3, 1, 1)]]  # [step][micro-batch][rank]


def texts(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 2 to 9 tokens, padded; the padding is masked, and of no loss."""
    draw, made = torch.Generator().manual_seed(seed), []
    for length in torch.randint(2, 10, (number,), generator=draw).tolist():
        ids = torch.randint(3, 64, (9,), generator=draw)
        real = torch.arange(9) < length
        made.append({"input_ids": ids.where(real, 0), "labels": ids.where(real, -100), "attention_mask": real.long()})
    return made


def stacked(sequences: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in sequences]) for name in sequences[0]}


def nothing(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a rank without sequences takes: attention of transformers refuses an empty batch."""
    return {name: t[:1] for name, t in batch.items()} | {"labels": torch.full((1, 9), -100)}


def loop(spread: bool) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """(Loss, gradient norm) of each step, and the weights at the end, on rank 0."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    model, mesh = tiny("mixtral", **STEADY).train(), None
    if spread:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
        parallelize(replace_moe(model), mesh, dispatcher="flat")
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    told = []
    for step, counts in enumerate(SEQUENCES):
        batches = [stacked(texts(sum(each), seed=10 * step + i)) for i, each in enumerate(counts)]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)  # on all ranks
        total = torch.zeros(())
        for batch, each in zip(batches, counts, strict=True):
            first = sum(each[:rank])
            mine = {name: t[first : first + each[rank]] for name, t in batch.items()} if spread else batch
            mine = mine if len(mine["labels"]) else nothing(batch)
            loss = model(**mine, num_items_in_batch=tokens).loss
            (loss * world).backward()
            total += loss.detach()
        if spread:
            sync_gradients(model, mesh)
            dist.all_reduce(total)
        norm = clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        told.append((float(total), float(norm)))
    return told, weights(model, spread)


def weights(model: torch.nn.Module, spread: bool) -> dict[str, torch.Tensor]:
    if not spread:
        return model.state_dict()
    with restored(model):
        return {name: t.clone() for name, t in model.state_dict().items()}


def assert_alike(got: tuple, expected: tuple) -> None:
    assert got[0] == [pytest.approx(step, rel=1e-4) for step in expected[0]]
    assert got[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(got[1][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_a_loop_with_accumulation_and_uneven_ranks():
    expected, got = loop(spread=False), ranks.run(4, loop, True)
    assert len({round(loss, 3) for loss, _ in expected[0]}) == len(SEQUENCES)
    assert_alike(got[0], expected)


class Steps(TrainerCallback):
    """(Loss, gradient norm) of each step."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float]] = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.told.append((logs["loss"], logs["grad_norm"]))


def arguments(out: Path, **more) -> TrainingArguments:
    """20 sequences, 8 a step on all ranks together: the third step of an epoch has 4."""
    as_by_torchrun()
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    sizes = {
        "per_device_train_batch_size": 4 // dist.get_world_size(),
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
    }
    how = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    return TrainingArguments(str(out), **(quiet | sizes | how | more))


def as_by_torchrun() -> None:
    """What Accelerate reads."""
    rank, world = dist.get_rank(), dist.get_world_size()
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in given.items()}


def by_trainer(
    out: Path, save: str, mesh_of: dict[str, int] | None = None, fsdp: bool = False, resume: Path | None = None
) -> tuple:
    """(Loss, gradient norm) of each step, the weights at the end on rank 0, and the loss of an evaluation."""
    args, model, steps, more = arguments(out, save_strategy=save), tiny("mixtral", **STEADY), Steps(), {}
    if mesh_of:
        mesh = init_device_mesh("cpu", tuple(mesh_of.values()), mesh_dim_names=tuple(mesh_of))
        with torch.no_grad():
            model.lm_head.weight += dist.get_rank()  # a head that each rank has drawn by itself
        parallelize(replace_moe(model), mesh, dispatcher="flat")
        with torch.no_grad():
            for layer in model.model.layers if "edp" in mesh_of else ():
                layer.mlp.experts.module.down_proj += mesh["edp"].get_local_rank()  # and experts that went apart
        if fsdp:
            fully_shard_experts(model, mesh)
            fully_shard(model, mesh=mesh._flatten())
        more = {"mesh": mesh}
    trainer = (MoETrainer if mesh_of else Trainer)(
        model=model, args=args, train_dataset=texts(20, 1), eval_dataset=texts(8, 2), callbacks=[steps], **more
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    loss = trainer.evaluate()["eval_loss"]
    return steps.told, weights(model, bool(mesh_of)), loss


def test_trainer_and_what_it_goes_on_with(tmp_path):
    [expected] = ranks.run(1, by_trainer, tmp_path / "one", "steps")
    assert len(expected[0]) == 3
    got = ranks.run(4, by_trainer, tmp_path / "four", "steps", {"edp": 2, "ep": 2})
    assert_alike(got[0], expected)
    assert [loss for _, _, loss in got] == [pytest.approx(expected[2], rel=1e-4)] * 4

    plain, spread = (load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("one", "four"))
    assert_alike(([], spread), ([], plain))  # in the family's format

    saved = tmp_path / "four" / "checkpoint-2"
    elsewhere = {"edp": 2, "ep": 1}, True, saved  # another mesh, and FSDP2
    [resumed, _] = ranks.run(2, by_trainer, tmp_path / "four", "no", *elsewhere)
    assert_alike(resumed, (expected[0][2:], *expected[1:]))


def with_adapters(out: Path, save: str, resume: Path | None = None) -> tuple[list, dict[str, torch.Tensor]]:
    """(Loss, gradient norm) of each step, and the adapters at the end, whole."""
    args, steps = arguments(out, save_strategy=save), Steps()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    model = parallelize(add_lora(replace_moe(tiny("mixtral", **STEADY)), 4), mesh, dispatcher="flat")
    trainer = MoETrainer(model=model, args=args, train_dataset=texts(20, 1), mesh=mesh, callbacks=[steps])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return steps.told, {name: whole(p) for name, p in lora_parameters(model).items()}


def test_adapters_are_saved_alone_and_go_on(tmp_path):
    [(told, adapters), _] = ranks.run(2, with_adapters, tmp_path, "steps")
    read = add_lora(replace_moe(tiny("mixtral", **STEADY)), 4)
    load_adapters(read, tmp_path / "checkpoint-3")
    assert lora_parameters(read).keys() == adapters.keys()
    assert all(torch.equal(p, adapters[name]) for name, p in lora_parameters(read).items())
    assert any(adapters[name].any() for name in adapters if name.endswith(".b"))
    assert not list((tmp_path / "checkpoint-3").glob("model*"))
    [(resumed, again)] = ranks.run(1, with_adapters, tmp_path, "no", tmp_path / "checkpoint-2")
    assert_alike((resumed, again), (told[2:], adapters))


def with_peft(out: Path) -> dict[str, torch.Tensor]:
    """The adapters at the end, whole: those of experts, and PEFT's of attention, which learn together."""
    import peft

    args = arguments(out, save_steps=3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    attention = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])
    model = add_lora(peft.get_peft_model(replace_moe(tiny("mixtral", **STEADY)), attention), 4)
    trainer = MoETrainer(
        model=parallelize(model, mesh, dispatcher="flat"), args=args, train_dataset=texts(20, 1), mesh=mesh
    )
    trainer.train()
    return {name: whole(p.detach()) for name, p in model.named_parameters() if "lora" in name}


def test_adapters_of_peft_learn_and_are_saved_beside_those_of_experts(tmp_path):
    peft = pytest.importorskip("peft", reason='needs peft: pip install -e ".[peft]"')
    [expected], [adapters, _] = ranks.run(1, with_peft, tmp_path / "one"), ranks.run(2, with_peft, tmp_path / "two")
    assert_alike(([], adapters), ([], expected))
    assert all(adapters[name].any() for name in adapters)
    read = peft.PeftModel.from_pretrained(tiny("mixtral", **STEADY), tmp_path / "two" / "checkpoint-3")
    for name, p in read.named_parameters():
        if "q_proj.lora" in name:
            assert torch.equal(p, adapters[name]), name
    b = read.base_model.model.model.layers[0].mlp.experts.lora_B["default"].weight  # [out, r * E]
    [ours] = [p for name, p in adapters.items() if "layers.0.mlp.experts.lora.default.down_proj.b" in name]
    assert torch.equal(b.unflatten(1, (4, -1)).permute(2, 0, 1), ours)


def other_order(out: Path) -> str:
    import peft

    model = add_lora(replace_moe(tiny("mixtral")), 4)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    with pytest.raises(ValueError, match="PEFT has frozen the adapters of experts") as told:
        MoETrainer(model=parallelize(wrapped, mesh), args=arguments(out), train_dataset=texts(20, 1), mesh=mesh)
    return str(told.value)


def test_adapters_that_peft_has_frozen_are_told_of(tmp_path):
    pytest.importorskip("peft", reason='needs peft: pip install -e ".[peft]"')
    assert "add_lora afterwards" in ranks.run(1, other_order, tmp_path)[0]


def refusals(out: Path) -> list[str]:
    mesh, said = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",)), []
    bridged = parallelize(replace_moe(tiny("mixtral")), mesh)
    for model, more in [
        (tiny("mixtral"), {}),
        (bridged, {"accelerator_config": {"even_batches": False}}),
        (bridged, {"save_only_model": True, "max_steps": 2}),
        (bridged, {"save_on_each_node": True}),
        (bridged, {"save_only_model": True, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}),
    ]:
        try:
            data = {"train_dataset": texts(20, 1), "eval_dataset": texts(8, 2)}
            trainer = MoETrainer(model=model, args=arguments(out, **more), mesh=mesh, **data)
            trainer.train()
            trainer.train(resume_from_checkpoint=True)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_trainer_cannot_do_is_said(tmp_path):
    [(not_bridged, uneven, only_model, each_node, best)] = ranks.run(1, refusals, tmp_path)
    assert "no layer that replace_moe put there" in not_bridged
    assert "even_batches=False leaves ranks without a last batch" in uneven
    assert "checkpoint-2 holds nothing that MoETrainer can go on with" in only_model
    assert "rank 0 alone gets the whole model" in each_node
    assert "save_only_model=True leaves out" in best


def push(out: Path) -> list[dict[str, torch.Tensor]]:
    """What was in the folder each time that something was pushed."""
    mesh, pushed = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",)), []

    class Pushing(MoETrainer):
        def push_to_hub(self, **_):
            self.save_model(_internal_call=True)  # as Trainer does first
            pushed.append(load_file(out / "model.safetensors"))

    model = parallelize(replace_moe(tiny("mixtral")), mesh)
    trainer = Pushing(model=model, args=arguments(out), mesh=mesh, train_dataset=texts(20, 1))
    trainer.args.push_to_hub = True
    trainer.save_model()
    return pushed


def test_a_saved_model_is_pushed(tmp_path):
    [[pushed]] = ranks.run(1, push, tmp_path)
    torch.testing.assert_close(pushed["lm_head.weight"], tiny("mixtral").lm_head.weight)
