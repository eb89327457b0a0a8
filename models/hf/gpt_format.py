"""Our `GPT` as Mixtral or Qwen3-MoE of Hugging Face, and back: the same function, in files that everybody reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    GenerationConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from ...moe.experts.feed_forward import FeedForwardExperts
from ...moe.experts.sharded import whole
from ...moe.gates.topk import TopKGate
from ...moe.layer import MoE
from ..checkpoint.together import place, together
from ..gpt import GPT, GPTConfig
from ..parallel_model import ParallelModel
from .slots import Slot
from .weight_files import WeightReader, WeightWriter

__all__ = ["byte_tokenizer", "config_from_hf", "from_hf", "load_hf", "to_hf"]

Model = GPT | ParallelModel | Sequence[GPT]
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


@torch.no_grad()
def to_hf(model: Model, folder: str | Path, max_shard_size: int | str = "50GB") -> None:
    """Write a GPT as a model of Hugging Face, on any mesh; it stays as it is. Call it on every rank.

    With ``qk_norm=True`` it becomes Qwen3-MoE, which may have dense blocks as well, else Mixtral. Logits in eval mode
    are the same. Rank 0 writes, and has one tensor more than its part in main memory. What concerns training alone
    stays behind: dropout, balance losses, noise of the gate.

    Args:
        model: a `GPT`, all stages of a pipeline that this rank runs, or a `ParallelModel`.
        folder: is made if it is not there.
        max_shard_size: as for transformers' `save_pretrained`.

    Raises:
        ValueError: settings that neither family has, all of them by name.
        CheckpointError: on every rank of several, if there is such a setting, or rank 0 cannot write.
    """
    parts = _parts(model)
    config = parts[0].config
    routing = _agree(lambda: _routing(parts))
    hf = _agree(lambda: _hf_config(config, routing, parts))[0]
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root is whole
    held = {name: p for part in parts for name, p in part.named_parameters()}
    everyones = [held.keys()] if not dist.is_initialized() else together(lambda: list(held))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        names = dict(GPT(config).to(next(iter(held.values())).dtype).named_parameters())
    slots = {name: list(_files(config, hf.model_type, name, p)) for name, p in names.items()}
    writers: list[WeightWriter] = []  # rank 0 has one
    errors: list[Exception] = []

    def begin() -> None:
        if place()[0] == 0:
            hf.save_pretrained(folder)
            GenerationConfig.from_model_config(hf).save_pretrained(folder)
            tensors = {file: slot.of_file(slot.tensor) for each in slots.values() for file, slot in each}
            tensors = {file: torch.empty(t.shape, dtype=t.dtype, device="meta") for file, t in tensors.items()}
            writers.append(WeightWriter(folder, tensors, max_shard_size))

    def finish() -> None:
        for error in errors:
            raise error
        for writer in writers:
            writer.finish(total_parameters=sum(p.numel() for p in names.values()))

    _agree(begin)
    try:
        for name, empty in names.items():
            owner = next(rank for rank, theirs in enumerate(everyones) if name in theirs)
            tensor = _to_first(whole(held[name].detach()) if name in held else empty, owner)
            for file, slot in slots[name] if writers and not errors else ():
                try:  # after an error this rank gathers on with the others
                    writers[0].write(file, slot.of_file(tensor))
                except Exception as error:
                    errors.append(error)
                    break
        _agree(finish)
    finally:
        for writer in writers:
            writer.close()


def from_hf(folder: str | Path, **settings: Any) -> GPT:
    """The GPT that computes what a Mixtral or Qwen3-MoE in a folder of Hugging Face does, on the CPU, in eval mode.

    For many ranks build a model by `config_from_hf` and fill it by `load_hf`.

    Args:
        folder: with `config.json` and safetensors.
        settings: of `GPTConfig` that the folder does not know: ``dropout``, ``moe={"balance": 0.01}``, a smaller
            ``seq_len``.

    Raises:
        ValueError: another family, settings of it that our GPT does not have, by name, or tensors that do not fit.
    """
    config = config_from_hf(folder, **settings)
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).to(AutoConfig.from_pretrained(folder).dtype or torch.float32)
    return load_hf(model, folder).eval()


def load_hf(model: Any, folder: str | Path) -> Any:
    """Read the weights of a folder into a GPT on any mesh, in place; call it on every rank, which reads its own part.

    Gates normalise the weights of a token's experts as the family does.

    Args:
        model: as for `to_hf`, of the config that `config_from_hf` gives.
        folder: as for `from_hf`.

    Raises:
        ValueError: tensors that are missing, left over or of other shapes, by name.
        CheckpointError: on every rank of several, what is a ValueError on one.
    """
    parts = _parts(model)
    hf: Any = AutoConfig.from_pretrained(folder)
    kind = hf.model_type

    def load() -> None:
        reader, config = WeightReader(folder), parts[0].config
        gates = [layer.gate for part in parts for layer in part.modules() if isinstance(layer, MoE)]
        known = [gate for gate in gates if isinstance(gate, TopKGate)]
        if others := {type(gate).__name__ for gate in gates} - {type(gate).__name__ for gate in known}:
            raise ValueError(f'{kind} routes as gate="topk" does, and the model has {", ".join(others)}')
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            every = dict(GPT(config).named_parameters())
        expected = {file: slot.shape for name, p in every.items() for file, slot in _files(config, kind, name, p)}
        if odd := sorted(set(reader.names) ^ expected.keys()):
            raise ValueError(
                f"{folder} is of another model: only one of both has {', '.join(odd[:4])} ({len(odd)} in all)"
            )
        for file, shape in expected.items():
            if reader.shape(file) != shape:
                raise ValueError(f"{file} is {reader.shape(file)} in {folder}, and {shape} in the model")
        for part in parts:
            for name, p in part.named_parameters():
                for file, slot in _files(config, kind, name, p):
                    if slot.region is not None:
                        slot.put(reader.read(file, slot.region))
        for gate in known:
            gate.normalize = bool(getattr(hf, "norm_topk_prob", True))  # Mixtral's always are

    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()
    _agree(load)
    return model


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
        "sliding_window": hf.sliding_window is not None,
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "attention_bias": getattr(hf, "attention_bias", False),
        "mlp_only_layers": bool(getattr(hf, "mlp_only_layers", None)),
        "quantization_config": getattr(hf, "quantization_config", None) is not None,
    }
    every = hf.decoder_sparse_step if qwen else 1
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
        "num_experts": hf.num_local_experts,
        "top_k": hf.num_experts_per_tok,
        "norm_eps": hf.rms_norm_eps,
        "qk_norm": qwen,
        "rope_base": rope.get("rope_theta", 10_000.0),
        "tied": hf.tie_word_embeddings,
    }
    return GPTConfig(**values | settings)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of a model that reads bytes: a token is the number of a byte, and 256 there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _files(config: GPTConfig, kind: str, name: str, p: Tensor) -> Iterator[tuple[str, Slot]]:
    """The tensors of a family's files that a parameter is in, by its name."""
    own, family = name.removesuffix(".weight"), FAMILIES[kind]
    if own in OUTSIDE:
        yield f"{OUTSIDE[own]}.weight", Slot(p)
        return
    _, index, own = own.split(".", 2)
    layer = f"model.layers.{index}"
    routed = config.moe_every and (int(index) + 1) % config.moe_every == 0
    if own in INSIDE:
        yield f"{layer}.{INSIDE[own]}.weight", Slot(p)
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


def _routing(parts: Sequence[GPT]) -> list[tuple[int, bool]]:
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


def _hf_config(config: GPTConfig, routing: list[Any], parts: Sequence[GPT]) -> PretrainedConfig:
    """The family's, of a GPT whose layers choose as `routing` says."""
    kinds = {each for theirs in routing for each in theirs}
    qwen = config.qk_norm
    refused = {
        f"norm={config.norm!r}": config.norm != "rms",
        "moe_every=0, no experts": config.moe_every == 0,
        f"moe_every={config.moe_every} without qk_norm (Mixtral has experts in each block)": config.moe_every > 1
        and not qwen,
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
        "dtype": dtype,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if not qwen:
        return MixtralConfig(**values, intermediate_size=config.hidden, architectures=["MixtralForCausalLM"])
    return Qwen3MoeConfig(
        **values,
        intermediate_size=config.top_k * config.hidden,
        moe_intermediate_size=config.hidden,
        decoder_sparse_step=config.moe_every,
        norm_topk_prob=normalize,
        architectures=["Qwen3MoeForCausalLM"],
    )


def _parts(model: Model) -> Sequence[GPT]:
    if isinstance(model, ParallelModel):
        return model.parts
    return [model] if isinstance(model, nn.Module) else model


def _agree(work: Any) -> list[Any]:
    """What `work` returns on each rank; of one process its own errors, of several CheckpointError on all."""
    return together(work) if dist.is_initialized() else [work()]


def _to_first(tensor: Tensor, owner: int) -> Tensor:
    """A whole tensor that `owner` has, on rank 0's CPU; others return what they were given."""
    rank, _ = place()
    if owner and rank == owner:
        dist.send(tensor.contiguous(), 0)
    elif owner and rank == 0:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.recv(tensor, owner)
    return tensor.cpu() if rank == 0 else tensor
