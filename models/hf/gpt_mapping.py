"""What a GPT's settings and parameters are called in Mixtral and Qwen3-MoE, and which of them have no name there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from ...moe.experts.feed_forward import FeedForwardExperts
from ...moe.gates.topk import TopKGate
from ...moe.layer import MoE
from ..gpt import GPT, GPTConfig
from .slots import Slot

OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INSIDE = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}


@dataclass(frozen=True)
class _Family:
    """What a family calls the parts of a block."""

    kind: type[PretrainedConfig]
    block: str  # of experts
    experts: dict[str, str]  # by our names of their matrices


FAMILIES = {
    "mixtral": _Family(MixtralConfig, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": _Family(Qwen3MoeConfig, "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}


def config_from_hf(folder: str | Path, **settings: Any) -> GPTConfig:
    """The config of the GPT that a folder of Hugging Face holds; `settings` and errors as for `from_hf`."""
    hf: Any = AutoConfig.from_pretrained(folder)
    if hf.model_type not in FAMILIES:
        raise ValueError(
            f"{folder} is {hf.model_type}, and our GPT can be {' or '.join(FAMILIES)}: for other families there is "
            "turnout.models.hf.loading"
        )
    qwen, rope, head_dim = hf.model_type == "qwen3_moe", hf.rope_parameters or {}, getattr(hf, "head_dim", None)
    refused = {
        "hidden_act": hf.hidden_act not in ("silu", "swish"),
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "quantization_config": getattr(hf, "quantization_config", None) is not None,
    }
    every = hf.decoder_sparse_step if qwen else 1
    if dense := getattr(hf, "mlp_only_layers", None):
        every = tuple(n for n in range(1, hf.num_hidden_layers + 1) if n - 1 not in dense and n % every == 0)
    hidden = hf.moe_intermediate_size if qwen else hf.intermediate_size
    if every != 1:  # a dense block of ours is as wide as the experts of a token
        refused["intermediate_size"] = hf.intermediate_size != hf.num_experts_per_tok * hidden
    if wrong := [f"{name}={getattr(hf, name, None)}" for name, bad in refused.items() if bad]:
        raise ValueError(f"{folder} has what our GPT has not: {', '.join(wrong)}")
    values = {
        "vocab": hf.vocab_size,
        "dim": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads,
        "head_dim": None if head_dim == hf.hidden_size / hf.num_attention_heads else head_dim,
        "hidden": hidden,
        "seq_len": hf.max_position_embeddings,
        "moe_every": every,
        "attention_bias": getattr(hf, "attention_bias", False),
        "windows": () if hf.sliding_window is None else (hf.sliding_window,),
        "num_experts": hf.num_local_experts,
        "top_k": hf.num_experts_per_tok,
        "norm_eps": hf.rms_norm_eps,
        "qk_norm": qwen,
        "rope_base": rope.get("rope_theta", 10_000.0),
        "tied": hf.tie_word_embeddings,
    }
    return GPTConfig(**values | settings)


def differences(config: GPTConfig, other: GPTConfig) -> list[str]:
    """Settings of a config that compute something else than another's, in words; not those that a user may choose."""

    def meant(config: GPTConfig) -> dict[str, Any]:
        eps = torch.finfo(torch.float32).eps if config.norm_eps is None else config.norm_eps
        alike = {"kv_heads": config.kv_heads or config.heads, "head_dim": config.head_size, "norm_eps": eps}
        alike |= {"moe_every": [n + 1 for n in range(config.layers) if config.has_experts(n)]}
        alike |= {"windows": [config.window(n) for n in range(config.layers)]}
        return {**vars(config), **alike, **dict.fromkeys(("seq_len", "dropout", "moe", "eod", "z_loss", "mtp_weight"))}

    mine, theirs = meant(config), meant(other)
    return [f"{name}={mine[name]} ({theirs[name]} there)" for name in mine if mine[name] != theirs[name]]


def files_of(config: GPTConfig, kind: str, name: str, p: Tensor) -> Iterator[tuple[str, Slot]]:
    """The tensors of a family's files that a parameter is in, by its name."""
    own, family = name.removesuffix(".weight").removesuffix(".bias"), FAMILIES[kind]
    part = "bias" if name.endswith(".bias") else "weight"
    if own in OUTSIDE:
        yield f"{OUTSIDE[own]}.weight", Slot(p)
        return
    _, index, own = own.split(".", 2)
    layer = f"model.layers.{index}"
    routed = config.has_experts(int(index))
    if own in INSIDE:
        yield f"{layer}.{INSIDE[own]}.{part}", Slot(p)
    elif own == "feed_forward.gate" and routed:
        yield f"{layer}.{family.block}.gate.weight", Slot(p)
    elif own.startswith("feed_forward.experts.w_"):
        matrix = family.experts[own.removeprefix("feed_forward.experts.w_")]
        for expert in range(config.num_experts):
            yield f"{layer}.{family.block}.experts.{expert}.{matrix}.weight", Slot(p, expert, transposed=True)
    elif (matrix := own.removeprefix("feed_forward.")) in family.experts:
        yield f"{layer}.mlp.{family.experts[matrix]}.weight", Slot(p)
    else:
        raise ValueError(f"{name} of the model has no place in {kind}")


def routing_of(parts: Sequence[GPT]) -> list[tuple[int, bool]]:
    """For each layer here, how many experts a token picks, and whether their weights are normalised."""
    found = []
    for name, layer in ((n, m) for part in parts for n, m in part.named_modules() if isinstance(m, MoE)):
        gate, experts = layer.gate, layer.experts
        capacity, many = layer.capacity, 10**6  # tokens
        room = None if capacity is None else capacity.limit(layer.top_k, many, layer.num_experts, training=False)
        refused = {
            f"gate={type(gate).__name__}": not isinstance(gate, TopKGate),
            "scale, bias or groups of the gate": gate.scale != 1
            or gate.bias is not None
            or getattr(gate, "groups", 1) > 1,
            "adapters (merge_lora first)": experts.adapts or gate.lora is not None,
            f"experts={getattr(experts, 'activation', type(experts).__name__)}": not (
                isinstance(experts, FeedForwardExperts) and experts.activation == "swiglu"
            ),
            "bias=True": getattr(experts, "bias", False),
            'weight_on="input"': experts.weight_on == "input",
            f"{capacity} (set layer.capacity = None to leave it out)": room is not None and room < many,
            "shared": layer.shared is not None,
            "free": layer.free is not None,
        }
        if wrong := [what for what, bad in refused.items() if bad]:
            raise ValueError(f"{name} has what Mixtral and Qwen3-MoE have not: {', '.join(wrong)}")
        assert isinstance(gate, TopKGate)
        normalize = layer.top_k > 1 if gate.normalize is None else gate.normalize
        found.append((layer.top_k, normalize or gate.order == "choose_first"))
    return found


def hf_config(config: GPTConfig, routing: list[Any], parts: Sequence[GPT]) -> PretrainedConfig:
    """The family's, of a GPT whose layers choose as `routing` says."""
    kinds = {each for theirs in routing for each in theirs}
    qwen, windows = config.qk_norm, {config.window(index) for index in range(config.layers)}
    refused = {
        f"norm={config.norm!r}": config.norm != "rms",
        f"moe_every={config.moe_every}, no experts in {config.layers} layers": not kinds,
        f"moe_every={config.moe_every} without qk_norm (Mixtral has experts in each block)": not all(
            map(config.has_experts, range(config.layers))
        )
        and not qwen,
        "attention_bias without qk_norm (Mixtral has none)": config.attention_bias and not qwen,
        f"windows={config.windows} (there all blocks have the same)": len(windows) > 1,
        f"mtp={config.mtp} (model.mtp stays behind: take it out, GPTConfig(mtp=0))": config.mtp > 0,
        "another top_k or gate in each layer": len(kinds) > 1,
        "weights of experts that are not normalised, without qk_norm": (not qwen) and any(not n for _, n in kinds),
    }
    if wrong := [what for what, bad in refused.items() if bad]:
        raise ValueError(f"the GPT has what Mixtral and Qwen3-MoE have not: {', '.join(wrong)}")
    ((top_k, normalize),) = kinds
    dtype = next(p.dtype for part in parts for p in part.parameters())
    values: dict[str, Any] = {
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": torch.finfo(dtype).eps if config.norm_eps is None else config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied,
        "num_experts_per_tok": top_k,
        "num_local_experts": config.num_experts,
        "sliding_window": max(windows) or None,
        "dtype": dtype,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), config.eod),
        "pad_token_id": None,
    }
    if not qwen:
        return MixtralConfig(**values, intermediate_size=config.hidden, architectures=["MixtralForCausalLM"])
    return Qwen3MoeConfig(
        **values,
        intermediate_size=config.ffn,
        moe_intermediate_size=config.hidden,
        decoder_sparse_step=config.moe_every if isinstance(config.moe_every, int) else 1,
        mlp_only_layers=[
            n for n in range(config.layers) if not (isinstance(config.moe_every, int) or config.has_experts(n))
        ],
        attention_bias=config.attention_bias,
        use_sliding_window=max(windows) > 0,
        norm_topk_prob=normalize,
        architectures=["Qwen3MoeForCausalLM"],
    )
