"""Generate text with a GPT, token by token, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..moe.gates.expert_choice import ExpertChoiceGate
from ..moe.layer import moe_layers
from .blocks import Context
from .data_parallel import reshard
from .documents import documents_of
from .gpt import GPT
from .recompute import Core


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Continue a prompt. Each token runs through the model once, since keys and values of earlier ones are kept.

    The model runs in eval mode without capacity, so no token is dropped. Every token is routed by itself, so the logits
    of a prefix do not depend on what follows.

    Args:
        model: whole GPT, with experts on one rank or spread over "ep". Not with tensor or pipeline parallelism.
        prompt: token ids, int64 [B, S], with S at least 1. The B sequences are continued independently.
        length: number of tokens to add, so that S + `length` is at most ``config.seq_len``.
        temperature: divisor of the logits, 1.0 by default. 0 takes the most likely token (greedy).
        top_p: sample from the fewest most likely tokens whose probabilities reach this sum (nucleus sampling,
            arXiv:1904.09751), in (0, 1]. 1.0, the default, samples from all.
        generator: source of random numbers on the model's device; torch's default if None, the default.
        group: ranks that generate the same sequences together, with experts spread over them: all of them take the
            tokens of its first rank. None, the default, is one rank.

    Returns:
        Token ids, int64 [B, S + length].

    Raises:
        ValueError: arguments out of range, or a gate that is not causal.

    >>> from turnout.models import GPTConfig
    >>> model = GPT(GPTConfig(dim=32, layers=2, heads=2, hidden=16, num_experts=4, seq_len=8))
    >>> generate(model, torch.zeros(1, 3, dtype=torch.int64), 5, temperature=0).shape
    torch.Size([1, 8])
    """
    _check(model, prompt, length, temperature, top_p)
    tokens, logits = prompt, None
    with _to_generate(model), Cache(model) as cache:
        for _ in range(length):
            logits = cache.logits(tokens[:, cache.length :])[:, -1]
            chosen = sample(logits, temperature, top_p, generator)
            if group is not None:
                dist.broadcast(chosen, group=group, group_src=0)
            tokens = torch.cat([tokens, chosen.unsqueeze(1)], 1)
    reshard(model)
    return tokens


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token for each row of logits [B, vocab], as `generate` describes; returns int64 [B].

    >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=1.0, top_p=0.5)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    probability, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probability.cumsum(-1) - probability  # of the tokens that are more likely
    nucleus = probability.masked_fill(before >= top_p, 0.0)  # the most likely one always stays
    return token.gather(-1, torch.multinomial(nucleus, 1, generator=generator)).squeeze(-1)


class Cache:
    """Context in which a GPT keeps the keys and values of each attention, [B, kv heads, length, size].

    Attributes:
        length: number of tokens that the model has seen in the context.
    """

    def __init__(self, model: GPT) -> None:
        self.model, self.length = model, 0
        self._tokens = torch.zeros(1, 0, dtype=torch.int64)
        self._held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Self:
        self._hooks = [self.model.blocks.register_forward_pre_hook(self._at_its_place)]
        for core in (module for module in self.model.modules() if isinstance(module, Core)):
            self._hooks.append(core.register_forward_pre_hook(self._with_earlier, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def logits(self, tokens: Tensor) -> Tensor:
        """Run the next tokens, int64 [B, S], and return their logits [B, S, vocab]."""
        self._tokens = torch.cat([self._tokens.to(tokens).expand(len(tokens), -1), tokens], 1)
        logits = self.model(tokens)
        self.length += tokens.shape[1]
        return logits

    def _at_its_place(self, blocks: nn.Module, args: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
        """Rotate the tokens by their places in the sequence, which begins before them."""
        x, context = args
        assert context.cos is not None
        assert context.sin is not None
        here = slice(self.length, self.length + x.shape[1])
        return x, context._replace(cos=context.cos[here], sin=context.sin[here])

    def _with_earlier(self, core: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
        """Put earlier keys and values before the new ones. A query sees those up to its own place."""
        q, k, v, *more = args
        if self.length:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self._held[core], (k, v), strict=True))
            options = {**options, "causal": False, "mask": self._mask(q)}
        self._held[core] = k, v
        return (q, k, v, *more), options

    def _mask(self, q: Tensor) -> Tensor:
        """Places that the new tokens attend to, as far as windows let them: bool [S, length + S] or [B, 1, ...]."""
        places = torch.arange(self.length + q.shape[2], device=q.device)
        mask = places <= places[self.length :, None]
        if self.model.config.eod is None:
            return mask
        documents = documents_of(self._tokens, self.model.config.eod)
        return (mask & (documents[:, self.length :, None] == documents[:, None])).unsqueeze(1)


@contextmanager
def _to_generate(model: GPT) -> Iterator[None]:
    """Context in which the model is in eval mode, and its MoE layers have no capacity."""
    training = model.training
    capacities = {layer: layer.capacity for layer in moe_layers(model).values()}
    try:
        model.eval()
        for layer in capacities:
            layer.capacity = None
        yield
    finally:
        model.train(training)
        for layer, capacity in capacities.items():
            layer.capacity = capacity


def _check(model: GPT, prompt: Tensor, length: int, temperature: float, top_p: float) -> None:
    if prompt.ndim != 2 or not prompt.shape[1] or prompt.dtype != torch.int64:
        raise ValueError(f"prompt must be int64 [B, S] with S at least 1; got {prompt.dtype} {tuple(prompt.shape)}")
    if length < 0 or prompt.shape[1] + length > model.config.seq_len:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens and length={length} must fit into seq_len={model.config.seq_len}: "
            "shorten the prompt or the length"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or positive; got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    for name, layer in moe_layers(model).items():
        if isinstance(layer.gate, ExpertChoiceGate):
            raise ValueError(f"{name} has an expert_choice gate: it looks at later tokens, so nothing can be generated")
