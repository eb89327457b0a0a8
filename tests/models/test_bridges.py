"""Hugging Face models whose MoE blocks are ours compute what they computed before."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from turnout.models.hf import BridgedMoE, FusedExperts, Parts, RouterGate, replace_moe, restore_moe
from turnout.moe.replay import record, replay

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from hf_families import FAMILIES, LOSSLESS, batch, tiny

RELAID = {"dbrx", "switch_transformers"}  # whose parameters become others: a view, a copy
TOLERANCE = 1e-5


def difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest, relative to the largest expected."""
    return float(((expected - got).abs().max() / expected.abs().max().clamp(min=1e-20)).detach())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def layers(model: nn.Module) -> list[BridgedMoE]:
    return [module for module in model.modules() if isinstance(module, BridgedMoE)]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_losses_and_gradients_are_the_originals(family, train):
    outputs, models = [], [tiny(family), replace_moe(tiny(family))]
    assert not layers(models[0])
    assert layers(models[1])
    for model in models:
        torch.manual_seed(1)  # of the noise that some routers add in training
        outputs.append(model.train(train)(**batch(family)))
        outputs[-1].loss.backward()
    original, ours = outputs
    assert difference(original.logits, ours.logits) < TOLERANCE
    assert difference(original.loss, ours.loss) < TOLERANCE
    if family not in LOSSLESS:
        name = "encoder_aux_loss" if family == "switch_transformers" else "aux_loss"
        assert getattr(original, name).detach() > 0
        assert difference(getattr(original, name), getattr(ours, name)) < TOLERANCE
    used = max(layers(models[1])[-1].stats.tokens_per_expert.tolist())
    assert used > 0
    expected, got = gradients(models[0]), gradients(restore_moe(models[1]))
    assert expected.keys() == got.keys()
    assert [name for name in expected if difference(expected[name], got[name]) > TOLERANCE] == []
    assert any(g.abs().max() > 0 for name, g in expected.items() if "experts" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_expert_is_seen(family):
    original, ours = tiny(family), replace_moe(tiny(family))
    layer = layers(ours)[-1]
    with torch.no_grad():
        ours(**batch(family))
        busy = int(layer.stats.tokens_per_expert.argmax())
        for p in layer.experts.parameters():
            p[busy] *= 1.001
        assert difference(original(**batch(family)).logits, ours(**batch(family)).logits) > TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_taken_over(family):
    model = tiny(family)
    before = {id(p): p for p in model.parameters()}
    after = {id(p): p for p in replace_moe(model).parameters()}
    if family not in RELAID:
        assert before.keys() == after.keys()
    if family != "switch_transformers":
        assert {p.data_ptr() for p in before.values()} == {p.data_ptr() for p in after.values()}
    assert sum(p.numel() for p in before.values()) == sum(p.numel() for p in after.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_in_the_familys_format(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "before")
    restore_moe(replace_moe(model)).save_pretrained(tmp_path / "after")
    before, after = (sorted((tmp_path / name).iterdir()) for name in ("before", "after"))
    assert [path.name for path in before] == [path.name for path in after]
    assert any(path.suffix == ".safetensors" for path in before)
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after]


@pytest.mark.parametrize("family", ["mixtral", *sorted(RELAID)])
def test_what_was_trained_is_given_back(family):
    plain, ours = tiny(family), replace_moe(tiny(family))
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**batch(family)).loss.backward()
        optimizer.step()
    expected, got = plain.state_dict(), restore_moe(ours).state_dict()
    assert expected.keys() == got.keys()
    assert [name for name in expected if difference(expected[name], got[name]) > TOLERANCE] == []
    start = tiny(family).state_dict()
    assert any("experts" in name and not torch.equal(start[name], got[name]) for name in got)


def test_recomputation():
    original, ours = tiny("mixtral"), replace_moe(tiny("mixtral"))
    for model in (original, ours):
        model.train().activation_checkpointing_enable()
        torch.manual_seed(1)
        model(**batch("mixtral")).loss.backward()
    expected, got = gradients(original), gradients(restore_moe(ours))
    assert [name for name in expected if difference(expected[name], got[name]) > TOLERANCE] == []


def test_generation():
    original, ours = tiny("mixtral"), replace_moe(tiny("mixtral"))
    prompt = batch("mixtral")["input_ids"][:1]
    texts = [model.generate(prompt, max_new_tokens=5, do_sample=False) for model in (original, ours)]
    assert texts[0].shape == (1, 14)
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4"])
def test_half_precision(family):
    original, ours = tiny(family), replace_moe(tiny(family))
    expected, got = (model.bfloat16()(**batch(family)).logits.float() for model in (original, ours))
    assert difference(expected, got) < 0.02


def test_gpt_oss_with_another_limit():
    usual, original = (
        tiny("gpt_oss", **options)(**batch("gpt_oss")).logits for options in ({}, {"swiglu_limit": 1e-3})
    )
    ours = replace_moe(tiny("gpt_oss", swiglu_limit=1e-3))(**batch("gpt_oss")).logits
    assert difference(original, ours) < TOLERANCE
    assert difference(original, usual) > 10 * TOLERANCE


def test_a_copy_is_a_model_of_its_own():
    ours = replace_moe(tiny("qwen3_moe"))
    ours(**batch("qwen3_moe")).loss.backward()
    other = restore_moe(copy.deepcopy(ours))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    expected = tiny("qwen3_moe")(**batch("qwen3_moe")).logits
    assert difference(expected, ours(**batch("qwen3_moe")).logits) < TOLERANCE


def test_fewer_experts_a_token():
    original, ours = tiny("olmoe"), replace_moe(tiny("olmoe"))
    for block in (m for m in original.modules() if type(m).__name__ == "OlmoeTopKRouter"):
        block.top_k = 1
    for layer in layers(ours):
        layer.top_k = 1
    expected, got = (model(**batch("olmoe")).logits for model in (original, ours))
    assert difference(expected, got) < TOLERANCE
    assert int(layers(ours)[0].stats.tokens_per_expert.sum()) == 27


@pytest.mark.parametrize("family", ["phimoe", "switch_transformers"])
def test_a_number_of_choices_that_is_fixed(family):
    layer = layers(replace_moe(tiny(family)))[0]
    with pytest.raises(ValueError, match="got top_k=3"):
        layer.top_k = 3


def test_another_layout_is_refused():
    experts = tiny("qwen3_moe").model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"\[E, D, 2H\] and \[E, H, D\].*say transposed=False"):
        FusedExperts(experts, transposed=True)
    with pytest.raises(ValueError, match="Linear must have gate_up_proj and down_proj"):
        FusedExperts(nn.Linear(2, 2))


def test_experts_can_be_initialised_again():
    for family in ("gpt_oss", "dbrx", "switch_transformers"):
        layer = layers(replace_moe(tiny(family)))[0]
        before = [p.detach().clone() for p in layer.experts.parameters()]
        layer.experts.reset_parameters()
        for old, new in zip(before, layer.experts.parameters(), strict=True):
            assert not torch.equal(old, new)
            assert not torch.equal(new[0], new[1])
            assert new.abs().max() <= 1 / 4  # at most 1 / sqrt(16), the smaller width


def test_unknown_blocks_are_named_and_the_model_is_left_alone():
    class StrangeBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList()

    model = tiny("mixtral")
    model.extra = nn.Sequential(nn.Linear(2, 2), StrangeBlock())
    with pytest.raises(ValueError, match=r"extra\.1 is a StrangeBlock, .* no adapter"):
        replace_moe(model)
    assert not layers(model)
    with pytest.raises(ValueError, match="has no MoE block"):
        replace_moe(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no layer that replace_moe put there"):
        restore_moe(model)


def test_an_adapter_of_the_users_own_comes_first():
    model = tiny("qwen3_moe")
    kind = type(model.model.layers[0].mlp)

    def adapter(block, shared=None):
        gate = RouterGate(block.gate, block.gate.weight, block.gate.top_k, "sigmoid")
        return Parts(gate, FusedExperts(block.experts), shared)

    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp .*do not compute the same: the output in eval mode differs by"
    ):
        replace_moe(model, {kind: partial(adapter, shared=nn.Linear(16, 16))})
    assert not layers(model)
    replace_moe(model, {kind: adapter})
    assert all(layer.gate.score == "sigmoid" for layer in layers(model))


def test_the_package_does_not_import_transformers():
    folder = Path(__file__).resolve().parents[2] / "models" / "hf"
    importing = re.compile(r"^ *(import|from) (transformers|accelerate)", re.MULTILINE)
    needing = {path.stem for path in folder.glob("*.py") if importing.search(path.read_text())}
    assert needing == {"gpt_format", "gpt_mapping", "loading", "swin_format", "trainer", "writing"}
    for path in folder.glob("*.py"):
        if path.stem not in needing:  # what imports one of them does so inside a function
            assert not re.search(rf"^(import|from) .*({'|'.join(needing)})", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_router_replay(family):
    """Tokens go where another model's router sent them, with weights of this model's."""
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    model, other = (replace_moe(tiny(family)).eval() for _ in range(2))
    with record(model) as routings:
        logits = model(ids).logits
    with replay(model, routings):
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-6)
    for layer in [m for m in other.modules() if isinstance(m, BridgedMoE)]:
        torch.nn.init.normal_(layer.gate.router.weight, generator=torch.Generator().manual_seed(9))
    with record(other) as own:
        other(ids)
    assert not torch.equal(own.ids, routings.ids)
    with replay(other, routings):
        other(ids).logits.square().mean().backward()
    for name, layer in other.named_modules():
        if isinstance(layer, BridgedMoE):
            assert torch.equal(layer._last[0], routings.by_layer[name])
            assert layer.gate.router.weight.grad.any()
