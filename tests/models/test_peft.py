"""Adapters of experts in PEFT's format: what PEFT reads computes the same, and what PEFT wrote is read."""

import copy
import json
from pathlib import Path

import pytest
import torch
from reference import close
from torch import nn

pytest.importorskip("peft", reason='needs peft: pip install -e ".[peft]"')
import peft
from hf_families import tiny
from safetensors.torch import load_file, save_file
from turnout.models.hf import load_adapters, merge_adapters, replace_moe, restore_moe, save_adapters, save_pretrained
from turnout.moe.adapters import add_lora, disable_lora, lora_parameters, merge_lora

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))).logits


def drawn(model: nn.Module) -> nn.Module:
    """With adapters, ours and PEFT's, that are not zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def attention(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


def both(family: str, rank=4, alpha=8.0, **options) -> tuple[nn.Module, torch.Tensor]:
    """Experts' adapters beside PEFT's of attention; and logits without any."""
    model = replace_moe(tiny(family))
    before = logits(model)
    return drawn(add_lora(peft.get_peft_model(model, attention(**options)), rank, alpha)), before


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_peft_reads_experts_and_attention(family, tmp_path: Path):
    model, before = both(family)
    expected = logits(model)
    assert not close(expected, before, 1e-2)
    save_adapters(model, tmp_path)
    read = peft.PeftModel.from_pretrained(tiny(family), tmp_path)
    assert close(logits(read), expected, 1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert not config.get("rank_pattern")
    assert set(config["target_parameters"]) == set(TARGETS)
    with disable_lora(model), model.disable_adapter():
        assert close(logits(model), before, 1e-6)


@pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys did not match:RuntimeWarning"
)  # PEFT asks modules alone
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(2, 3.0, False), (2, 3.0, True), (4, 8.0, True)])
def test_another_rank_and_factor_for_experts(rank, alpha, rslora, tmp_path: Path):
    model, _ = both("mixtral", rank, alpha, use_rslora=rslora, lora_dropout=0.1)
    save_adapters(model.eval(), tmp_path)
    read = peft.PeftModel.from_pretrained(tiny("mixtral"), tmp_path)
    assert close(logits(read), logits(model), 1e-4)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.target_parameters, config.lora_dropout, config.rank_pattern, config.alpha_pattern = None, 0.0, {}, {}
    again = peft.get_peft_model(replace_moe(tiny("mixtral")), config)
    load_adapters(again, tmp_path)
    assert close(logits(again), logits(model), 1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[1:]])
def test_what_peft_wrote_is_read(family, targets, tmp_path: Path):
    theirs = drawn(peft.get_peft_model(tiny(family), attention(target_modules=[], target_parameters=targets)))
    theirs.save_pretrained(tmp_path)
    model = replace_moe(tiny(family))
    load_adapters(model, tmp_path, name="read")
    assert close(logits(model), logits(theirs), 1e-4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == lora_parameters(model, "read").keys()
    save_adapters(model, tmp_path / "again", name="read")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for name, t in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(again[name], t), name
    restore_moe(merge_lora(model))
    assert close(logits(model), logits(theirs), 1e-4)


def test_merged_together_or_refused(tmp_path: Path):
    model, _ = both("mixtral")
    expected = logits(model)
    with pytest.raises(ValueError, match="save_adapters"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge_lora"):
        save_pretrained(model, tmp_path)
    half = copy.deepcopy(model)
    merge_lora(half)
    with pytest.raises(ValueError, match="PEFT would write them alone"):
        save_pretrained(half, tmp_path)
    half = copy.deepcopy(model).merge_and_unload()
    with pytest.raises(ValueError, match="merge_lora"):
        save_pretrained(half, tmp_path)
    assert not list(tmp_path.iterdir())
    merged = merge_adapters(model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert close(logits(merged), expected, 1e-4)
    save_pretrained(merged, tmp_path)
    assert close(logits(type(merged).from_pretrained(tmp_path)), expected, 1e-4)
    with pytest.raises(ValueError, match="neither of experts nor of PEFT"):
        merge_adapters(merged)


def test_experts_that_peft_cannot_target(tmp_path: Path):
    model = drawn(add_lora(replace_moe(tiny("dbrx")), 4, name="mine"))
    save_adapters(model, tmp_path, "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["adapters.safetensors"]
    other = add_lora(replace_moe(tiny("dbrx")), 4)
    load_adapters(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="add_lora as it was"):
        load_adapters(replace_moe(tiny("dbrx")), tmp_path)


def test_what_does_not_fit_changes_nothing(tmp_path: Path):
    model, _ = both("mixtral")
    save_adapters(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, expected = load_file(file), logits(model)
    with pytest.raises(ValueError, match="get_peft_model"):
        load_adapters(replace_moe(tiny("mixtral")), tmp_path)  # attention's have no place
    with pytest.raises(ValueError, match=r"rank r = \[4\], and those of the model \[2\]"):
        load_adapters(add_lora(replace_moe(tiny("mixtral")), 2), tmp_path)
    for bad, match in (
        ({name: t for name, t in tensors.items() if "layers.1.mlp" not in name}, "the file has no"),
        ({name: t.flip(0).repeat(1, 2) if "experts.lora_A" in name else t for name, t in tensors.items()}, "want"),
        ({name: t for name, t in tensors.items() if "q_proj" not in name}, "the model alone has"),
        (tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 16)}, "the file alone has"),
    ):
        save_file(bad, file)
        with pytest.raises(ValueError, match=match):
            load_adapters(model, tmp_path)
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="has no adapter 'second'"):
        save_adapters(model, tmp_path, "second")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        load_adapters(model, tmp_path / "elsewhere")
