"""Seconds of computing that a micro-batch takes in each part of a model, on one rank, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .architecture import Architecture
from .cluster import Software
from .roofline import Kernels


class Time(NamedTuple):
    """Seconds of computing, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> Time:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add the times of two parts that run one after the other."""
        return Time(self.forward + other[0], self.backward + other[1])


@dataclass(frozen=True)
class Blocks:
    """Times of the parts of a model, with b sequences in a micro-batch and tensor parallelism over t ranks.

    Operations other than matrix products take the time of the bytes they move. One that reads a tensor and writes
    another moves two numbers for each element in the forward. In the backward it reads the gradient and what it saved,
    and writes a gradient.
    """

    model: Architecture
    software: Software
    kernels: Kernels
    micro_batch: int
    tp: int
    sequence_parallel: bool  # norms and dropout run on S / t tokens of each sequence
    cp: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that go through matrix products on this rank, which has 1/cp of each sequence."""
        return self.micro_batch * self.model.seq // self.cp

    @property
    def own(self) -> float:
        """Tokens that norms, dropout and residual connections see on one rank."""
        return self.tokens / self.tp if self.sequence_parallel else self.tokens

    def linear(self, n: float, k: float, split: str, rows: float | None = None) -> Time:
        """Product with a weight [k, n], of whose "columns" or "rows" this rank has 1/t; ``split=""`` splits nothing."""
        m = round(self.tokens if rows is None else rows)
        if split == "columns":
            n /= self.tp
        elif split == "rows":
            k /= self.tp
        n, k = max(1, round(n)), max(1, round(k))
        product = self.kernels.product
        return Time(product(m, n, k), product(m, k, n) + self._weights(n, k, m))

    def _weights(self, n: int, k: int, m: int, groups: int = 1) -> float:
        """Seconds for the gradients of `groups` weights [k, n], from m rows each, and their accumulation."""
        size = self.software.gradient_wire_bytes
        if self.software.fused_accumulation:
            return self.kernels.product(n, k, m, groups, accumulate=size)
        return self.kernels.product(n, k, m, groups) + self.kernels.elementwise(3 * size * n * k * groups)

    def moved(self, forward: float, backward: float, elements: float, kernels: int = 1) -> Time:
        """Element-wise operation that moves this many numbers for each element. A dropout mask is half a number."""
        size = self.kernels.size * elements
        return Time(
            self.kernels.elementwise(forward * size, kernels), self.kernels.elementwise(backward * size, kernels)
        )

    def norm(self) -> Time:
        """Norm. Its backward reads input and gradient once more, for the gradients of its weights."""
        return self.moved(2, 5, self.own * self.model.dim)

    def residual(self) -> Time:
        """Bias, dropout and residual sum. The backward adds the two gradients of the residual stream."""
        elements, plain = self.own * self.model.dim, self.model.plain
        dropout = self.software.dropout
        if self.software.fused:
            branch = self.moved(3 + 0.5 * dropout, (2.5 if dropout else 0) + plain, elements)
        else:
            branch = self.moved(2 * plain + 2.5 * dropout + 3, 2.5 * dropout + plain, elements, 3)
        return branch + self.moved(0, 3, elements)

    def attention(self) -> Time:
        """Norm, projections and residual sum of an attention. `core` is the rest of it."""
        model = self.model
        width = (model.q_dim + 2 * model.kv_dim) / self.tp
        time = self.norm() + self.linear(model.q_dim + 2 * model.kv_dim, model.dim, "columns")
        if model.plain:
            time += self.moved(2, 1, self.tokens * width)  # the bias
        else:
            time += self.moved(2, 2, self.tokens * (model.q_dim + model.kv_dim) / self.tp)  # rotary positions
        if model.qk_norm:
            time += self.moved(2, 5, self.tokens * (model.q_dim + model.kv_dim) / self.tp, 2)
        time += self.moved(2, 2, self.tokens * model.q_dim / self.tp)  # heads side by side again
        return time + self.linear(model.dim, model.q_dim, "rows") + self.residual()

    def core(self) -> Time:
        """Core of causal attention: softmax(q k / sqrt(head_dim)) v."""
        model, heads = self.model, self.micro_batch * self.model.heads / self.tp / self.cp
        s, d = model.seq, model.head_dim
        if self.software.attention == "fused":  # half of the scores are masked, and never computed
            device = self.kernels.device
            flops = 2 * s * s * d * heads * (1 + model.windowed)  # a mask hides scores, but saves none
            rate = self.kernels.peak * device.fused_attention_share
            # no scores in memory; backward computes them once more: 5 products for 2 forward
            moved = self.kernels.elementwise(self.kernels.size * 4 * s * d * heads)
            return Time(max(flops / rate, moved), max(2.5 * flops / rate, 2 * moved))
        scores, values = self.kernels.product(s, s, d, heads), self.kernels.product(s, d, s, heads)
        elements = heads * s * s
        time = Time(scores + values, scores + 3 * values)
        # the fused softmax reads the lower triangle and writes the whole; else scale, mask, and softmax in float32
        time += self.moved(1.5, 2, elements) if self.software.fused else self.moved(14, 10, elements, 6)
        return time + (self.moved(2.5, 2.5, elements) if self.software.dropout else Time())

    def feed_forward(self) -> Time:
        """Norm, dense feed-forward network and residual sum."""
        model = self.model
        up, width = model.ffn * (model.matrices - 1), self.tokens * model.ffn / self.tp
        time = self.norm() + self.linear(up, model.dim, "columns") + self.activation(width)
        return time + self.linear(model.dim, model.ffn, "rows") + self.residual()

    def activation(self, elements: float) -> Time:
        """Activation between the matrix products. A gated one reads two tensors."""
        if self.model.gated:
            return self.moved(3, 5, elements) if self.software.fused else self.moved(5, 8, elements, 2)
        return self.moved(2, 4, elements) if self.software.fused else self.moved(4, 5, elements, 2)

    def mixture(self, ep: int, etp: int) -> Time:
        """Norm, router, permutations and experts of a mixture; each rank routes its own T tokens."""
        model, k = self.model, self.model.top_k
        tokens = self.tokens / self.tp
        load = model.load_factor
        rows = tokens * k * load * etp  # the etp ranks of an expert compute each other's rows, with a slice of it
        experts, hidden = model.experts / ep, model.hidden / etp
        time = self.moved(2, 5, tokens * model.dim)
        time += self.linear(model.experts, model.dim, "", tokens)
        time += self.moved(12, 8, tokens * model.experts, 12)  # softmax, top-k and the plan
        # encode and decode, forward and each other's backward; rows are put in order again where they arrive
        time += self.moved(2 * (1 + k), 2 * (1 + k), tokens * model.dim, 2)
        if ep > 1:
            time += self.moved(4, 4, tokens * k * load * model.dim, 2)
        time += self.experts(experts, rows / experts, hidden, model.matrices - 1)
        if model.shared:
            width = model.hidden * model.shared
            time += self.linear(width * (model.matrices - 1), model.dim, "", tokens)
            time += self.activation(tokens * width) + self.linear(model.dim, width, "", tokens)
        return time + self.moved(3, 3, tokens * model.dim)

    def experts(self, number: float, rows: float, hidden: float, ups: int) -> Time:
        """Grouped GEMMs of `number` experts with `rows` rows each, and `ups` matrices before the activation."""
        dim, groups, m = self.model.dim, max(1, round(number)), max(1, round(rows))
        grouped, n = self.kernels.grouped, round(hidden)
        time = self.activation(m * groups * hidden)
        forward = grouped(groups, m, ups * n, dim) + grouped(groups, m, dim, n)
        backward = grouped(groups, m, dim, ups * n) + grouped(groups, m, n, dim)
        backward += self._weights(ups * n, dim, m, groups) + self._weights(dim, n, m, groups)
        return time + Time(forward, backward)

    def embedding(self) -> Time:
        """Embedding: the look-up, and the sum of gradients by token."""
        return self.moved(2, 4, self.own * self.model.dim)

    def join(self) -> Time:
        """Join of hidden states and a further token: two norms, and a matrix [2D, D]."""
        tokens, dim = self.own, self.model.dim
        return self.norm() + self.norm() + self.moved(4, 4, tokens * dim) + self.linear(dim, 2 * dim, "", tokens)

    def head(self) -> Time:
        """Last norm, logits over 1/t of the vocabulary, and the loss in float32."""
        elements = self.tokens * self.model.vocab / self.tp
        time = self.norm() + self.linear(self.model.vocab, self.model.dim, "columns")
        # to float32, largest, difference, exponential, sum, quotient: 38 bytes a logit where numbers have 2; backward
        # the product with the gradient, and back to half precision, 14
        return time + self.moved(19, 7, elements, 8)
