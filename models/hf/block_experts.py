"""Experts that compute with the tensors of a family's own module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...moe.experts.activation import ACTIVATIONS, activated, weighted
from ...moe.experts.base import Experts
from ...moe.experts.four_bit import FourBitMatrix, Matrix
from ...moe.experts.grouped_mm import grouped_linear
from ...moe.experts.modules import ModuleExperts
from ...moe.experts.sharded import local_as

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class FusedExperts(Experts):
    """Feed-forward experts that compute with the stacked matrices of a family's module, without a copy.

    The module has `gate_up_proj` [E, 2H, D] and `down_proj` [E, D, H], and maybe biases `gate_up_proj_bias` [E, 2H] and
    `down_proj_bias` [E, D]. A method `_apply_gate`, [R, 2H] -> [R, H], combines gate and up. Without one, it is
    act_fn(first half) * second half. Experts without a gate have `up_proj` [E, H, D] in place of `gate_up_proj`.

    Args:
        module: the family's experts.
        transposed: whether matrices are [E, D, 2H] and [E, H, D] instead. None, the default, takes the module's
            `is_transposed`, or False if it has none.
        weight_first: whether the router's weight multiplies the input of an expert, and not its output (Llama 4); False
            by default.

    Raises:
        ValueError: tensors of other names, shapes or dtypes, as in quantised models.
    """

    def __init__(self, module: nn.Module, transposed: bool | None = None, weight_first: bool = False) -> None:
        transposed = bool(getattr(module, "is_transposed", False)) if transposed is None else transposed
        self._check(module, transposed)
        num_experts = len(next(module.parameters()))
        super().__init__(num_experts, seed=0)
        self.module, self.transposed, self.weight_first = module, transposed, weight_first

    identities = 0  # number of further experts, with ids from E on, that return their input

    @property
    def dim(self) -> int:
        """Model width D."""
        return self.matrices()["down_proj"][0].shape[2 if self.transposed else 1]

    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """See `Experts.forward`."""
        ends = counts.cumsum(0).to(torch.int32)
        if self.weight_first:
            return self.down(self.up(weighted(rows, weight), ends), ends)
        return weighted(self.down(self.up(rows, ends), ends), weight)

    def up(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Rows [R, D] -> hidden rows [R, H]. Expert e's rows end at ``ends[e]``, int32 [L]."""
        first = self._linear(self._first, rows, ends)
        if self._first == "up_proj":
            return self.module.act_fn(first)  # pyright: ignore[reportCallIssue]
        if hasattr(self.module, "_apply_gate"):
            return self.module._apply_gate(first)  # pyright: ignore[reportCallIssue]
        gate, up = first.chunk(2, dim=-1)
        return self.module.act_fn(gate) * up  # pyright: ignore[reportCallIssue]

    def down(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """Hidden rows [R, H] -> rows [R, D]."""
        return self._linear("down_proj", hidden, ends)

    def matrices(self) -> dict[str, tuple[Matrix, bool]]:
        """See `Experts.matrices`."""
        return {name: (getattr(self.module, name), not self.transposed) for name in (self._first, "down_proj")}

    @property
    def _first(self) -> str:
        return "gate_up_proj" if hasattr(self.module, "gate_up_proj") else "up_proj"

    def give_back(self) -> None:
        """Make the family's module whole, in its own layout. With experts on many ranks, every rank calls this."""
        if self.in_four_bits:
            raise ValueError("the family's experts are not in 4 bits: dequantize_experts(model) first")
        if self.adapts:
            raise ValueError("the family's experts have no place for adapters: merge_lora(model) first")
        gather(self.module)

    @staticmethod
    def _check(module: nn.Module, transposed: bool) -> None:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        odd = {name: t.dtype for name, t in tensors.items() if t.dtype not in FLOATS}
        if odd:
            name, dtype = next(iter(odd.items()))
            raise ValueError(
                f"{type(module).__name__}.{name} is {dtype}, so the experts are quantised, and only their own code "
                "knows how: load the model dequantised, in bfloat16 or float32"
            )
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        first = "gate_up_proj" if "gate_up_proj" in shapes else "up_proj"
        known = {f"{name}{kind}" for name in (first, "down_proj") for kind in ("", "_bias")}
        up, down = (shapes.get(name, ()) for name in (first, "down_proj"))
        if len(up) == len(down) == 3 and set(shapes) <= known:
            (E, wide, dim), (also_E, also_dim, hidden) = up, down
            if transposed:
                dim, wide, hidden, also_dim = wide, dim, also_dim, hidden
            if (E, dim, wide) == (also_E, also_dim, hidden * (2 if first == "gate_up_proj" else 1)):
                return
        layout = "[E, D, 2H] and [E, H, D]" if transposed else "[E, 2H, D] and [E, D, H]"
        raise ValueError(
            f"{type(module).__name__} must have gate_up_proj and down_proj, {layout}, and at most a bias for each; it "
            f"has {shapes}: say transposed={not transposed}, or write Experts of its own (docs/guides/hugging_face.md)"
        )

    def _linear(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        matrix, transposed = self.matrices()[name]
        held = matrix.held if isinstance(matrix, FourBitMatrix) else local_as(matrix, rows)
        bias = getattr(self.module, f"{name}_bias", None)
        y = grouped_linear(rows, ends, held.mT if transposed else held, None if bias is None else local_as(bias, rows))
        return self.adapted(name, y, rows, ends)

    def _fan_in(self, name: str) -> int:
        p = self.module.get_parameter(name.removesuffix("_bias"))
        return p.shape[1 if self.transposed else 2]

    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        initial = {}
        for name, p in self.module.named_parameters():  # uniform within 1 / sqrt(fan_in), as nn.Linear
            bound = 1 / math.sqrt(self._fan_in(name))
            drawn = torch.empty(p.shape[1:], device="cpu", dtype=torch.float32)
            initial[f"module.{name}"] = drawn.uniform_(-bound, bound, generator=generator)
        return initial


class GptOssExperts(FusedExperts):
    """gpt-oss: gate and up are interleaved in the last axis of `gate_up_proj`."""

    def up(self, rows: Tensor, ends: Tensor) -> Tensor:
        """See `FusedExperts.up`. With alpha and limit of the released models, `clamped_swiglu` computes it."""
        if (self.module.alpha, self.module.limit) != (1.702, 7.0):
            return super().up(rows, ends)
        gate_up = self._linear("gate_up_proj", rows, ends)
        return activated(ACTIVATIONS["clamped_swiglu"], gate_up[:, 1::2], gate_up[:, ::2])


class DbrxExperts(FusedExperts):
    """DBRX: gate `w1`, up `v1` and down `w2`, each [E*H, D] in the family's module and [E, H, D] here."""

    def __init__(self, module: nn.Module, num_experts: int) -> None:
        for name, p in list(module.named_parameters()):
            _put(module, name, p, lambda t: t.unflatten(0, (num_experts, -1)))
        super().__init__(module)

    @staticmethod
    def _check(module: nn.Module, transposed: bool) -> None:
        pass  # the constructor has given them the right shapes

    @property
    def dim(self) -> int:
        """See `FusedExperts.dim`."""
        return self.matrices()["w2"][0].shape[2]

    def up(self, rows: Tensor, ends: Tensor) -> Tensor:
        """See `FusedExperts.up`."""
        gate, up = (self._linear(name, rows, ends) for name in ("w1", "v1"))
        return self.module.get_submodule("mlp").activation_fn(gate) * up  # pyright: ignore[reportCallIssue]

    def down(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """See `FusedExperts.down`."""
        return self._linear("w2", hidden, ends)

    def matrices(self) -> dict[str, tuple[Matrix, bool]]:
        """See `Experts.matrices`."""
        mlp = self.module.get_submodule("mlp")
        return {name: (getattr(mlp, name), name != "w2") for name in ("w1", "v1", "w2")}

    def give_back(self) -> None:
        """See `FusedExperts.give_back`."""
        super().give_back()
        for name, p in list(self.module.named_parameters()):
            _put(self.module, name, p, lambda t: t.flatten(0, 1))

    def _fan_in(self, name: str) -> int:
        return self.module.get_parameter(name).shape[1 if name == "mlp.w2" else 2]


class LongcatFlashExperts(FusedExperts):
    """LongCat-Flash: further experts return their input. Their rows of `gate_up_proj` are kept aside."""

    def __init__(self, module: nn.Module) -> None:
        first, E = module.get_parameter("gate_up_proj"), len(module.get_parameter("down_proj"))
        _put(module, "gate_up_proj", first, lambda t: t[:E])
        super().__init__(module)
        self.identities = len(first) - E
        self._aside = (first.detach()[E:],)  # in a tuple: it is neither spread nor saved

    def give_back(self) -> None:
        """See `FusedExperts.give_back`. It copies."""
        super().give_back()
        p, aside = self.module.get_parameter("gate_up_proj"), self._aside[0]
        _put(self.module, "gate_up_proj", p, lambda t: torch.cat([t, aside.to(t)]))
        whole = self.module.get_parameter("gate_up_proj")
        if whole.grad is not None:
            whole.grad[len(p) :] = 0


class JetMoeExperts(FusedExperts):
    """JetMoE: `input_linear.weight` [E, 2H, D] and `output_linear.weight` [E, D, H] are the block's own."""

    def __init__(self, block: Any) -> None:
        module: Any = nn.Module()
        module.input_linear, module.output_linear, module.act_fn = (
            block.input_linear,
            block.output_linear,
            block.activation,
        )
        super().__init__(module)

    @staticmethod
    def _check(module: nn.Module, transposed: bool) -> None:
        pass  # there is one layout, and `replace_moe` compares

    @property
    def dim(self) -> int:
        """See `FusedExperts.dim`."""
        return self.module.get_parameter("output_linear.weight").shape[1]

    def up(self, rows: Tensor, ends: Tensor) -> Tensor:
        """See `FusedExperts.up`."""
        gate, up = self._linear("input_linear", rows, ends).chunk(2, dim=-1)
        return self.module.get_submodule("act_fn")(gate) * up

    def down(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """See `FusedExperts.down`."""
        return self._linear("output_linear", hidden, ends)

    def matrices(self) -> dict[str, tuple[Matrix, bool]]:
        """See `Experts.matrices`."""
        names = ("input_linear", "output_linear")
        return {name: (self.module.get_parameter(f"{name}.weight"), True) for name in names}

    def _linear(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        matrix = local_as(self.module.get_parameter(f"{name}.weight"), rows).mT
        return self.adapted(name, grouped_linear(rows, ends, matrix, None), rows, ends)

    def _fan_in(self, name: str) -> int:
        return self.module.get_parameter(name).shape[2]


class ListedExperts(ModuleExperts):
    """Experts of a family that has one module for each. Their tensors are copied into stacks, and the modules emptied.

    Args:
        modules: the experts in their order, all of one class and shape.
    """

    def __init__(self, modules: nn.ModuleDict) -> None:
        each = list(modules.values())
        template = copy.deepcopy(each[0]).to("meta")
        super().__init__(partial(copy.deepcopy, template), len(each))  # on the meta device nothing is drawn
        self.factory = partial(_fresh, template)
        for name, p in each[0].named_parameters():
            stack = torch.stack([module.get_parameter(name).detach() for module in each])
            _put(self.module, name, nn.Parameter(stack, requires_grad=p.requires_grad))
        self._modules_of_family = (modules.to("meta"),)  # in a tuple: not a submodule

    def give_back(self) -> None:
        """See `FusedExperts.give_back`. It copies."""
        gather(self.module)
        for expert, module in enumerate(self._modules_of_family[0].values()):
            for name, p in self.module.named_parameters():
                _put(module, name, p, lambda t, e=expert: t[e].clone())


def gather(module: nn.Module) -> None:
    """Replace each sharded parameter by the whole one. Every rank that holds a part calls this."""
    for name, p in list(module.named_parameters()):
        if isinstance(p, DTensor):
            _put(module, name, p, lambda t: t.full_tensor())


def _put(module: nn.Module, name: str, p: nn.Parameter, change: Callable[[Any], Tensor] = lambda t: t) -> None:
    """Set the parameter `name` of a module to ``change(p)``, and its gradient likewise."""
    new = nn.Parameter(change(p.detach()), requires_grad=p.requires_grad)
    new.grad = None if p.grad is None else change(p.grad)
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, new)


def _fresh(template: nn.Module) -> nn.Module:
    """A new expert like a template on the meta device, initialised by the `reset_parameters` of its parts."""
    module = copy.deepcopy(template).to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()  # pyright: ignore[reportCallIssue]
    return module
