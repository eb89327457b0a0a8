"""Our GPT as a model of Hugging Face and back: the same logits, from and to every mesh, or a refusal by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import close, whole
from ranks import errors, run
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, ParallelModel, parallel_model
from turnout.moe import Capacity, MoE
from turnout.moe.adapters import add_lora

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from hf_families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from turnout.models.hf.gpt_format import byte_tokenizer, config_from_hf, from_hf, load_hf, to_hf

CONFIG = GPTConfig(vocab=64, dim=32, heads=4, layers=2, hidden=24, seq_len=16, num_experts=4, moe_every=1)
IDS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "mixtral": {},
    "mixtral, untied, grouped": {"tied": False, "kv_heads": 2, "norm_eps": 1e-5, "rope_base": 500.0},
    "mixtral, chosen first": {"moe": {"capacity": Capacity(1.25, eval_factor=2.0), "balance": 0.1}},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6},
    "qwen3, dense blocks": {"qk_norm": True, "moe_every": 2, "tied": False, "head_dim": 10, "kv_heads": 1},
    "qwen3, one expert": {"qk_norm": True, "top_k": 1},
    "qwen3, biases, a window": {"qk_norm": True, "attention_bias": True, "windows": (5,), "z_loss": 0.0},
    "qwen3, the first block dense": {"qk_norm": True, "moe_every": (2,)},
    "mixtral, a window": {"windows": (5,)},
}


def build(config: GPTConfig) -> GPT:
    """Weights that tell: no norm is 1, and no logits lie close together."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1 + torch.arange(len(p)).cos() / 2)
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_there_and_back(options, tmp_path):
    config = replace(CONFIG, **options)
    model = build(config)
    to_hf(model, tmp_path, max_shard_size="20KB")
    theirs, again = AutoModelForCausalLM.from_pretrained(tmp_path), from_hf(tmp_path)
    expected = model(IDS)
    assert type(theirs).__name__ == ("Qwen3MoeForCausalLM" if config.qk_norm else "MixtralForCausalLM")
    close(theirs(IDS).logits, expected, 1e-5)
    assert torch.equal(again(IDS), expected)
    assert replace(again.config, norm_eps=config.norm_eps, kv_heads=config.kv_heads, moe=config.moe) == config
    assert theirs.generate(IDS[:, :4], max_new_tokens=2, do_sample=False).shape == (2, 6)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"num_key_value_heads": 1}),
        ("qwen3_moe", {"head_dim": 12}),
        ("qwen3_moe", {"norm_topk_prob": False, "tie_word_embeddings": True}),
    ],
)
@torch.no_grad()
def test_what_others_have_made(family, options, tmp_path):
    model = tiny(family, **options)
    model.save_pretrained(tmp_path)
    ours = from_hf(tmp_path, seq_len=12, dropout=0.1)
    assert (ours.config.seq_len, ours.config.dropout) == (12, 0.1)
    close(ours(IDS[:, :12]), model(IDS[:, :12]).logits, 1e-4 * float(model(IDS).logits.abs().max()))


MESHES = {
    "pp2 tp2 ep2": (4, {"pp": 2, "tp": 2, "ep": 2}, {}),
    "tp2 ep2 fsdp": (4, {"tp": 2, "ep": 2}, {"data": "fsdp"}),
    "ep2 etp2": (4, {"ep": 2, "etp": 2}, {"data": "zero1"}),
}
SPREAD = replace(CONFIG, qk_norm=True, moe_every=2, tied=False, kv_heads=2)


def on_a_mesh(axes: dict[str, int], options: dict[str, str]) -> ParallelModel:
    torch.manual_seed(1)
    return parallel_model(SPREAD, Meshes.of("cpu", **axes), micro_batches=2, **options)


def read_and_write(axes, options, one: Path, many: Path) -> None:
    model = on_a_mesh(axes, options)
    load_hf(model, one)
    expected = dict(build(SPREAD).named_parameters())
    for part in model.parts:
        for name, p in part.named_parameters():
            assert torch.equal(whole(p), expected[name]), name
    loss = model.eval().evaluate(IDS, IDS)
    to_hf(model, many)
    assert torch.equal(model.evaluate(IDS, IDS), loss)


@pytest.mark.parametrize("name", MESHES)
def test_from_and_to_every_mesh(name, tmp_path):
    ranks, axes, options = MESHES[name]
    to_hf(build(SPREAD), tmp_path / "one")
    run(ranks, read_and_write, axes, options, tmp_path / "one", tmp_path / "many")
    one, many = (sorted((tmp_path / folder).iterdir()) for folder in ("one", "many"))
    assert [path.name for path in one] == [path.name for path in many]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in many]


def adapted(config: GPTConfig) -> GPT:
    return add_lora(build(config), rank=2)


def swapped(config: GPTConfig) -> GPT:
    model = build(config)
    layer = model.blocks[1].feed_forward
    assert isinstance(layer, MoE)
    layer.top_k = 3
    return model


REFUSED = {
    "norm='layer'": {"norm": "layer"},
    "moe_every=0": {"moe_every": 0},
    "moe_every=3, no experts in 2 layers": {"moe_every": 3, "qk_norm": True},
    "moe_every=2 without qk_norm": {"moe_every": 2},
    r"moe_every=\(2,\) without qk_norm": {"moe_every": (2,)},
    "attention_bias without qk_norm": {"attention_bias": True},
    r"windows=\(5, 0\) \(there all blocks have the same\)": {"windows": (5, 0)},
    r"mtp=1 \(model.mtp stays behind": {"mtp": 1},
    "gate=SigmoidGate": {"moe": {"gate": "sigmoid"}},
    "experts=gelu": {"moe": {"experts": "gelu"}},
    "bias=True": {"moe": {"bias": True}},
    "Capacity.factor=1.25": {"moe": {"capacity": 1.25}},
    "shared, free": {"moe": {"shared": 1, "free": ["null"]}},
    "not normalised": {"top_k": 1},
    "adapters": adapted,
    "another top_k": swapped,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_family_has_is_named(message, tmp_path):
    how = REFUSED[message]
    model = how(CONFIG) if callable(how) else build(replace(CONFIG, **how))
    with pytest.raises(ValueError, match=message):
        to_hf(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def refused_on_ranks(folder: Path) -> None:
    torch.manual_seed(0)
    config = replace(SPREAD, moe={"shared": 1})  # the second stage alone has experts
    to_hf(parallel_model(config, Meshes.of("cpu", pp=2), micro_batches=2), folder)


def test_a_refusal_reaches_every_rank(tmp_path):
    for error in errors(2, refused_on_ranks, tmp_path):
        assert error.startswith("CheckpointError: rank 1")
        assert "shared" in error


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("olmoe", {}, "is olmoe, and our GPT can be mixtral or qwen3_moe"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "intermediate_size="),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "intermediate_size="),
    ],
)
def test_what_our_gpt_has_not_is_named(family, options, message, tmp_path):
    tiny(family, **options).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 5}, r"num_experts=5 \(4 there\)"),
        ({"rope_base": 5.0, "top_k": 1}, r"top_k=1 \(2 there\), rope_base=5.0 \(10000.0 there\)"),
        ({"moe": {"gate": "sigmoid"}}, "the model has SigmoidGate"),
        ({"moe": {"shared": 1}}, "feed_forward.shared.up.weight of the model has no place in mixtral"),
    ],
)
def test_a_model_that_is_another_is_named(options, message, tmp_path):
    to_hf(build(CONFIG), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_hf(build(replace(CONFIG, **options)), tmp_path)


def test_files_that_do_not_fit_their_config_are_named(tmp_path):
    to_hf(build(CONFIG), tmp_path / "one")
    to_hf(build(replace(CONFIG, layers=3)), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "one" / "model.safetensors")
    with pytest.raises(ValueError, match=r"only one of both has model\.layers\.2"):
        from_hf(tmp_path / "one")


def test_bytes_are_tokens(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path), "Hé, \x00\n\t 你好  x"
    ids = tokenizer(text).input_ids
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
