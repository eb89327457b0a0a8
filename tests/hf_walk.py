"""Tiny models of every family of the installed transformers that has a mixture of experts, found and made by rule."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from turnout.models.hf import BridgedExperts, BridgedMoE, replace_moe

MOE = re.compile(r"self\.experts\b|use_experts_implementation|class \w*MoE\w*\(nn\.Module")
LAYERS = 4  # enough for patterns of layers that differ

# fields of a config by name, first match: their tiny values. What none matches keeps its default.
SIZES: list[tuple[str, Any]] = [
    (r"^(qk_head_dim|indexer_\w+)$", None),  # their defaults
    (r"vocab_size", 64),
    (r"num_(hidden|decoder|encoder)_layers$|^n_layers?$|^num_layers$", LAYERS),
    (r"num_hidden_groups", 1),
    (r"num_nextn_predict_layers|num_mtp|mtp_num", 0),
    (r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", 1),
    (
        r"key_value_heads|kv_n_heads|num_attention_heads|^n_heads?$|^num_heads$|_n_heads$|_num_heads$|num_key_heads|num_value_heads",
        4,
    ),
    (r"^(hidden_size|d_model|dim|n_embd)$", 32),
    (r"shared_expert.*intermediate_size", 16),
    (r"moe.*(intermediate_size|hidden_size)|expert_ffn_hidden_size", 16),
    (r"intermediate_size|ffn_hidden_size|^d_ff$|ffn_dim$", 24),
    (r"partial_rotary_factor", 1.0),
    (r"^(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|head_dim|global_head_dim|d_kv|kv_channels)$|head_dim$", 8),
    (r"lora_rank$", 16),
    (r"^(num_experts_per_tok|moe_k|moe_topk|top_k_experts|moe_top_k|num_selected_experts)$", 2),
    (r"num_shared_experts|n_shared_experts", 1),
    (r"^(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts)$", 8),
    (r"^zero_expert_num$", 2),
    (r"^(n_group|num_expert_group|topk_group_size)$", 4),
    (r"^topk_group$", 2),
    (r"^(sliding_window|attention_chunk_size|local_attention_window)$", 8),
    (r"max_position_embeddings|max_seq_len", 64),
    (r"state_size$|d_state$", 8),
    (r"(dropout|drop)(_prob|_rate|out)?$|_dropout$|_pdrop$|hidden_dropout", 0.0),
    (r"^(pad_token_id)$", 0),
    (r"^(bos_token_id)$", 1),
    (r"^(eos_token_id)$", 2),
    (r"^initializer_range$", 0.3),
    (r"router_jitter_noise|input_jitter_noise|jitter_eps", 0.1),
    (r"^enable_moe_block$|^is_moe$", True),
]
# what the rule does not find, family by family: fields that depend on each other
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
MORE: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 8], "rope_parameters": MROPE},
    "glm4v_moe": {"rope_parameters": MROPE},
    "glm5_next": {"qk_rope_head_dim": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mimo_v2_flash": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "nemotron_h": {"n_groups": 2, "layers_block_type": ["mamba", "moe", "full_attention", "moe"]},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "vitpose_backbone": {"part_features": 8},
    "zaya": {"num_experts_per_tok": 1},
}

MODELS: dict[str, str] = {"qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel"}  # where the first of a name has no experts


def families() -> list[str]:
    """Folders of transformers/models whose code has a mixture of experts."""
    folder = Path(transformers.__file__).parent / "models"
    return sorted({path.parent.name for path in folder.glob("*/modeling_*.py") if MOE.search(path.read_text())})


def shrunk(kind: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    """A config of this class with the sizes of SIZES, and `more`; configs inside it likewise."""
    own: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        inner = kind.sub_configs.get(field.name)
        if inner is not None:
            if inner is not transformers.AutoConfig and issubclass(inner, PreTrainedConfig):
                own[field.name] = shrunk(inner, more.get(field.name, {}))
            continue
        found = next((value for pattern, value in SIZES if re.search(pattern, field.name)), None)
        if found is not None and not str(field.type).startswith("list"):
            own[field.name] = found
    return kind(**{**own, **{k: v for k, v in more.items() if k not in kind.sub_configs}})


def model_class(family: str) -> type[PreTrainedModel]:
    """The class whose blocks are looked at: a causal language model, or the text model of one that sees or hears."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and "PreTrained" not in name
        and value.config_class is not None
    ]
    if family in MODELS:
        return getattr(module, MODELS[family])
    endings = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "Model")
    return next((value for ending in endings for value in own if value.__name__.endswith(ending)), own[0])


def tiny(family: str) -> nn.Module:
    """A model of the family in eval mode with random weights; the same each time."""
    kind = model_class(family)
    config = shrunk(kind.config_class, MORE.get(family, {}))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(config)
        with torch.no_grad():
            for name, t in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("tid2eid"):  # experts of each token id, all different
                    t.copy_(torch.rand(len(t), 8).topk(t.shape[1]).indices)
                if not t.is_floating_point() or "inv_freq" in name:
                    continue
                if isinstance(t, nn.Parameter) and "bias" not in name:
                    t.copy_(torch.randn_like(t) * 0.2 + (t.ndim == 1))
                elif "correction" in name or "bias" in name:
                    t.copy_(torch.randn_like(t) * 0.03)
    return model.eval()


def batch(model: nn.Module) -> dict[str, Any]:
    """Two sequences of 9 tokens."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "use_cache": False, **more}


PAGE = Path(__file__).parents[1] / "docs" / "guides" / "hf_families.md"
# families whose blocks cannot be replaced, and why
REFUSED = {
    "doge": "its experts are single rows of an embedding, found by product keys: there is no product to spread",
    "muse_spark": "a norm whose weight all experts share stands in each, and no part of ours would hold that weight",
    "nllb_moe": "in transformers 5.23 its block passes a mask where expert numbers are expected, and uses two experts",
    "vitpose_backbone": "no mixture: the caller names the one head, and all are computed",
}


def row(family: str, model: nn.Module | None) -> str:
    """The family's row of the page: what is replaced in a model of it."""
    if model is None:
        return f"| {family} | refused | {REFUSED[family]} |"
    layers = [m for m in model.modules() if isinstance(m, BridgedMoE)]
    whole = {type(m.block).__name__ for m in layers if not isinstance(m, BridgedExperts)}
    alone = {type(m.block).__name__ for m in layers if isinstance(m, BridgedExperts)}
    what = [f"`{name}`" for name in sorted(whole)] + [f"`{name}`, experts alone" for name in sorted(alone)]
    return f"| {family} | works | {' and '.join(what)} |"


HEAD = f"""# Families of Hugging Face

For those who want to know whether `replace_moe` takes their model. The page lists every family of transformers whose
code has a mixture of experts, and what is replaced in it.

Outputs in eval and in training, all gradients and the saved files are the original's, on small random models in float32
(1e-5): `tests/models/test_hf_walk.py`. "Experts alone" means that the block keeps its router and whatever else it does,
and a `BridgedExperts` stands for its experts. A family that is refused is left as it was, and the error says why.
`python tests/hf_walk.py` writes this page for the installed transformers, which was {transformers.__version__}.

| family | | replaced, or why not |
|---|---|---|
"""


def main() -> None:
    """Write the page."""
    rows = [row(family, None if family in REFUSED else replace_moe(tiny(family))) for family in families()]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")
    print(f"{len(rows) - len(REFUSED)} families work, {len(REFUSED)} are refused: {PAGE}")


if __name__ == "__main__":
    main()
