"""The experts: E networks of one shape, their tensors stacked, over rows sorted by expert."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dispatch.plan import Plan
from ...dispatch.reorder import decode, encode, encode_weight
from ...dispatch.torch_internals import transformed
from ..adapters.low_rank import LowRank
from .activation import ACTIVATIONS, activated, weighted
from .blocked import Layer, pays, perceptrons
from .grouped_mm import grouped_linear, grouped_mm
from .sharded import held_slice, local, local_as, seeded, take_parts, unchanged
from .triton_path import KERNELS, check_triton, fused


class Experts(nn.Module, ABC):
    """E experts, of which this rank holds L: all of them, until `parallelize` spreads them.

    Every parameter and buffer is stacked over the experts on axis 0: a plain tensor [E, ...], or a
    DTensor of that shape sharded on axis 0 over the ranks that share the experts. Expert e is initialised
    from a generator seeded by (seed, e) alone: the same model at every world size, no two experts alike.
    """

    gathers = False  # whether `forward` takes tokens and their plan, in place of rows: see `FeedForwardExperts.forward`
    lora: nn.ModuleDict | None

    def __init__(self, num_experts: int, seed: int) -> None:
        super().__init__()
        self.num_experts, self.seed = num_experts, seed
        self.lora = None  # adapters by the names of `matrices`, in a ModuleDict: see `add_lora`
        self.register_forward_hook(unchanged)

    def split_axes(self) -> dict[str, int]:
        """The axis along which each tensor may be split inside an expert, so that the parts' outputs add up."""
        raise ValueError(f"{type(self).__name__} cannot be split inside an expert: use a mesh with etp=1")

    @property
    def adapts(self) -> bool:
        """Whether adapters are computed beside the matrices: there are some, and they are not merged."""
        return self.lora is not None and not all(adapter.merged for adapter in self.lora.values())

    def matrices(self) -> dict[str, tuple[Tensor, bool]]:
        """Stacked matrices that adapters may stand beside (`adapted`), and whether each is stored [E, out, in]."""
        return {}

    def adapted(self, name: str, y: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        """y [R, out], rows [R, in] times the matrix `name`, with what its adapter adds; `ends` as in `grouped_mm`."""
        adapter = None if self.lora is None else self.lora[name]
        if not isinstance(adapter, LowRank):
            return y
        return adapter.beside(y, rows, lambda x, matrix: grouped_mm(x, matrix.to(x.dtype), ends))

    @abstractmethod
    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """rows [R, D] sorted by local expert, weight [R], counts int64 [L] -> weighted rows [R, D].

        Rows past counts.sum() belong to nobody and come back undefined.
        """

    @abstractmethod
    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw one expert: the value of each stacked tensor, by name, without the axis of the experts."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the experts held here; call it after `to_empty` from the meta device."""
        for adapter in self.modules():
            if isinstance(adapter, LowRank):
                adapter.reset_parameters()
        stacked = dict(self.named_parameters()) | dict(self.named_buffers())
        stacked = {name: t for name, t in stacked.items() if not name.startswith("lora.")}
        if not any(t.is_meta for t in stacked.values()):
            self._fill(stacked)

    def _fill(self, stacked: dict[str, Tensor]) -> None:
        """Give stacked tensors, by name, their first values."""
        held = {name: held_slice(t) for name, t in stacked.items()}  # FSDP may split one tensor otherwise than the next
        for expert in range(self.num_experts):
            here = {name: t for name, t in stacked.items() if held[name][0].start <= expert < held[name][0].stop}
            if not here:
                continue
            initial = self._initial(seeded(self.seed, f"{expert}"))
            for name, tensor in here.items():
                if initial[name].shape != tensor.shape[1:]:
                    shapes = f"{tuple(tensor.shape[1:])} and {tuple(initial[name].shape)}"
                    raise ValueError(f"experts must be of one shape; {name} is {shapes} in different ones")
                local(tensor)[expert - held[name][0].start].copy_(initial[name][held[name][1:]])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        take_parts(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def owned(self) -> range:
        """Global ids of the experts whose tensors lie on this rank."""
        held = held_slice(next(self.parameters()))[0]
        return range(held.start, held.stop)

    @property
    def row_flops(self) -> float:
        """Operations of one expert for one row, forward: two for each parameter, as every weight of a product costs."""
        return 2 * sum(p.numel() for p in self.parameters()) / self.num_experts

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> Callable[[Tensor], Tensor]:
        """Expert `expert`, by global id: a function [n, D] -> [n, D] that shares its weights, unweighted."""
        if not -self.num_experts <= expert < self.num_experts:
            raise IndexError(f"there is no expert {expert} among {self.num_experts}")
        expert, owned = expert % self.num_experts, self.owned
        if expert not in owned:
            raise IndexError(
                f"expert {expert} lies on rank {expert // len(owned)} of the expert group; this rank holds "
                f"{owned.start} to {owned.stop - 1}"
            )
        return lambda x: self._one(expert - owned.start, x)

    def _one(self, place: int, x: Tensor) -> Tensor:
        counts = torch.zeros(len(self.owned), dtype=torch.int64, device=x.device)
        counts[place] = len(x)
        return self(x, torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device), counts)


class FeedForwardExperts(Experts):
    """Two-layer perceptrons: W_down act(W_up x), or gated, W_down (act(W_gate x) * W_up x).

    `w_up` and `w_gate` are [E, D, H], `w_down` [E, H, D]; with `bias`, `b_up` and `b_gate` [E, H],
    `b_down` [E, D]. The gate's weight multiplies the hidden row or the output, whichever is narrower:
    W_down (w a) = w W_down a.

    `kernel`, which may be set at any time, says what computes them: ``"torch"``, its grouped matrix product;
    ``"triton"``, `fused`, which reads tokens where they lie and keeps less for the backward (CUDA; not run on
    a GPU yet); ``"auto"``, which is "torch". `autotune` measures, and sets the faster.

    Args:
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"relu2"`` (squared, arXiv:2109.08668); or
            gated (arXiv:2002.05202), ``"swiglu"``, ``"geglu"``, ``"geglu_tanh"``, ``"reglu"``, ``"clamped_swiglu"``
            (gpt-oss, arXiv:2508.10925). The table is `ACTIVATIONS` in `moe/experts/activation.py`.
    """

    gathers = True

    def __init__(
        self, dim: int, hidden: int, num_experts: int, activation: str = "swiglu", bias: bool = False, seed: int = 0
    ) -> None:
        super().__init__(num_experts, seed)
        if activation not in ACTIVATIONS:
            raise ValueError(f"experts must be one of {', '.join(ACTIVATIONS)} or a factory; got {activation!r}")
        self.dim, self.hidden, self.activation, self.bias = dim, hidden, activation, bias
        self.kernel = "auto"
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
        """What computes the experts."""
        return self._kernel

    @kernel.setter
    def kernel(self, kernel: str) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
        if kernel == "triton" and not ACTIVATIONS[self.activation].triton:
            raise ValueError(f'kernel="triton" has no activation {self.activation!r}: set kernel="torch"')
        if kernel == "triton" and self.adapts:
            raise ValueError('kernel="triton" has no adapters: merge_lora(model) first, or set kernel="torch"')
        self._kernel = kernel

    def split_axes(self) -> dict[str, int]:
        """The hidden width; of `b_down`, the output's: each part adds its own piece."""
        if self.adapts:
            raise ValueError("experts with adapters cannot be split inside: merge_lora(model) first, or take etp=1")
        inside = {"w_up": 2, "w_gate": 2, "w_down": 1, "b_up": 1, "b_gate": 1, "b_down": 1}
        return {name: inside[name] for name, _ in self.named_parameters(recurse=False)}

    def matrices(self) -> dict[str, tuple[Tensor, bool]]:
        """See `Experts.matrices`."""
        return {name: (getattr(self, f"w_{name}"), False) for name in self.sizes}

    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor, plan: Plan | None = None) -> Tensor:
        """See `Experts.forward`; with a `plan`, its tokens [T, D] and their weight [T, k] -> tokens [T, D].

        One grouped matrix product a layer, or on a CPU a few experts at a time (`pays`); empty experts cost nothing.
        """
        if self.kernel == "triton":
            check_triton(rows, self.activation)
            return fused(rows, weight, counts, self.activation, *self._layers(rows), plan)
        if self._few_at_a_time(rows, len(weight) if plan is None else len(plan.token)):
            if plan is not None and plan.capacity is not None:  # its rows of nobody name no token
                return decode(self.forward(encode(rows, plan), encode_weight(weight, plan), counts), plan)
            return perceptrons(rows, weight, counts, ACTIVATIONS[self.activation], *self._layers(rows), plan)
        rows = rows if plan is None else encode(rows, plan)
        ends = counts.cumsum(0).to(torch.int32)
        kind, hidden = ACTIVATIONS[self.activation], self._linear("up", rows, ends)
        hidden = activated(kind, hidden, self._linear("gate", rows, ends) if kind.gated else None)
        if self.hidden >= self.dim:
            rows = self._linear("down", hidden, ends)
            return weighted(rows, weight) if plan is None else decode(rows, plan, weight)
        weight = weight if plan is None else encode_weight(weight, plan)
        rows = self._linear("down", weighted(hidden, weight), ends, weight)
        return rows if plan is None else decode(rows, plan)

    def _few_at_a_time(self, x: Tensor, rows: int) -> bool:
        plain = not torch.compiler.is_compiling() and not transformed() and not self.adapts
        return plain and pays(x, rows, max(self.dim, self.hidden))

    def _linear(self, name: str, rows: Tensor, ends: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.adapted(name, grouped_linear(rows, ends, *self._layer(name, rows), weight), rows, ends)

    def _layers(self, rows: Tensor) -> tuple[list[Layer], Layer]:
        """Those before the activation, up and gate, and the one behind it."""
        up, down, *gate = (self._layer(name, rows) for name in self.sizes)
        return [up, *gate], down

    def _layer(self, name: str, rows: Tensor) -> Layer:
        """Weight [L, in, out] and bias [L, out] of the layer `name`, in the dtype of rows."""
        weight = self._tensor(f"w_{name}", rows)
        if not self.bias:
            return weight, None
        bias = self._tensor(f"b_{name}", rows)
        if bias.shape[1] < weight.shape[2]:  # of experts split inside, this rank's part
            held = held_slice(getattr(self, f"b_{name}"))[1]
            bias = F.pad(bias, (held.start, weight.shape[2] - held.stop))
        return weight, bias

    def _tensor(self, name: str, rows: Tensor) -> Tensor:
        return local_as(getattr(self, name), rows)

    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        initial = {}
        for name, (fan_in, fan_out) in self.sizes.items():  # uniform within 1 / sqrt(fan_in), as nn.Linear
            bound = 1 / math.sqrt(fan_in)
            for kind, shape in {"w": (fan_in, fan_out), "b": (fan_out,)}.items():
                drawn = torch.empty(shape, device="cpu", dtype=torch.float32)
                initial[f"{kind}_{name}"] = drawn.uniform_(-bound, bound, generator=generator)
        return initial

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.num_experts} x {self.activation}, dim={self.dim}, hidden={self.hidden}, bias={self.bias}"
