"""Experts that are modules of any kind, run one after the other."""

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
    """Experts of any kind: what ``factory()`` returns, [n, D] -> [n, D], run once per expert that has rows.

    The factory is called once for each expert and once more. All experts are run as one module, `module`, which holds
    their parameters and buffers stacked. So these alone may differ from expert to expert, and only in their values.
    Buffers that are not persistent are made anew when a state is loaded. The number of rows of each expert is read by
    the host.

    Raises:
        ValueError: the factory makes modules that differ in more: in class, in an activation, in an attribute such as
            dropout's p; or it returns the same module twice.
    """

    _made = False

    def __init__(self, factory: Callable[[], nn.Module], num_experts: int, seed: int = 0) -> None:
        super().__init__(num_experts, seed)
        self.factory = factory
        self.module = self._build(seed)
        if len(list(self.module.named_parameters())) < len(list(self.module.named_parameters(remove_duplicate=False))):
            raise ValueError(f"{type(self.module).__name__} ties parameters to each other; experts cannot")
        for module in self.module.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                empty = p.new_empty(num_experts, *p.shape)
                setattr(module, name, nn.Parameter(empty, requires_grad=p.requires_grad))
            for name, b in list(module.named_buffers(recurse=False)):
                setattr(module, name, b.new_empty(num_experts, *b.shape))
        if next(self.module.parameters(), None) is None:
            raise ValueError(f"an expert needs parameters, and {type(self.module).__name__} has none")
        if any(t.is_meta for t in [*self.parameters(), *self.buffers()]):  # nothing to initialise, but to compare
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
        out.append(rows[sum(sizes) :])  # rows of nobody
        y = (torch.cat(out) * weight.unsqueeze(1)).to(rows.dtype)
        if any(sizes):
            return y
        # Nothing ran: the parameters take part all the same, with gradients of zero.
        return y + sum((local(p).flatten()[:0].sum() for p in self.module.parameters()), y.new_zeros(()))

    def _run(self, each: dict[str, tuple[Tensor, ...]], place: int, block: Tensor) -> Tensor:
        y = functional_call(self.module, {name: tensors[place] for name, tensors in each.items()}, (block,))
        if y.shape != block.shape:
            raise ValueError(
                f"an expert must return the shape it is given: {tuple(block.shape)} became {tuple(y.shape)}"
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
            raise ValueError(f"the factory put the same {kind} into two experts: let it make a new one for each")
        stacked = dict(self.module.named_parameters())
        for name, p in module.named_parameters():
            if name in stacked and p.shape != stacked[name].shape[1:]:
                shapes = f"{tuple(stacked[name].shape[1:])} and {tuple(p.shape)}"
                raise ValueError(f"experts must be of one shape; {name} is {shapes} in different ones")
        if found := difference(self.module, module):
            raise ValueError(
                f"experts must be of one kind; {found} in different ones. Let the factory make modules that differ in "
                "the values of parameters and buffers alone, or write Experts of your own"
            )


@torch.no_grad()
def _rebuild_buffers(experts: ModuleExperts, _: Any) -> None:
    """Compute again what no state dict has, such as tables of positions: after `to_empty` it may be anything."""
    like, tables = next(experts.parameters()), {}
    for name, module in experts.named_modules():
        for own in module._non_persistent_buffers_set:
            if (buffer := getattr(module, own)) is not None and not like.is_meta:
                if buffer.is_meta:  # loaded with assign=True
                    setattr(module, own, torch.empty_like(buffer, device=like.device))
                tables[f"{name}.{own}"] = getattr(module, own)
    if tables:
        experts._fill(tables)
