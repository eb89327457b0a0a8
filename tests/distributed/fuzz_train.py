"""A case of fuzz.py, trained by one process that knows nothing of the package, and by many ranks, and compared."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import reference
import reference_layer as oracle
import torch
import torch.distributed as dist
from cases import whole
from fuzz import WIDTH, Case, Layer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from turnout.dispatch import Meshes, Profile
from turnout.dispatch.profile import Flop, Link
from turnout.moe import (
    MoE,
    add_lora,
    aux_loss,
    balance_biases,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    lora_parameters,
    parallelize,
    param_groups,
    sync_gradients,
)
from turnout.moe.gates import GATES

LORA = {"rank": 2, "alpha": 3.0}
RATE = 0.05


class Model(nn.Module):
    """Mixtures of experts behind a dense perceptron, which tensor parallelism can split; each with a way around it."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Tanh(), nn.Linear(8, WIDTH, bias=False))
        self.layers = nn.ModuleList(moe(layer) for layer in layers)

    def forward(self, x: Tensor, mask: Tensor | None, ids: Tensor | None) -> Tensor:
        x = (x + self.first(x)).contiguous()  # noise is drawn in the order of memory
        for layer in self.layers:
            x = x + layer(x, mask, ids)
        return x


def moe(layer: Layer) -> MoE:
    """The layer, and its gate by name where there are no options."""
    s = layer.settings
    gate = GATES[s.gate](WIDTH, s.choices, s.top_k, **s.options) if s.options else s.gate
    names = ("capacity_factor", "eval_capacity_factor", "min_capacity", "drop_policy", "free_experts", "residual")
    names += ("weight_on", "balance", "balance_choices", "aux_loss_weight", "z_loss_weight", "experts")
    made = MoE(
        WIDTH,
        layer.hidden,
        s.num_experts,
        s.top_k,
        gate,
        shared_experts=nn.Linear(WIDTH, WIDTH) if layer.shared == "linear" else layer.shared,
        bias=layer.bias,
        pad=layer.pad,
        **{name: getattr(s, name) for name in names},
    )
    made.recompute = layer.recompute
    return made


@torch.no_grad()
def build(case: Case, seed: int = 0) -> Model:
    """The model on one rank, its routers far from even, adapters far from zero."""
    torch.manual_seed(case.seed + seed)
    model = Model(case.layers).to(case.dtype)
    for layer in model.layers:
        assert isinstance(layer, MoE)
        for name, p in [*layer.gate.named_parameters(), *layer.gate.named_buffers()]:
            if p.dtype != torch.int64 and name != "temperature":
                p.copy_(torch.randn_like(p) * 0.5)
    if case.adapters == "early":
        adapt(case, model)
        for p in lora_parameters(model).values():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


def adapt(case: Case, model: Model) -> None:
    """Adapters; the dense part is trained as well."""
    add_lora(model, router=case.router, **LORA)
    model.first.requires_grad_(True)


def optimizer(case: Case, parameters: Any) -> torch.optim.Optimizer:
    if case.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(parameters, lr=RATE, eps=1e-3)  # an eps far above rounding


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
        outputs, parts = zip(*(one_rank(case, state, number, rank, training) for rank in range(case.ranks)), strict=True)
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
        balance_biases(model)
        found |= {f"batch {number}: {name} afterwards": whole(t) for name, t in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        _, y, _ = forward(case, run_it, len(case.sizes) - 1)
        evaluated(case, model, found, len(case.sizes) - 1, y)
    assert wanted is not None, "a flaw has passed"
    compare(case, found, wanted.all | wanted.ranks[rank])


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
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-4
    tolerance = {None: tolerance, "bf16": 0.05, "fp8": 0.2}[case.wire]
    wrong = []
    for name, value in wanted.items():
        got = found[name]
        if got.shape != value.shape:
            wrong.append(f"{name} is {tuple(got.shape)}, not {tuple(value.shape)}")
        elif value.numel():
            off = float((got.double() - value.double()).abs().max())
            allowed = 1e-6 if " of layer " in name else tolerance  # statistics are float32
            if not off <= allowed * max(float(value.double().abs().max()), 0.1):
                wrong.append(f"{name} is off by {off:.2e} of {float(value.double().abs().max()):.2e}")
    assert not wrong, "\n  ".join([f"{len(wrong)} of {len(wanted)} differ:", *wrong[:200]])
