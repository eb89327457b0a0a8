"""Feed-forward experts: two-layer perceptrons, plain or gated, with a choice of kernels."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...cuda.tune import Shape
from ...dispatch.plan import Plan, Tokens
from ...dispatch.reorder import decode, encode, encode_weight
from ...dispatch.torch_internals import in_backward, transformed
from ..routing import can_be_read
from .activation import ACTIVATIONS, activated, weighted
from .base import Experts
from .blocked import Layer, pays, perceptrons
from .first_use import computes_correctly
from .float8 import check_float8, torch_multiplies
from .four_bit import FourBitMatrix, Matrix
from .grouped_mm import grouped_linear, grouped_product
from .sharded import held_slice, local_as
from .triton_path import KERNELS, PRECISIONS, check_triton, fused


class FeedForwardExperts(Experts):
    """Feed-forward experts: W_down act(W_up x), or gated W_down (act(W_gate x) * W_up x).

    `w_up` and `w_gate` are [E, D, H], and `w_down` is [E, H, D]. With `bias`, `b_up` and `b_gate` are [E, H], and
    `b_down` is [E, D]. The router's weight w multiplies the hidden row a or the output, whichever is narrower:
    W_down (w a) = w W_down a.

    `kernel` chooses the implementation, and may be set at any time. ``"torch"`` is torch's grouped GEMM. ``"triton"``
    reads tokens without a copy and saves less for backward (`fused`; CUDA, not run on a GPU yet). It is checked at its
    first use, and "torch" takes its place with a warning if it is wrong there. ``"auto"``, the default, is
    the faster one on a GPU, timed at the first training step of experts of these sizes (`moe.autotune.first_choice`),
    and "torch" elsewhere. `autotune` measures tiles as well, and sets the faster one.

    `precision` chooses the numbers that are multiplied, and may be set at any time. ``"fp8"`` rounds operands of the
    products with tokens to float8 (e4m3), with a scale for each row and for each column of a matrix: W x forward, and
    the gradients of rows backward. Gradients of the weights stay in the dtype of the tokens, and parameters as they
    are. None, the default, multiplies in the dtype of the tokens.

    Args:
        dim: model width D.
        hidden: hidden width H of each expert.
        num_experts: number of experts E, on all ranks together.
        activation: name in `ACTIVATIONS`. Plain ones are ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"`` and
            ``"relu2"`` (squared, arXiv:2109.08668). Gated ones are ``"swiglu"`` (the default), ``"geglu"``,
            ``"geglu_tanh"``, ``"reglu"`` (arXiv:2002.05202) and ``"clamped_swiglu"`` (gpt-oss, arXiv:2508.10925).
        bias: whether the layers have biases; False by default.
        seed: seed of the initial values, the same on all ranks; 0 by default.

    >>> experts = FeedForwardExperts(dim=4, hidden=8, num_experts=2)
    >>> rows, weight = torch.randn(3, 4), torch.ones(3)
    >>> experts(rows, weight, counts=torch.tensor([1, 2])).shape  # one row of expert 0, two rows of expert 1
    torch.Size([3, 4])
    """

    output_parts = frozenset({"b_down"})

    def __init__(
        self, dim: int, hidden: int, num_experts: int, activation: str = "swiglu", bias: bool = False, seed: int = 0
    ) -> None:
        super().__init__(num_experts, seed)
        if activation not in ACTIVATIONS:
            raise ValueError(f"experts must be one of {', '.join(ACTIVATIONS)} or a factory; got {activation!r}")
        self.dim, self.hidden, self.activation, self.bias = dim, hidden, activation, bias
        self.kernel, self.precision = "auto", None
        self.sizes = {"up": (dim, hidden), "down": (hidden, dim)}
        if ACTIVATIONS[activation].gated:
            self.sizes["gate"] = (dim, hidden)
        for name, (fan_in, fan_out) in self.sizes.items():
            self.register_parameter(f"w_{name}", nn.Parameter(torch.empty(num_experts, fan_in, fan_out)))
            b = nn.Parameter(torch.empty(num_experts, fan_out)) if bias else None
            self.register_parameter(f"b_{name}", b)
        self.reset_parameters()

    @property
    def kernel(self) -> str:
        """Implementation of the experts: ``"auto"``, ``"torch"`` or ``"triton"``."""
        return self._kernel

    @kernel.setter
    def kernel(self, kernel: str) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
        if kernel == "triton" and not ACTIVATIONS[self.activation].triton:
            raise ValueError(f'kernel="triton" has no activation {self.activation!r}: set kernel="torch"')
        if kernel == "triton":
            self._check_plain('kernel="triton"', 'kernel="torch"')
        self._kernel = kernel

    @property
    def precision(self) -> str | None:
        """Numbers that are multiplied: ``"fp8"``, or None for the dtype of the tokens."""
        return self._precision

    @precision.setter
    def precision(self, precision: str | None) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}")
        if precision is not None:
            self._check_plain(f'precision="{precision}"', "precision=None")
        self._precision = precision

    def _check_plain(self, what: str, instead: str) -> None:
        """Triton's kernels, and products in float8, compute the matrices alone, from tensors."""
        if self.adapts:
            raise ValueError(f"{what} has no adapters: merge_lora(model) first, or set {instead}")
        if self.in_four_bits:
            raise ValueError(f"{what} takes no experts in 4 bits: set {instead}")

    def split_axes(self) -> dict[str, int]:
        """See `Experts.split_axes`: the hidden axis. For `b_down` it is the output, and each part adds its piece."""
        if self.in_four_bits:
            raise ValueError("experts in 4 bits cannot be split inside: take etp=1")
        if self.adapts:
            raise ValueError("experts with adapters cannot be split inside: merge_lora(model) first, or take etp=1")
        inside = {"w_up": 2, "w_gate": 2, "w_down": 1, "b_up": 1, "b_gate": 1, "b_down": 1}
        return {name: inside[name] for name, _ in self.named_parameters(recurse=False)}

    def matrices(self) -> dict[str, tuple[Matrix, bool]]:
        """See `Experts.matrices`."""
        return {name: (getattr(self, f"w_{name}"), False) for name in self.sizes}

    @property
    def gathers(self) -> bool:
        """Whether `forward` takes `Tokens`: not if weights multiply inputs, nor in compiled recomputation."""
        return self._weight_on == "output" and not (self.recompute and torch.compiler.is_compiling())

    def forward(self, rows: Tensor | Tokens, weight: Tensor, counts: Tensor) -> Tensor:
        """See `Experts.forward`. It also takes `Tokens` [T, D] with weight [T, k], and then returns tokens [T, D]."""
        x, plan = rows if isinstance(rows, Tokens) else (rows, None)
        if plan is not None and plan.capacity is not None and x.device.type == "cpu" and _is_eager():
            plan = plan.compact()  # a CPU needs no static shapes, and products of padding take as long as others
            counts = plan.counts
        up, down, *gate = (self._layer(name, x) for name in self.sizes)
        number = len(weight) if plan is None else len(plan.token)
        kernel = self._kernel
        if kernel == "auto":
            kernel = self._faster(x, up[0], number, plan) if x.is_cuda else "torch"
        if self._precision is not None:
            compute = partial(fused, how=self._how(kernel, x, up[0], number, plan))
        elif kernel == "triton":
            check_triton(x, self.activation)
            self._check_plain('kernel="triton"', 'kernel="torch"')
            right = computes_correctly(x, self.activation, up[0], self.bias, number, plan is not None)
            compute = fused if right else self._at_once
        elif isinstance(up[0], Tensor) and self._in_blocks(x, number):
            compute = perceptrons
        else:
            compute = self._at_once
        return compute(x, weight, counts, self.activation, [up, *gate], down, plan)

    def _faster(self, x: Tensor, up: Any, rows: int, plan: Plan | None) -> str:
        """The kernel that ``"auto"`` stands for on a GPU: the only one that can compute these rows, or the faster."""
        if torch.compiler.is_compiling() or self.adapts or self.in_four_bits:
            return "torch"
        (L, D, H), fp8 = up.shape, self._precision is not None
        if fp8 and not torch_multiplies(x.device, x.dtype, D, H):
            return "triton"
        if not isinstance(self.w_up, nn.Parameter):
            return "torch"  # gathered experts, of which each step has others: timing them would stall every step
        from ..autotune.first_choice import faster  # imports the layer

        k, dtype = 1 if plan is None else plan.slot.shape[1], str(x.dtype).removeprefix("torch.")
        kind, gated = self.activation, ACTIVATIONS[self.activation].gated
        shape = Shape(rows // k, D, H, L, k, kind, self.bias, dtype, plan is not None, gated, self._precision or "")
        learns = self.training and torch.is_grad_enabled() and can_be_read(x) and not in_backward()
        return faster(shape, x.device, self.w_up, learns)

    def _how(self, kernel: str, x: Tensor, up: Any, rows: int, plan: Plan | None) -> str:
        """What computes experts in float8, as `fused` calls it."""
        self._check_plain('precision="fp8"', "precision=None")
        check_float8(x, kernel, *up.shape[1:])
        if kernel == "triton":
            check_triton(x, self.activation)
            right = computes_correctly(x, self.activation, up, self.bias, rows, plan is not None, self._precision)
            kernel = "triton" if right else "torch"
        return f"{kernel}, fp8"

    def _in_blocks(self, x: Tensor, rows: int) -> bool:
        return self.lora is None and _is_eager() and pays(x, rows, max(self.dim, self.hidden))

    def _at_once(
        self,
        x: Tensor,
        weight: Tensor,
        counts: Tensor,
        activation: str,
        ups: list[Layer],
        down: Layer,
        plan: Plan | None,
    ) -> Tensor:
        """All experts with one grouped GEMM for each layer. Arguments are as in `fused`."""
        rows, ends = x if plan is None else encode(x, plan), counts.cumsum(0).to(torch.int32)
        product = grouped_product(rows, down[0], *(matrix for matrix, _ in ups))

        def linear(name: str, layer: Layer, rows: Tensor, weight: Tensor | None = None) -> Tensor:
            y = grouped_linear(rows, ends, *layer, weight, product)
            return y if self.lora is None else self.adapted(name, y, rows, ends)

        hidden = activated(
            ACTIVATIONS[activation], *(linear(name, up, rows) for name, up in zip(("up", "gate"), ups, strict=False))
        )
        if self.hidden >= self.dim:
            rows = linear("down", down, hidden)
            return weighted(rows, weight) if plan is None else decode(rows, plan, weight)
        weight = weight if plan is None else encode_weight(weight, plan)
        rows = linear("down", down, weighted(hidden, weight), weight)
        return rows if plan is None else decode(rows, plan)

    def _layer(self, name: str, x: Tensor) -> Layer:
        """This rank's weight [L, in, out] and bias [L, out] of the layer `name`, in the dtype of x."""
        matrix = getattr(self, f"w_{name}")
        weight: Any = matrix.held if isinstance(matrix, FourBitMatrix) else local_as(matrix, x)
        if not self.bias:
            return weight, None
        whole = getattr(self, f"b_{name}")
        bias = local_as(whole, x)
        if bias.shape[1] < weight.shape[2]:  # expert tensor parallelism: this rank's piece of `b_down`, then zeros
            held = held_slice(whole)[1]
            bias = F.pad(bias, (held.start, weight.shape[2] - held.stop))
        return weight, bias

    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        initial = {}
        for name, (fan_in, fan_out) in self.sizes.items():  # uniform within 1 / sqrt(fan_in), as nn.Linear
            bound = 1 / math.sqrt(fan_in)
            for kind, shape in {"w": (fan_in, fan_out), "b": (fan_out,)}.items():
                drawn = torch.empty(shape, device="cpu", dtype=torch.float32)
                initial[f"{kind}_{name}"] = drawn.uniform_(-bound, bound, generator=generator)
        return initial

    def extra_repr(self) -> str:
        """Text that ``print(model)`` shows."""
        said = f"{self.num_experts} x {self.activation}, dim={self.dim}, hidden={self.hidden}, bias={self.bias}"
        return said if self._precision is None else f"{said}, precision={self._precision!r}"


def _is_eager() -> bool:
    return not torch.compiler.is_compiling() and not transformed()
