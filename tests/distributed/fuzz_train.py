"""A case of fuzz.py, trained by many ranks, and compared with what the oracle noted."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
import torch.distributed as dist
from cases import whole
from fuzz import Case
from fuzz_model import Model, adapt, build, optimizer
from fuzz_oracle import Record
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from turnout.dispatch import Meshes, Profile
from turnout.dispatch.autoselect.profile import Flop, Link
from turnout.moe import (
    aux_loss,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    parallelize,
    param_groups,
    sync_gradients,
    update_expert_biases,
)


def spread(case: Case) -> tuple[Model, Any, Any]:
    """The model over all ranks, what runs it, and the mesh."""
    names = tuple(case.axes)
    mesh = (
        Meshes.of("cpu", **case.axes)
        if case.folded
        else init_device_mesh("cpu", tuple(case.axes.values()), mesh_dim_names=names)
    )
    model = build(case, seed=case.flaw == "one rank differs" and dist.get_rank())
    if case.tp > 1 and case.flaw != "nothing split over tp":
        plan = {"0": ColwiseParallel(input_layouts=Shard(1)), "2": RowwiseParallel(output_layouts=Shard(1))}
        parallelize_module(model.first, mesh.dense["tp"], plan)
    parallelize(model, mesh, case.dispatcher, profile=profile(case), overlap=case.overlap, wire=case.wire)
    if case.adapters == "late":
        adapt(case, model)
    if case.wrapper == "ddp":
        DDP._set_params_and_buffers_to_ignore_for_model(model, list(expert_parameters(model)))
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return model, DDP(model, broadcast_buffers=False), mesh
    if case.wrapper == "fsdp":
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing writes into it
        fully_shard_experts(model, mesh)
        fully_shard(model, mesh=mesh.tokens if case.folded else mesh._flatten("every") if mesh.ndim > 1 else mesh)
    return model, model, mesh


def profile(case: Case) -> Profile | None:
    """Costs for "auto", which would measure them; they differ from seed to seed, and so does what is chosen."""
    nodes = case.axes.get("node", case.axes.get("ep", 1) // case.axes.get("ranks_per_node", 1))
    locals_ = case.axes.get("local", case.axes.get("ranks_per_node", 1))
    by_node = "node" in case.axes or "ranks_per_node" in case.axes
    costs = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)][case.seed % 3]
    return Profile(nodes, locals_, Link(0.0, 0.0, 0.0), Link(*costs), Flop(1.0)) if by_node else None


def trained(case: Case, wanted: Record | None, change: Any = None) -> None:
    """On every rank: train as the case says, and compare all the way; ValueErrors of flaws come before that."""
    model, run_it, mesh = spread(case)
    if change is not None:
        change(model)
    rank, dp = dist.get_rank(), case.ranks // case.tp
    found: dict[str, Tensor] = {}
    update = optimizer(case, model.parameters() if case.wrapper == "fsdp" else param_groups(model))
    for number in range(len(case.sizes) - 1):
        choose(case, model, number)
        x, y, toward = forward(case, run_it, number)
        tokens = max(sum(case.sizes[number]) * case.length * case.tp, 1)
        aux = evaluated(case, model, found, number, y)
        ((dp * (y * toward).sum() / tokens + aux) / case.micro_batches).backward()
        found[f"batch {number}: x.grad"] = (torch.zeros_like(x) if x.grad is None else x.grad) / dp
        if (number + 1) % case.micro_batches:
            continue
        if case.wrapper != "fsdp":
            sync_gradients(model, mesh, dense=case.wrapper == "plain")
        for name, p in model.named_parameters():
            if p.requires_grad:
                found[f"batch {number}: gradient of {name}"] = whole(torch.zeros_like(p) if p.grad is None else p.grad)
        if case.clip:
            found[f"batch {number}: norm"] = clip_grad_norm_(model, case.clip)
        update.step()
        update.zero_grad()
        update_expert_biases(model)
        found |= {f"batch {number}: {name} afterwards": whole(t) for name, t in model.state_dict().items()}
    model.eval()
    choose(case, model, len(case.sizes) - 1)
    with torch.no_grad():
        _, y, _ = forward(case, run_it, len(case.sizes) - 1)
        evaluated(case, model, found, len(case.sizes) - 1, y)
    assert wanted is not None, "a flaw has passed"
    compare(case, found, wanted.all | wanted.ranks[rank])


def choose(case: Case, model: Model, number: int) -> None:
    """For this batch, whether experts come to their tokens, alike on all ranks."""
    drawn, slices = random.Random(f"{case.seed}/{number}"), case.axes.get("etp", 1)
    for layer in model.layers if case.gathers else ():
        layer.parallelism = drawn.choice([r for r in range(slices + 1) if r == 0 or slices % r == 0])
        some = drawn.sample(range(layer.num_experts), drawn.randint(1, layer.num_experts))
        layer.shadow = drawn.choice([None, some])


def forward(case: Case, run_it: Any, number: int) -> tuple[Tensor, Tensor, Tensor]:
    x, mask, ids, toward = case.batch(number, dist.get_rank())
    x.requires_grad_()
    case.noise(number, dist.get_rank())
    return x, run_it(x, mask, None if case.flaw == "no ids" else ids), toward


def evaluated(case: Case, model: Model, found: dict[str, Tensor], number: int, y: Tensor) -> Tensor:
    """Note what a forward came to; returns the layers' losses."""
    found[f"batch {number}: y"] = y.detach()
    for i, layer in enumerate(model.layers):
        for figure in ("tokens_per_expert", "dropped", "entropy", "imbalance"):
            found[f"batch {number}: {figure} of layer {i}"] = getattr(layer.stats, figure)
    aux = aux_loss(model)
    mean = aux.detach().clone()
    dist.all_reduce(mean)
    found[f"batch {number}: aux loss"] = mean / case.ranks
    return aux


def compare(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Everything that was noted; the largest difference allowed goes with the dtype, or with the wire."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    exact = 1e-10 if case.dtype == torch.float64 else 1e-4
    wrong = [
        f"{name} is {found[name].shape}, not {t.shape}" for name, t in wanted.items() if found[name].shape != t.shape
    ]
    if case.wire and not wrong:  # rounding on the way may turn a single relu: gradients are compared together
        found, wanted = together(found), together(wanted)
    for name, value in wanted.items() if not wrong else ():
        a, b = found[name].double(), value.double()
        if not b.numel():
            continue
        if " of layer " in name:
            off, allowed = (a - b).abs().max(), 1e-6 * max(float(b.abs().max()), 0.1)  # statistics are float32
        elif case.wire:
            off, allowed = (a - b).norm(), {"bf16": 0.05, "fp8": 0.25}[case.wire] * max(float(b.norm()), 0.02)
        else:
            off, allowed = (a - b).abs().max(), exact * max(float(b.abs().max()), 0.1)
        if not float(off) <= allowed:
            wrong.append(f"{name} is off by {float(off):.2e}, allowed are {allowed:.2e}")
    assert not wrong, "\n  ".join([f"{len(wrong)} of {len(wanted)} differ:", *wrong[:12]])


def together(noted: dict[str, Tensor]) -> dict[str, Tensor]:
    """All gradients as one, all parameters, and the rest."""
    kinds: dict[str, list[Tensor]] = {}
    for name, value in sorted(noted.items()):
        kind = next((kind for kind in ("gradient", "afterwards") if kind in name), name)
        kinds.setdefault(kind, []).append(value.double().flatten())
    return {kind: torch.cat(values) for kind, values in kinds.items()}
