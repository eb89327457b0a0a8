"""Convert a `GPT` to Mixtral or Qwen3-MoE of Hugging Face, and back. Both compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from ...moe.experts.placed import check_home
from ...moe.experts.sharded import whole
from ...moe.gates.topk import TopKGate
from ...moe.layer import moe_layers
from ..checkpoint.together import place
from ..data_parallel import reshard
from ..gpt import GPT
from ..parallel_model import ParallelModel
from .gpt_mapping import config_from_hf, differences, files_of, hf_config, routing_of
from .weight_files import RankZeroWriter, WeightReader, WeightWriter, everywhere

__all__ = ["byte_tokenizer", "config_from_hf", "from_hf", "load_hf", "to_hf"]

Model = GPT | ParallelModel | Sequence[GPT]


@torch.no_grad()
def to_hf(model: Model, folder: str | Path, max_shard_size: int | str = "50GB") -> None:
    """Write a GPT as a model of Hugging Face, on any mesh. The GPT stays as it is. Call it on every rank.

    With ``qk_norm=True`` it becomes Qwen3-MoE, which may have dense blocks as well, and otherwise Mixtral. Logits in
    eval mode are the same. Settings for training alone are left out: dropout, balance losses, and noise of the gate.
    Rank 0 writes, and needs main memory for its part and one more tensor.

    Args:
        model: a `GPT`, a list of the pipeline stages that this rank runs, or a `ParallelModel`.
        folder: folder for the files. It is made if it is missing.
        max_shard_size: as for transformers' `save_pretrained`; "50GB" by default.

    Raises:
        ValueError: the model has settings that neither family has. The message names all of them.
        CheckpointError: on every rank of several, if there is such a setting, or if rank 0 cannot write.
    """
    parts = _parts(model)
    config = parts[0].config
    routing = everywhere(lambda: routing_of(parts))
    hf = everywhere(lambda: hf_config(config, routing, parts))[0]
    for part in parts:
        reshard(part)  # after an evaluation the root is whole
    held = {name: p for part in parts for name, p in part.named_parameters()}
    everyones = everywhere(lambda: list(held))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        names = dict(GPT(config).to(next(iter(held.values())).dtype).named_parameters())
    slots = {name: list(files_of(config, hf.model_type, name, p)) for name, p in names.items()}

    def make() -> WeightWriter:
        hf.save_pretrained(folder)
        GenerationConfig.from_model_config(hf).save_pretrained(folder)
        tensors = {file: slot.of_file(slot.tensor) for each in slots.values() for file, slot in each}
        tensors = {file: torch.empty(t.shape, dtype=t.dtype, device="meta") for file, t in tensors.items()}
        return WeightWriter(folder, tensors, max_shard_size)

    with RankZeroWriter(make) as writer:
        for name, empty in names.items():
            owner = next(rank for rank, theirs in enumerate(everyones) if name in theirs)
            tensor = _to_first(whole(held[name].detach()) if name in held else empty, owner)
            writer.write(lambda name=name, tensor=tensor: {file: slot.of_file(tensor) for file, slot in slots[name]})
        writer.finish(total_parameters=sum(p.numel() for p in names.values()))


def from_hf(folder: str | Path, **settings: Any) -> GPT:
    """Load a Mixtral or Qwen3-MoE of Hugging Face as a `GPT` that computes the same, on the CPU.

    For many ranks, build a model with `config_from_hf` and fill it with `load_hf`.

    Args:
        folder: folder with `config.json` and safetensors.
        settings: fields of `GPTConfig` that the folder does not have, such as ``dropout``,
            ``moe={"balance": 0.01}`` or a smaller ``seq_len``.

    Returns:
        The GPT, in eval mode.

    Raises:
        ValueError: the folder has another family, settings that a `GPT` does not have, or tensors that do not fit.
    """
    config = config_from_hf(folder, **settings)
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).to(AutoConfig.from_pretrained(folder).dtype or torch.float32)
    return load_hf(model, folder).eval()


def load_hf(model: Any, folder: str | Path) -> Any:
    """Read the weights of a folder into a GPT on any mesh, in place. Call it on every rank, which reads its own part.

    Gates are set to normalise the weights of a token's experts as the family does.

    Args:
        model: model as for `to_hf`, built with the config from `config_from_hf`.
        folder: folder as for `from_hf`.

    Returns:
        The model.

    Raises:
        ValueError: the model has another config, except for ``seq_len``, ``dropout``, ``eod`` and ``moe``, or tensors
            are missing, left over or of other shapes.
        CheckpointError: on every rank of several, if one of these errors is found on any.
    """
    parts = _parts(model)
    config = parts[0].config
    hf: Any = AutoConfig.from_pretrained(folder)
    kind = hf.model_type

    def load() -> None:
        reader = WeightReader(folder)
        if wrong := differences(config, config_from_hf(folder)):
            raise ValueError(f"the model is not the one in {folder}: {', '.join(wrong)}; build it by config_from_hf")
        gates = [layer.gate for part in parts for layer in moe_layers(part).values()]
        known = [gate for gate in gates if isinstance(gate, TopKGate)]
        if others := {type(gate).__name__ for gate in gates} - {type(gate).__name__ for gate in known}:
            raise ValueError(f'{kind} routes as gate="topk" does, and the model has {", ".join(others)}')
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            every = dict(GPT(config).named_parameters())
        expected = {file: slot.shape for name, p in every.items() for file, slot in files_of(config, kind, name, p)}
        if odd := sorted(set(reader.names) ^ expected.keys()):
            raise ValueError(
                f"{folder} is of another model: only one of both has {', '.join(odd[:4])} ({len(odd)} in all)"
            )
        for file, shape in expected.items():
            if reader.shape(file) != shape:
                raise ValueError(f"{file} is {reader.shape(file)} in {folder}, and {shape} in the model")
        for part in parts:
            for name, p in part.named_parameters():
                for file, slot in files_of(config, kind, name, p):
                    if slot.region is not None:
                        slot.put(reader.read(file, slot.region))
        for gate in known:
            gate.normalize = bool(getattr(hf, "norm_topk_prob", True))  # Mixtral's always are

    for part in parts:
        reshard(part)
    everywhere(load)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of a model that reads bytes: the 256 tokens are the values of a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _parts(model: Model) -> Sequence[GPT]:
    if isinstance(model, ParallelModel):
        model = model.parts
    parts = [model] if isinstance(model, nn.Module) else model
    for part in parts:
        if not isinstance(part, GPT):
            raise TypeError(f"this format is of a GPT; got {type(part).__name__}, which has no counterpart there")
        check_home(part, "weights are read or written in this format")
    return parts


def _to_first(tensor: Tensor, owner: int) -> Tensor:
    """Send a whole tensor from rank `owner` to rank 0's CPU. Other ranks return their argument."""
    rank, _ = place()
    if owner and rank == owner:
        dist.send(tensor.contiguous(), 0)
    elif owner and rank == 0:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.recv(tensor, owner)
    return tensor.cpu() if rank == 0 else tensor
