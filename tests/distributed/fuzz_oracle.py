"""A case of fuzz.py, trained by one process that knows nothing of the package but a model's first state dict."""

from __future__ import annotations

from dataclasses import dataclass, field

import reference
import reference_layer as oracle
import torch
from fuzz import Case
from fuzz_model import LORA, adapt, build, optimizer
from torch import Tensor


@dataclass
class Record:
    """What training came to, by name: of each rank, or the same on all."""

    ranks: list[dict[str, Tensor]]
    all: dict[str, Tensor] = field(default_factory=dict)


def expected(case: Case) -> Record:
    """The oracle's."""
    model = build(case)
    if case.adapters == "late":
        adapt(case, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = {name for name in model.state_dict() if name.endswith("expert_bias")}  # float32, whatever the model is
    state = {n: t.clone() if n in biases else t.double().clone() for n, t in model.state_dict().items()}
    for name in trained:
        state[name].requires_grad_()
    update = optimizer(case, [state[name] for name in trained])
    record, loads = Record([{} for _ in range(case.ranks)]), {name: torch.zeros(()) for name in biases}
    for number in range(len(case.sizes)):
        training = number + 1 < len(case.sizes)
        outputs, parts = zip(
            *(one_rank(case, state, number, rank, training) for rank in range(case.ranks)), strict=True
        )
        sequences = [case.sizes[number][rank // case.tp] for rank in range(case.ranks)]
        aux = torch.zeros((), dtype=torch.float64)
        for i, layer in enumerate(case.layers):
            routed = [part[i] for part in parts]
            aux = aux + oracle.aux_loss(layer.settings, routed, sequences, case.tp, training)
            for rank, r in enumerate(routed):
                stats = reference.load_stats(r.expert, r.kept, layer.settings.choices)
                for figure, value in stats.items():
                    record.ranks[rank][f"batch {number}: {figure} of layer {i}"] = torch.tensor(value)
                if training and (bias := f"layers.{i}.gate.expert_bias") in biases:
                    loads[bias] = loads[bias] + torch.tensor(stats["tokens_per_expert"])
        record.all[f"batch {number}: aux loss"] = aux.detach()
        for rank, (_, y, _) in enumerate(outputs):
            record.ranks[rank][f"batch {number}: y"] = y.detach()
        if not training:
            break
        tokens = max(sum(x.shape[:-1].numel() for x, _, _ in outputs), 1)
        task = sum((y * toward).sum() for _, y, toward in outputs) / tokens
        ((task + aux) / case.micro_batches).backward()
        for rank, (x, _, _) in enumerate(outputs):
            record.ranks[rank][f"batch {number}: x.grad"] = torch.zeros_like(x) if x.grad is None else x.grad
        if (number + 1) % case.micro_batches:
            continue
        for name in trained:
            state[name].grad = torch.zeros_like(state[name]) if state[name].grad is None else state[name].grad
            record.all[f"batch {number}: gradient of {name}"] = state[name].grad.clone()
        if case.clip:
            norm = torch.nn.utils.clip_grad_norm_([state[name] for name in trained], case.clip)
            record.all[f"batch {number}: norm"] = norm
        update.step()
        update.zero_grad()
        for name, load in loads.items():
            rate = case.layers[int(name.split(".")[1])].settings.options.get("rate", 1e-3)
            state[name] += rate * (load.sum() - load * len(load)).sign()
            loads[name] = torch.zeros(())
        record.all |= {f"batch {number}: {name} afterwards": t.detach().clone() for name, t in state.items()}
    return record


def one_rank(case: Case, state: dict[str, Tensor], number: int, rank: int, training: bool):
    """(x, y, what y is multiplied by) of one rank, and its routings."""
    x, mask, ids, toward = case.batch(number, rank)
    x, toward, routings = x.double().requires_grad_(), toward.double(), []
    case.noise(number, rank)
    y = x.flatten(0, 1)
    y = y + (y @ state["first.0.weight"].T).tanh() @ state["first.2.weight"].T
    mask = None if mask is None else mask.flatten()
    for i, layer in enumerate(case.layers):
        own = oracle.adapted(oracle.part(state, f"layers.{i}."), LORA["alpha"] / LORA["rank"])
        z, routed = oracle.forward(layer.settings, own, y, training, mask, ids.flatten(), case.dtype)
        y = y + z
        routings.append(routed)
    return (x, y.reshape(x.shape), toward), routings
