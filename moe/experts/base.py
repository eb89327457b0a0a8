"""The experts: E networks of one shape, their tensors stacked, over rows sorted by expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...dispatch.plan import Tokens
from .activation import weighted
from .grouped_mm import grouped_mm
from .low_rank import LowRank
from .sharded import held_slice, local, seeded, take_parts, unchanged


class Experts(nn.Module, ABC):
    """E experts, of which this rank holds L: all of them, until `parallelize` spreads them.

    Every parameter and buffer is stacked over the experts on axis 0: a plain tensor [E, ...], or a
    DTensor of that shape sharded on axis 0 over the ranks that share the experts. Expert e is initialised
    from a generator seeded by (seed, e) alone: the same model at every world size, no two experts alike.

    Two attributes may be set at any time. `weight_on`: whether the router's weight multiplies an expert's ``"output"``
    (the default) or its ``"input"``, as in Llama 4. `recompute`: whether the backward computes what is inside the
    experts again, which saves their activations' memory; False by default.
    """

    output_parts: frozenset[str] = frozenset()  # of `split_axes`, tensors whose parts are parts of the output
    recompute: bool = False  # compute what is inside again in the backward, instead of keeping it
    lora: nn.ModuleDict | None

    def __init__(self, num_experts: int, seed: int) -> None:
        super().__init__()
        self.num_experts, self.seed = num_experts, seed
        self.weight_on = "output"
        self.lora = None  # adapters by the names of `matrices`, in a ModuleDict: see `add_lora`
        self.register_forward_hook(unchanged)

    @property
    def weight_on(self) -> str:
        """Where the router's weight multiplies, ``"output"`` or ``"input"``."""
        return self._weight_on

    @weight_on.setter
    def weight_on(self, weight_on: str) -> None:
        if weight_on not in ("output", "input"):
            raise ValueError(f'weight_on must be "output" or "input"; got {weight_on!r}')
        self._weight_on = weight_on

    @property
    def gathers(self) -> bool:
        """Whether `forward` takes `Tokens`, too, in place of rows; see `FeedForwardExperts`."""
        return False

    def __call__(self, rows: Tensor | Tokens, weight: Tensor, counts: Tensor) -> Tensor:
        """`forward`, its weight and its activations as `weight_on` and `recompute` say."""
        if self._weight_on == "input" and isinstance(rows, Tensor):
            rows, weight = weighted(rows, weight), torch.ones_like(weight)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, rows, weight, counts, use_reentrant=False)  # pyright: ignore
        return super().__call__(rows, weight, counts)

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
