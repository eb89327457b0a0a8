"""`load`: tokens per expert over ranks and forwards, against assignments counted one by one."""

import copy
import io
import math
import pickle
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, parallel_model
from turnout.models.recompute import recompute
from turnout.moe import Capacity, MoE, aux_loss, load, parallelize

D, E, K = 8, 4, 2
SIZES = [5, 0, 9, 3]  # tokens of each rank: one has none


def tokens(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed))


def built(**options) -> MoE:
    layer = MoE(D, 16, E, K, seed=0, **options)
    nn.init.normal_(layer.gate.weight, std=2.0, generator=torch.Generator().manual_seed(1))
    return layer


class Seen:
    """What the gates of a model chose, assignment by assignment, and what went over an expert's limit."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens, self.dropped = {}, Counter()
        for name, layer in model.named_modules():
            if isinstance(layer, MoE):
                self.tokens[name] = Counter()
                layer.gate.register_forward_hook(lambda gate, args, routing, name=name: self.add(name, routing))
        self.limit, self.counts = math.inf, True

    def add(self, name: str, routing) -> None:
        if self.counts and torch._C._current_graph_task_id() == -1:  # not recomputed in a backward
            chosen = Counter(expert for token in routing.expert.tolist() for expert in token if expert >= 0)
            self.tokens[name] += chosen
            self.dropped[name] += sum(max(0, n - self.limit) for n in chosen.values())

    def everywhere(self) -> dict[str, tuple[list[int], float]]:
        """By layer: tokens of each expert, and the share dropped, over all ranks."""
        parts = [(self.tokens, self.dropped)]
        if dist.is_initialized():
            parts = [parts[0]] * dist.get_world_size()
            dist.all_gather_object(parts, (self.tokens, self.dropped))
        result = {}
        for name in self.tokens:
            found = [sum(chosen[name][e] for chosen, _ in parts) for e in range(E)]
            result[name] = found, sum(dropped[name] for _, dropped in parts) / max(1, sum(found))
        return result


def plain(loads) -> dict[str, tuple[list[int], float]]:
    return {name: (each.tokens_per_expert.tolist(), each.dropped.item()) for name, each in loads.items()}


def train(model: nn.Module, x: torch.Tensor) -> None:
    (model(x).square().sum() + aux_loss(model)).backward()


# ---- one rank


def test_forwards_add_up_and_a_call_starts_anew():
    model = nn.Sequential(built(), nn.Linear(D, D), built())
    seen = Seen(model)
    assert plain(load(model)) == {"0": ([0] * E, 0.0), "2": ([0] * E, 0.0)}
    for number in (7, 0, 12):
        train(model, tokens(number))
    assert list(seen.tokens) == ["0", "2"]
    assert plain(load(model)) == seen.everywhere()
    assert plain(load(model))["0"] == ([0] * E, 0.0)
    load_of = load(built())
    assert list(load_of) == [""]
    assert load(nn.Linear(2, 2)) == {}


def test_measures_are_those_of_stats():
    layer = built(capacity=0.7)
    train(layer, tokens(40))
    whole = load(layer)[""]
    for name in ("tokens_per_expert", "dropped", "entropy", "imbalance"):
        torch.testing.assert_close(getattr(whole, name).double(), getattr(layer.stats, name).double())
    assert 0 < whole.dropped < 1
    assert whole.imbalance > 1


@pytest.mark.parametrize("policy", ["score", "position"])
def test_what_capacity_drops(policy):
    layer = built(capacity=Capacity(1.0, drop=policy))
    seen = Seen(layer)
    for number in (16, 10):
        seen.limit = math.ceil(K * number / E)
        train(layer, tokens(number, seed=number))
    assert seen.dropped[""] > 0
    assert plain(load(layer)) == seen.everywhere()


def test_padding_and_choices_of_no_expert_are_not_counted():
    layer = built(gate="expert_choice")
    train(layer, tokens(12))
    assert load(layer)[""].tokens_per_expert.tolist() == [6] * E
    layer = built()
    layer(tokens(10), mask=torch.arange(10) < 4)
    assert load(layer)[""].tokens_per_expert.sum() == 4 * K


def test_free_experts_come_after_the_others():
    layer = MoE(D, 16, E, K, free=["null", "identity"])
    train(layer, tokens(20))
    assert len(load(layer)[""].tokens_per_expert) == E + 2
    layer.free, layer.gate = None, built().gate  # set later
    train(layer, tokens(20))
    assert load(layer)[""].tokens_per_expert.shape == (E,)


def test_evaluations_are_not_counted():
    layer = built()
    with torch.no_grad():
        layer(tokens(5))
    layer.eval()(tokens(6))
    layer.train()
    assert load(layer)[""].tokens_per_expert.sum() == 0
    layer(tokens(7))  # a graph is enough, also without a backward
    assert load(layer)[""].tokens_per_expert.sum() == 7 * K


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
def test_transformed_functions_change_nothing():
    layer = built(balance=0)
    torch.func.jvp(lambda x: layer(x).sum(), (tokens(5),), (tokens(5),))
    torch.func.grad(lambda x: layer(x).sum())(tokens(5))
    assert load(layer)[""].tokens_per_expert.sum() == 0


def test_recomputation_is_not_counted():
    layer, x = built(), tokens(9).requires_grad_()
    with set_checkpoint_early_stop(False):
        y = checkpoint(layer, x, use_reentrant=False)
        (y.sum() + aux_loss(layer)).backward()
    assert load(layer)[""].tokens_per_expert.sum() == 9 * K


CONFIG = GPTConfig(vocab=32, dim=D, layers=4, heads=2, hidden=8, seq_len=6, num_experts=E, top_k=K)


@pytest.mark.parametrize("what", ["none", "full", "selective"])
def test_models_that_recompute(what):
    model = recompute(GPT(CONFIG), what)
    seen = Seen(model)
    for seed in range(2):
        ids = torch.randint(32, (3, 6), generator=torch.Generator().manual_seed(seed))
        (model(ids).square().mean() + aux_loss(model)).backward()
    assert list(seen.tokens) == ["blocks.1.feed_forward", "blocks.3.feed_forward"]
    assert plain(load(model)) == seen.everywhere()
    assert sum(seen.tokens["blocks.1.feed_forward"].values()) == 2 * 18 * K


@pytest.mark.sampled
@pytest.mark.parametrize("options", [{}, {"capacity": 0.8}], ids=["dropless", "capped"])
def test_compiled(options):
    torch._dynamo.reset()
    layer, counter = built(**options), CompileCounterWithBackend("aot_eager")
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for round_number in range(3):
        for number in (16, 24, 10):
            for forward, of in ((compiled, layer), (other, other)):
                (forward(tokens(number, seed=round_number)).square().sum() + aux_loss(of)).backward()
        assert plain(load(compiled))["_orig_mod"] == plain(load(other))[""]  # set to 0: the graphs stay
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize(("what", "in_graph"), [("full", False), ("full", True), ("selective", True)])
def test_compiled_models_that_recompute(what, in_graph):
    torch._dynamo.reset()
    model = recompute(GPT(CONFIG), what)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=in_graph):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=in_graph)
        for _ in range(2):
            (compiled(torch.randint(32, (3, 6))).square().mean() + aux_loss(model)).backward()
    assert [each.tokens_per_expert.sum() for each in load(model).values()] == [2 * 18 * K] * 2
    torch._dynamo.reset()


def test_is_no_part_of_the_model():
    layer = built()
    before = [name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]], list(layer.state_dict())
    train(layer, tokens(9))
    assert before == ([name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]], [*layer.state_dict()])
    file = io.BytesIO(pickle.dumps(layer))
    for other in (copy.deepcopy(layer), pickle.load(file)):
        assert load(other)[""].tokens_per_expert.sum() == 0
        train(other, tokens(3))
        assert load(other)[""].tokens_per_expert.sum() == 3 * K
    assert load(layer.to(torch.bfloat16))[""].tokens_per_expert.sum() == 9 * K  # moved, not cast


def test_from_meta():
    with torch.device("meta"):
        layer = MoE(D, 16, E, K)
    assert layer._count.sums.is_meta
    layer = layer.to_empty(device="cpu")
    assert load(layer)[""].tokens_per_expert.tolist() == [0] * E
    assert built().to("meta")._count.sums.is_meta


# ---- many ranks


def uneven(ranks: int, axis: str, options: dict) -> tuple[dict, dict, dict]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(axis,))
    model = nn.Sequential(built(**options), built(**options))
    seen = Seen(model)
    parallelize(model, mesh)
    for seed in range(3):  # micro-batches, of two sizes
        number = SIZES[(dist.get_rank() + seed // 2) % 4]
        seen.limit = max(1, math.ceil(K * number / E)) if options else math.inf
        train(model, tokens(number, seed=100 * dist.get_rank() + seed))
        model.eval()
        seen.counts = False
        model(tokens(2))
        model.train()
        seen.counts = True
    own = {name: sum(chosen.values()) for name, chosen in seen.tokens.items()}
    return plain(load(model, mesh)), seen.everywhere(), own


@pytest.mark.sampled
@pytest.mark.parametrize(("ranks", "axis"), [(1, "ep"), (2, "ep"), (4, "ep"), (4, "edp")])
@pytest.mark.parametrize("options", [{}, {"capacity": 1.0}], ids=["dropless", "capped"])
def test_over_ranks_that_are_uneven_or_empty(ranks, axis, options):
    results = run(ranks, uneven, ranks, axis, options)
    for loads, wanted, _ in results:
        assert loads == wanted
        assert loads == results[0][0]
    assert sum(results[0][0]["0"][0]) == sum(own["0"] for _, _, own in results)


def in_a_pipeline() -> list[dict]:
    meshes = Meshes.of("cpu", pp=2, tp=2)
    torch.manual_seed(0)
    model = parallel_model(CONFIG, meshes, micro_batches=2, recompute="full")
    for _ in range(2):
        ids = torch.randint(32, (4, 7), generator=torch.Generator().manual_seed(0))
        model.step(ids[:, :-1], ids[:, 1:])
    loads = load(model, meshes)
    alone = load(model)  # taken already
    assert all(each.tokens_per_expert.sum() == 0 for each in alone.values())
    return [int(each.tokens_per_expert.sum()) for each in loads.values()]


def test_a_stage_has_the_loads_of_its_own_layers():
    assert run(4, in_a_pipeline) == [[2 * 4 * 6 * K]] * 4


def under_ddp() -> list[dict]:
    model = nn.Sequential(built())
    wrapped = DistributedDataParallel(model)
    seen = Seen(model)
    for seed in range(3):
        train(wrapped, tokens(4 + dist.get_rank(), seed=seed))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("edp",))
    return [plain(load(model, mesh)), seen.everywhere()]


def test_ddp_does_not_overwrite_it():
    for loads, wanted in run(2, under_ddp):
        assert loads == wanted
