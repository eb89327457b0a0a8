"""Experts made of arbitrary modules, which run one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..parallel.difference import difference
from .base import Experts
from .sharded import local, seeded


class ModuleExperts(Experts):
    """Experts made by a factory of modules [n, D] -> [n, D]. Each expert that has rows runs once.

    The factory is called once for each expert, and once more. One module, `module`, runs all experts and holds their
    parameters and buffers stacked. So experts may differ only in the values of parameters and buffers. Buffers that
    are not persistent are computed again when a state dict is loaded. The host waits for the number of rows of each
    expert.

    Args:
        factory: function without arguments that returns a new module.
        num_experts: number of experts E, on all ranks together.
        seed: seed of the initial values, the same on all ranks; 0 by default.

    Raises:
        ValueError: modules that differ in more than values, such as their class, an activation, or dropout's p. Also
            modules that are the same object, that have no parameters, or that tie parameters.

    >>> experts = ModuleExperts(lambda: nn.Linear(4, 4), num_experts=2)
    >>> experts(torch.randn(3, 4), torch.ones(3), counts=torch.tensor([1, 2])).shape
    torch.Size([3, 4])
    """

    _made = False

    def __init__(self, factory: Callable[[], nn.Module], num_experts: int, seed: int = 0) -> None:
        super().__init__(num_experts, seed)
        self.factory = factory
        self.module = self._build(seed)
        if len(list(self.module.named_parameters())) < len(list(self.module.named_parameters(remove_duplicate=False))):
            raise ValueError(
                f"{type(self.module).__name__} ties parameters to each other, which experts cannot: give each its own"
            )
        for module in self.module.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                empty = p.new_empty(num_experts, *p.shape)
                setattr(module, name, nn.Parameter(empty, requires_grad=p.requires_grad))
            for name, b in list(module.named_buffers(recurse=False)):
                setattr(module, name, b.new_empty(num_experts, *b.shape))
        if next(self.module.parameters(), None) is None:
            raise ValueError(
                f"an expert needs parameters, and {type(self.module).__name__} has none: use free experts instead"
            )
        if any(t.is_meta for t in [*self.parameters(), *self.buffers()]):  # only compare the factory's modules
            for expert in range(num_experts):
                self._initial(seeded(seed, f"{expert}"))
        self.reset_parameters()
        self._made = True
        self.register_load_state_dict_post_hook(_rebuild_buffers)

    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """See `Experts.forward`."""
        sizes = counts.tolist()
        stacked = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        each = {name: local(t).unbind(0) for name, t in stacked.items()}  # t[e] would make full-size gradients
        blocks = rows[: sum(sizes)].split(sizes)
        out = [self._run(each, e, block) for e, block in enumerate(blocks) if len(block)]
        out.append(rows[sum(sizes) :])  # padding rows past `counts.sum()`
        y = (torch.cat(out) * weight.unsqueeze(1)).to(rows.dtype)
        if any(sizes):
            return y
        # No expert ran. Parameters still need a gradient of zeros, as on ranks where one ran.
        return y + sum((local(p).flatten()[:0].sum() for p in self.module.parameters()), y.new_zeros(()))

    def _run(self, each: dict[str, tuple[Tensor, ...]], place: int, block: Tensor) -> Tensor:
        y = functional_call(self.module, {name: tensors[place] for name, tensors in each.items()}, (block,))
        if y.shape != block.shape:
            raise ValueError(
                f"an expert must return the shape of its input, {tuple(block.shape)}; "
                f"{type(self.module).__name__} returned {tuple(y.shape)}"
            )
        return y

    def _build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            torch.manual_seed(seed)
            return self.factory()

    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        module = self._build(generator.initial_seed())
        if not self._made:
            self._check_kind(module)
        return {f"module.{name}": t for name, t in module.state_dict(keep_vars=True).items()} | {
            f"module.{name}": t for name, t in module.named_buffers()
        }

    def _check_kind(self, module: nn.Module) -> None:
        ours = {part for part in self.module.modules() if part._parameters or part._buffers}
        if twice := ours.intersection(module.modules()):
            kind = type(twice.pop()).__name__
            raise ValueError(f"the factory put the same {kind} into two experts: make a new one in each call")
        stacked = dict(self.module.named_parameters())
        for name, p in module.named_parameters():
            if name in stacked and p.shape != stacked[name].shape[1:]:
                shapes = f"{tuple(stacked[name].shape[1:])} and {tuple(p.shape)}"
                raise ValueError(
                    f"experts must have one shape, but {name} is {shapes} in two of them: build all with the same sizes"
                )
        if found := difference(self.module, module):
            raise ValueError(
                f"experts must be of one kind, but {found} in two of them: make modules that differ only in the values "
                "of parameters and buffers, or write your own Experts"
            )


@torch.no_grad()
def _rebuild_buffers(experts: ModuleExperts, _: Any) -> None:
    """Compute non-persistent buffers again, such as tables of positions: no state dict has them."""
    like, tables = next(experts.parameters()), {}
    for name, module in experts.named_modules():
        for own in module._non_persistent_buffers_set:
            if (buffer := getattr(module, own)) is not None and not like.is_meta:
                if buffer.is_meta:  # loaded with assign=True
                    setattr(module, own, torch.empty_like(buffer, device=like.device))
                tables[f"{name}.{own}"] = getattr(module, own)
    if tables:
        experts._fill(tables)
