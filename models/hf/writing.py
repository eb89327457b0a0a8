"""Write a family's own files tensor by tensor, on rank 0, while the model is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...moe.experts.sharded import whole
from ..checkpoint.together import place
from ..data_parallel import reshard
from .slots import Slot, family_slots, family_view
from .weight_files import RankZeroWriter, WeightWriter, converted

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # the family's tensors -> those of its files, by name


@torch.no_grad()
def write_pretrained(model: nn.Module, folder: str | Path, max_shard_size: int | str = "50GB") -> None:
    """Write the files that transformers' `save_pretrained` would write of the family's model. Every rank calls it.

    Rank 0 writes. Beside its part of the model it has one whole tensor in main memory, and a copy of it in the family's
    layout. The largest ones are the experts of a layer. Other ranks need memory for that tensor on their device.
    """
    reshard(model)  # after an evaluation the root is whole
    slots = family_slots(model)
    with family_view(model):
        own = cast(PreTrainedModel, model)
        names = _saved_names(own, slots)
        tensors = revert_weight_conversion(own, {name: _empty(slots[name]) for name in names})

        def make() -> WeightWriter:
            type(own).save_pretrained(own, folder, state_dict={})  # all but the weights
            return WeightWriter(folder, tensors, max_shard_size)

        last, gathered = None, None  # a family's experts may be several tensors of its files
        with RankZeroWriter(make) as writer:
            for each, convert in _by_tensor(_conversions(own, names), slots):
                held = {}
                for name in each:
                    if slots[name].tensor is not last:
                        gathered = None  # before the next one needs memory
                        last, gathered = slots[name].tensor, _on_cpu(slots[name].tensor)
                    if gathered is not None:
                        held[name] = slots[name].of_file(gathered)
                writer.write(partial(convert, held))
            writer.finish(total_parameters=own.num_parameters())


def _on_cpu(tensor: Tensor) -> Tensor | None:
    """The whole tensor on rank 0's CPU; None on other ranks."""
    gathered = whole(tensor.detach())
    return gathered.cpu() if place()[0] == 0 else None


def _saved_names(own: PreTrainedModel, slots: dict[str, Slot]) -> list[str]:
    """Names of the family's tensors that go into its files, in transformers' order. Of tied ones, the first goes."""
    empty = {name: _empty(slot) for name, slot in slots.items() if name not in (own._keys_to_ignore_on_save or ())}
    return sorted(remove_tied_weights_from_state_dict(empty, own), key=dot_natural_key)


def _empty(slot: Slot) -> Tensor:
    return torch.empty(slot.shape, dtype=slot.tensor.dtype, device="meta")


def _conversions(own: PreTrainedModel, names: list[str]) -> Iterator[tuple[list[str], Convert]]:
    """`revert_weight_conversion` in the smallest steps: names that are converted together, and how."""
    transforms = getattr(own, "_weight_conversions", None)  # those that loading used
    if transforms is None:
        every = get_model_conversion_mapping(own, add_legacy=False)
        transforms = [each for each in every if not isinstance(each, PrefixChange)]
    reverse = [each.reverse_transform() for each in transforms[::-1]]
    renamings = [each for each in reverse if isinstance(each, WeightRenaming)]
    converters = [each for each in reverse if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    together: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        target, pattern = apply_converters(name, converters)
        if pattern is None:
            renamed = apply_renamings(name, renamings)
            yield [name], partial(_renamed, renamed)
        else:
            together.setdefault(target, []).append((name, pattern))
    for target, each in together.items():
        converter = by_pattern[each[0][1]]
        yield [name for name, _ in each], partial(_converted, own, target, converter, dict(each), renamings)


def _renamed(name: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    (tensor,) = held.values()
    return {name: tensor}


def _converted(
    own: PreTrainedModel,
    target: str,
    converter: WeightConverter,
    patterns: dict[str, str],
    renamings: list[Any],
    held: dict[str, Tensor],
) -> dict[str, Tensor]:
    values = converted(own, target, converter, ((name, patterns[name], t) for name, t in held.items()))
    return {apply_renamings(name, renamings): value for name, value in values.items()}


def _by_tensor(
    conversions: Iterator[tuple[list[str], Convert]], slots: dict[str, Slot]
) -> Iterator[tuple[list[str], Convert]]:
    """Conversions in an order that has all parts of one tensor together."""
    groups: dict[int, list[tuple[list[str], Convert]]] = {}
    for names, convert in conversions:
        groups.setdefault(id(slots[names[0]].tensor), []).append((names, convert))
    for group in groups.values():
        yield from group
