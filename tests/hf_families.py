"""Tiny random models of the families that `replace_moe` knows, each with every option its router has."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
ROUTED = {
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# class of the model, and what its config has besides COMMON
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4, "router_jitter_noise": 0.1}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 8,
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **MLA,
            **GROUPS,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **MLA,
            **GROUPS,
            **ROUTED,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **GROUPS,
            **ROUTED,
            "head_dim": 8,
        },
    ),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 3}),
    "phimoe": (
        "Phimoe",
        {"intermediate_size": 24, "num_local_experts": 4, "router_jitter_noise": 0.3, "input_jitter_noise": 0.1},
    ),
    "jamba": (
        "Jamba",
        {
            "intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_dt_rank": 2,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "llama4": (
        "Llama4",
        {
            "intermediate_size": 24,
            "intermediate_size_mlp": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
        },
    ),
    "dbrx": (
        "Dbrx",
        {
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 16,
                "ffn_hidden_size": 24,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_jitter_eps": 0.1,
                "moe_loss_weight": 0.05,
                "ffn_act_fn": {"name": "silu"},
            },
        },
    ),
    "switch_transformers": (
        "SwitchTransformers",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            "expert_capacity": 3,
            "router_jitter_noise": 0.1,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
}
LOSSLESS = {"deepseek_v2", "deepseek_v3", "glm4_moe", "llama4"}  # no auxiliary loss in transformers


def tiny(family: str, **options: Any) -> nn.Module:
    """A model of the family in eval mode; the same weights each time."""
    name, own = FAMILIES[family]
    text = "Text" if family == "llama4" else ""
    kind = "ConditionalGeneration" if family == "switch_transformers" else "CausalLM"
    config = getattr(transformers, f"{name}{text}Config")(**{**COMMON, **own, **options})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(transformers, f"{name}For{kind}")(config)
        with torch.no_grad():
            for name, t in [*model.named_parameters(), *model.named_buffers()]:
                if "correction" in name:  # of scores that lie close together
                    t.copy_(torch.randn_like(t) * 0.03)
                elif isinstance(t, nn.Parameter):  # norms around 1
                    t.copy_(torch.randn_like(t) * 0.3 + (t.ndim == 1))
    return model.eval()


def batch(family: str) -> dict[str, Any]:
    """Three sequences of 9 tokens, the last with padding, and what is asked of the model."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (3, 9), generator=draw)
    asked: dict[str, Any] = {"input_ids": ids, "labels": ids.roll(1, 1)}
    if family not in LOSSLESS:
        asked["output_router_logits"] = True
    if family != "switch_transformers":
        asked["attention_mask"] = torch.ones_like(ids)
        asked["attention_mask"][2, 7:] = 0
    return asked
