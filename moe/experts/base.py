"""`Experts`, the base class of expert networks: E networks of one shape, whose tensors are stacked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...dispatch.plan import Tokens
from ...dispatch.torch_internals import transformed
from .activation import weighted
from .four_bit import FourBitMatrix, Matrix
from .grouped_mm import grouped_mm
from .low_rank import LowRank
from .placed import Placement, in_global_order, load_into_slots
from .sharded import held_slice, local, seeded, unchanged


class Experts(nn.Module, ABC):
    """Base class of E expert networks. Each rank holds L of them after `parallelize`, and all before.

    Every parameter and buffer is stacked over the experts on axis 0. It is a plain tensor [E, ...], or a DTensor of
    that shape sharded on axis 0 over the ranks that share the experts. Expert e is initialised from a generator seeded
    with (seed, e) alone. So a model is the same at every world size, and all its experts differ. Expert e is in slot e
    of axis 0 until `place_experts` changes the `order`.

    Two attributes may be set at any time. `weight_on` says whether the router's weight multiplies an expert's
    ``"output"`` (the default) or its ``"input"``, as in Llama 4. `recompute`, False by default, says whether backward
    computes the experts' activations again, which saves their memory.

    Args:
        num_experts: number of experts E, on all ranks together.
        seed: seed of the initial values, the same on all ranks.
    """

    output_parts: frozenset[str] = frozenset()  # of `split_axes`, tensors whose parts are parts of the output
    recompute: bool = False
    normed: bool = False  # whether outputs are normalised before the router's weight multiplies them
    lora: nn.ModuleDict | None

    def __init__(self, num_experts: int, seed: int) -> None:
        super().__init__()
        self.num_experts, self.seed = num_experts, seed
        self.weight_on = "output"
        self.lora = None  # adapters by their name and that of the matrix, in ModuleDicts: see `add_lora`
        self._placement: Placement | None = None
        # slot of each expert by its id, and then -1 for the id -1, int64 [E + 1]; None: expert e is in slot e
        self.slots: Tensor | None = None
        self.register_forward_hook(unchanged)
        self.register_state_dict_post_hook(in_global_order)

    @property
    def weight_on(self) -> str:
        """The side of an expert that the router's weight multiplies, ``"output"`` or ``"input"``."""
        return self._weight_on

    @weight_on.setter
    def weight_on(self, weight_on: str) -> None:
        if weight_on not in ("output", "input"):
            raise ValueError(f'weight_on must be "output" or "input"; got {weight_on!r}')
        self._weight_on = weight_on

    @property
    def precision(self) -> str | None:
        """Numbers that are multiplied: None, which is their dtype, except in `FeedForwardExperts`."""
        return None

    @precision.setter
    def precision(self, precision: str | None) -> None:
        if precision is not None:
            raise ValueError(
                f"{type(self).__name__} has no precision={precision!r}, which FeedForwardExperts alone have, such as "
                'the experts of MoE(experts="swiglu"): leave precision at None'
            )

    @property
    def gathers(self) -> bool:
        """Whether `forward` also takes `Tokens` in place of rows, as `FeedForwardExperts` does."""
        return False

    def __call__(self, rows: Tensor | Tokens, weight: Tensor, counts: Tensor) -> Tensor:
        """Call `forward` by the rules of `weight_on` and `recompute`."""
        if self._weight_on == "input" and isinstance(rows, Tensor):
            rows, weight = weighted(rows, weight), torch.ones_like(weight)
        if self.recompute and torch.is_grad_enabled() and not transformed():  # torch.func refuses `checkpoint`
            return checkpoint(super().__call__, rows, weight, counts, use_reentrant=False)  # pyright: ignore
        return super().__call__(rows, weight, counts)

    def split_axes(self) -> dict[str, int]:
        """The axis on which each tensor splits for expert tensor parallelism, so that outputs of the parts add up."""
        raise ValueError(f"{type(self).__name__} cannot be split inside an expert: use a mesh with etp=1")

    @property
    def adapts(self) -> bool:
        """Whether adapters are computed beside the matrices: there are some in use, and they are not merged."""
        return any(each.active and not each.merged for _, adapter in self.adapters() for each in adapter.values())

    def adapters(self) -> list[tuple[str, dict[str, LowRank]]]:
        """Each adapter's name, and its thin matrices by the names of `matrices`."""
        return [] if self.lora is None else [(name, dict(each.items())) for name, each in self.lora.items()]  # pyright: ignore

    def matrices(self) -> dict[str, tuple[Matrix, bool]]:
        """Stacked matrices that adapters may stand beside (`adapted`), and whether each is stored [E, out, in]."""
        return {}

    @property
    def in_four_bits(self) -> bool:
        """Whether the matrices are frozen and in 4 bits: see `quantize_experts`."""
        return any(isinstance(matrix, FourBitMatrix) for matrix, _ in self.matrices().values())

    def adapted(self, name: str, y: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        """y [R, out], rows [R, in] times the matrix `name`, with what adapters add; `ends` as in `grouped_mm`."""
        for _, adapter in self.adapters():
            y = adapter[name].beside(y, rows, lambda x, matrix: grouped_mm(x, matrix.to(x.dtype), ends))
        return y

    @abstractmethod
    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Compute the experts: rows [R, D] -> weighted rows [R, D].

        Args:
            rows: rows sorted by local expert, [R, D]. Rows past ``counts.sum()`` are padding, and their results are
                undefined.
            weight: router's weight of each row, float32 or float64 [R].
            counts: number of rows of each local expert, int64 [L].
        """

    @abstractmethod
    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw one expert: the value of each stacked tensor, by name, without the axis of the experts."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the experts held here; call it after `to_empty` from the meta device.

        Raises:
            ValueError: they are in 4 bits, which are made of trained weights or loaded.
        """
        if self.in_four_bits:
            raise ValueError("experts in 4 bits are not initialised: load their weights, or quantise them afterwards")
        for adapter in self.modules():
            if isinstance(adapter, LowRank):
                adapter.reset_parameters(self.order)
        stacked = dict(self.named_parameters()) | dict(self.named_buffers())
        stacked = {name: t for name, t in stacked.items() if not name.startswith("lora.")}
        if not any(t.is_meta for t in stacked.values()):
            self._fill(stacked)

    def _fill(self, stacked: dict[str, Tensor]) -> None:
        """Initialise stacked tensors, given by name."""
        held = {name: held_slice(t) for name, t in stacked.items()}  # FSDP may split each tensor on another axis
        for slot, expert in enumerate(self.order):
            here = {name: t for name, t in stacked.items() if held[name][0].start <= slot < held[name][0].stop}
            if not here:
                continue
            initial = self._initial(seeded(self.seed, f"{expert}"))
            for name, tensor in here.items():
                if initial[name].shape != tensor.shape[1:]:
                    shapes = f"{tuple(tensor.shape[1:])} and {tuple(initial[name].shape)}"
                    raise ValueError(f"experts must have one shape, but {name} is {shapes} in two of them")
                local(tensor)[slot - held[name][0].start].copy_(initial[name][held[name][1:]])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        load_into_slots(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def order(self) -> tuple[int, ...]:
        """Global id of the expert in each slot, as `place_experts` has set it; 0 to E - 1 without."""
        return tuple(range(self.num_experts)) if self._placement is None else self._placement.order

    @property
    def placement(self) -> Placement | None:
        """The order of the experts and the ranks that share them; None if they are in the order of their ids."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement | None) -> None:
        self._placement, device = placement, next(self.parameters()).device
        self.slots = None if placement is None else torch.tensor([*placement.slots, -1], device=device)

    def slots_of(self, ids: Sequence[int]) -> list[int]:
        """Slots of some experts, ascending."""
        return sorted(ids if self._placement is None else (self._placement.slots[expert] for expert in ids))

    @property
    def owned(self) -> Sequence[int]:
        """Global ids of the experts that this rank holds, in the order of their slots."""
        held = held_slice(next(self.parameters()))[0]
        return range(held.start, held.stop) if self._placement is None else self._placement.order[held]

    @property
    def row_flops(self) -> float:
        """Floating-point operations of one expert's forward for one row: two for each parameter."""
        packed = [m for m in self.modules() if isinstance(m, FourBitMatrix)]
        inside = {id(p) for m in packed for p in m.parameters()}
        numbers = [m.shape.numel() for m in packed] + [p.numel() for p in self.parameters() if id(p) not in inside]
        return 2 * sum(numbers) / self.num_experts

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> Callable[[Tensor], Tensor]:
        """The expert with a global id, as a function [n, D] -> [n, D] that shares its parameters.

        Raises:
            IndexError: no such expert, or another rank holds it.
        """
        if not -self.num_experts <= expert < self.num_experts:
            raise IndexError(f"there is no expert {expert}: ids are 0 to {self.num_experts - 1}")
        expert, owned = expert % self.num_experts, self.owned
        if expert not in owned:
            rank, held = self.slots_of([expert])[0] // len(owned), ", ".join(map(str, owned))
            raise IndexError(
                f"expert {expert} is on rank {rank} of the expert group; this rank holds {held}: ask that rank"
            )
        return lambda x: self._one(owned.index(expert), x)

    def _one(self, place: int, x: Tensor) -> Tensor:
        counts = torch.zeros(len(self.owned), dtype=torch.int64, device=x.device)
        counts[place] = len(x)
        return self(x, torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device), counts)


def autocast(tokens: Tensor) -> Tensor:
    """Cast tokens to autocast's dtype if it is on, so that fewer bytes travel and experts compute in it."""
    if torch.is_autocast_enabled(tokens.device.type) and tokens.dtype != torch.float64:
        return tokens.to(torch.get_autocast_dtype(tokens.device.type))
    return tokens
