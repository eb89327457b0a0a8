"""torch.compile of whole models: no graph break of ours, at most three graphs, the results of the model as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from turnout.models import BERT, GPT, T5, BERTConfig, GPTConfig, T5Config, recompute
from turnout.models.loss import next_token_loss
from turnout.moe import Capacity, MoE, aux_loss

SIZES = {"dim": 16, "layers": 1, "heads": 2, "hidden": 12, "seq_len": 12, "num_experts": 4, "moe_every": 1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gpt(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=32, **SIZES, **options))


def tokens(number: int, batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(number))


def step(model: nn.Module, forward, ids: torch.Tensor) -> list[torch.Tensor | None]:
    """Loss and every gradient."""
    model.zero_grad()
    loss = next_token_loss(forward(ids[:, :-1]), ids[:, 1:]) + aux_loss(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("options", [{}, {"capacity": Capacity(1.25, pad=True)}], ids=["ragged", "padded"])
def test_gpt_learns_as_it_is_in_at_most_three_graphs(options):
    """20 steps of AdamW, whose loads change as routers learn, with batches of changing shape."""
    plain, model = gpt(moe=options), gpt(moe=options)
    counter = CompileCounterWithBackend("eager")  # other tests are of what is made of the graphs
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, model)]
    loads = set()
    for number in range(20):
        ids = tokens(number, *[(2, 9), (3, 9), (4, 12), (2, 7), (5, 10)][number % 5])
        for same, ours in zip(step(plain, plain, ids), step(model, compiled, ids), strict=True):
            torch.testing.assert_close(ours, same, atol=1e-4, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
        loads.add(tuple(model.blocks[0].feed_forward.stats.tokens_per_expert.tolist()))
    assert len(loads) == 20
    assert counter.frame_count <= 3


def encoder() -> tuple[nn.Module, tuple]:
    ids = tokens(0)
    return BERT(BERTConfig(vocab=40, mask_token=33, **SIZES)), (ids, ids > 3)


def both() -> tuple[nn.Module, tuple]:
    ids = tokens(0)
    return T5(T5Config(vocab=40, start=33, **SIZES)), (ids, ids, ids > 3)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("build", [encoder, both])
def test_bert_and_t5_in_one_graph(build):
    torch.manual_seed(0)
    model, inputs = build()
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        (forward(*inputs).square().mean() + aux_loss(model)).backward()
        results.append([p.grad for p in model.parameters()])
    for same, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, same)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize(("what", "in_graph"), [("full", False), ("full", True), ("selective", True)])
def test_recomputed_blocks(what, in_graph):
    model = recompute(gpt(), what)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=in_graph):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=in_graph)
        for number in range(3):  # losses of one step must not reach the next
            ids = tokens(number)
            for ours, same in zip(step(model, compiled, ids), step(model, model, ids), strict=True):
                torch.testing.assert_close(ours, same)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("families", [["mixtral"], ["deepseek_v3"], ["gpt_oss", "qwen3_moe"]], ids=str)
def test_bridged_models_in_one_graph(families):
    pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
    from hf_families import batch, tiny
    from turnout.models.hf import replace_moe

    for family in families:
        layers = 2 if family == "deepseek_v3" else 1  # the first of that is dense
        model, asked = replace_moe(tiny(family, num_hidden_layers=layers)), batch(family)
        asked.pop("output_router_logits", None)  # transformers records them by hooks that break graphs
        assert any(isinstance(module, MoE) for module in model.modules())
        results = []
        for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            loss = forward(**asked).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
        for same, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, same, atol=1e-5, rtol=1e-4)
