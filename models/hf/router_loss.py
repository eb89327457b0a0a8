"""Scale the auxiliary loss of transformers correctly in steps of several ranks and micro-batches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...dispatch.failure import named
from ...moe.layer import moe_layers

IGNORED = -100  # labels of no loss, as everywhere in transformers


class RouterLoss:
    """Forward hook for a model of transformers whose `loss` includes the balance loss of its routers.

    With ``num_items_in_batch``, a model returns a part of the step's loss, and the parts of all ranks and micro-batches
    add up. But transformers adds the whole auxiliary loss to each part, so a step has it ranks x micro-batches times.
    This hook corrects that. The parts of a micro-batch then add up to its auxiliary loss over the tokens of all ranks,
    E sum_e f_e P_e, times its share of the step's labels. Without ``num_items_in_batch``, losses are means that are
    averaged, and the hook changes nothing.

    It costs one all-reduce of E + 2 numbers in each forward.
    """

    def __init__(self) -> None:
        self.known = False  # whether the family's loss was found to be the one computed here

    @torch.compiler.disable(reason="a collective, and checks that read numbers")
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with a corrected `loss`. Its `aux_loss` stays the family's, of this rank."""
        items = kwargs.get("num_items_in_batch")
        layer = next(iter(moe_layers(model).values()), None)
        if items is None or layer is None:
            return output
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if not isinstance(output, dict):
            _check_unasked(model, given)
            return output
        aux, logits = output.get("aux_loss"), output.get("router_logits")
        if output.get("loss") is None or not isinstance(aux, Tensor) or not logits:
            return output
        counts, probabilities, rows = _sums(logits, layer.gate.top_k, given.get("attention_mask"))
        everyones = torch.cat([counts, rows.view(1), _labels(given).to(rows).view(1)])
        _sum_over(everyones, layer.balance_group)
        if not self.known and rows:
            _check(model, aux, _loss(counts, probabilities, rows))
            self.known = True
        share = everyones[-1] / items
        part = share * _loss(everyones[:-2], probabilities, everyones[-2])
        output["loss"] = output["loss"] + _coefficient(model) * (part - aux).to(output["loss"].device)
        return output


def scale_router_loss(model: nn.Module) -> None:
    """Register the hook once. In a model without bridged layers it does nothing."""
    if not any(isinstance(hook, RouterLoss) for hook in model._forward_hooks.values()):
        model.register_forward_hook(RouterLoss(), with_kwargs=True)


def _sums(logits: tuple[Tensor, ...], top_k: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over layers and real tokens, in float32: assignments [E], probabilities [E], and rows []."""
    device, E = logits[0].device, logits[0].shape[-1]
    counts, probabilities, rows = (torch.zeros(n, device=device) for n in (E, E, 1))
    real = None if mask is None else mask.reshape(-1).to(device, torch.float32)
    for each in logits:
        scores = each.to(device).softmax(-1)
        weight = torch.ones(len(scores), device=device) if real is None else real
        chosen = scores.topk(top_k, dim=-1).indices
        counts = counts.index_add(0, chosen.flatten(), weight.repeat_interleave(top_k))
        probabilities = probabilities + (scores.float() * weight.unsqueeze(1)).sum(0)
        rows = rows + weight.sum()
    return counts, probabilities, rows.squeeze(0)


def _loss(counts: Tensor, probabilities: Tensor, rows: Tensor) -> Tensor:
    """E sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4), from sums over `rows`."""
    return len(counts) * (counts / rows.clamp(min=1) * probabilities / rows.clamp(min=1)).sum()


def _labels(given: dict[str, Any]) -> Tensor:
    """Number of labels of this rank that have a loss, where each token predicts the next one."""
    shifted = given.get("shift_labels")
    return ((given["labels"][..., 1:] if shifted is None else shifted) != IGNORED).sum()


def _sum_over(numbers: Tensor, group: ProcessGroup | None) -> None:
    if group is not None:
        with named("the routers' auxiliary loss", group):
            dist.all_reduce(numbers, group=group)


def _coefficient(model: nn.Module) -> float:
    """Factor by which the family multiplies its auxiliary loss."""
    config: Any = model.config
    for owner in (model, config, config.get_text_config()):
        if isinstance(coefficient := getattr(owner, "router_aux_loss_coef", None), float | int):
            return coefficient
    raise ValueError(f"{type(model).__name__} has no router_aux_loss_coef: {INSTEAD}")


def _check_unasked(model: nn.Module, given: dict[str, Any]) -> None:
    if given.get("output_router_logits") or getattr(model.config, "output_router_logits", False):
        raise ValueError("return_dict=False hides the auxiliary loss, which num_items_in_batch scales: leave it True")


def _check(model: nn.Module, theirs: Tensor, ours: Tensor) -> None:
    theirs, ours = theirs.detach().float().to(ours.device), ours.detach()
    if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"the auxiliary loss of {type(model).__name__} is {float(theirs)}, and E sum_e f_e P_e of its routers "
            f"{float(ours)}: it cannot be scaled for num_items_in_batch. {INSTEAD}"
        )


INSTEAD = "leave output_router_logits out, and set layer.balance = Balance(weight) of each layer"
