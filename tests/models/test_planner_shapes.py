"""Models and updates that the planner knows beside the plain ones: parameters, FLOPs and bytes of the real ones."""

import pytest
import torch
from torch.optim import AdamW
from turnout.models import EMA, GPT, GPTConfig, Muon, muon_groups
from turnout.models.pipeline.partition import Stages
from turnout.models.planner import Architecture, Cluster, Estimator, Layout, search
from turnout.models.planner.layout import misfit
from turnout.models.planner.share import shares, stage_blocks
from turnout.models.planner.update import Update

LAPTOP = Cluster.load("laptop")
CONFIGS = {
    "heads of another width": GPTConfig(head_dim=16, kv_heads=2, attention_bias=True),
    "untied": GPTConfig(tied=False, qk_norm=True),
    "windows": GPTConfig(windows=(32, 0, 512), layers=5),
    "further tokens": GPTConfig(mtp=2, layers=3),
    "shared experts": GPTConfig(moe={"shared": 2}, top_k=1),
    "further tokens of experts, untied": GPTConfig(mtp=1, tied=False, windows=(16,), head_dim=8),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_and_flops_are_those_of_the_module(config):
    with torch.device("meta"):
        model = GPT(config)
    planned = Architecture.of(config)
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.active_parameters == model.active_parameters()
    assert planned.flops(1) == config.seq_len * model.flops_per_token()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stages_and_their_parameters_are_those_that_run(config):
    model, layout = Architecture.of(config), Layout(pp=2, micro_batches=2)
    stages = Stages.of(config, "1f1b", 2)
    assert tuple(stage_blocks(model, 2)) == stages.blocks
    for rank, share in enumerate(shares(model, layout)):
        (part,) = stages.build(rank)
        held = share.dense_parameters(model, 1) + share.expert_parameters(model, layout)
        assert held == sum(p.numel() for p in part.parameters())


def test_windows_and_further_tokens_take_time_and_memory():
    plain = GPTConfig(layers=4)
    for more in (GPTConfig(layers=4, mtp=1), GPTConfig(layers=4, windows=(16, 0))):
        before, after = (
            Estimator(Architecture.of(config), LAPTOP, 8)(Layout(micro_batch=8, dtype="fp32"))
            for config in (plain, more)
        )
        assert after.breakdown.compute > before.breakdown.compute
        assert after.memory.activations > before.memory.activations


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_update_holds_what_it_does(name):
    """Optimizer state and average of weights, number by number; a step counter for each parameter aside."""
    config = GPTConfig(dim=32, layers=2, hidden=16, num_experts=4, seq_len=8, mtp=1, moe={"shared": 1})
    model = GPT(config)
    optimizer = AdamW(model.parameters()) if name == "adamw" else Muon(muon_groups(model, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    ema = EMA(model, 0.9)
    averages = [b for b in ema.buffers() if b.ndim]
    held = Estimator(Architecture.of(config), LAPTOP, 8, update=Update(name, ema=True)).memory(Layout(dtype="fp32"))
    assert held.optimizer == sum(t.nbytes for t in states)
    assert held.average == sum(t.nbytes for t in averages)


def test_an_update_takes_time_and_is_shared_out():
    model = Architecture.of(GPTConfig(layers=4, dim=256, hidden=512))
    seconds = {}
    for zero in (0, 1):
        for update in (Update(), Update("muon"), Update(ema=True)):
            layout = Layout(dp=4, micro_batch=2, zero=zero, dtype="fp32")
            seconds[zero, update] = Estimator(model, LAPTOP, 8, update=update)(layout).breakdown.optimizer
    plain, muon, ema = Update(), Update("muon"), Update(ema=True)
    assert seconds[0, muon] > 2 * seconds[0, plain]
    assert seconds[0, ema] == pytest.approx(seconds[0, plain] * (1 + 12 / LAPTOP.software.step_bytes))
    more = [seconds[zero, muon] - seconds[zero, plain] for zero in (0, 1)]
    assert more[1] == pytest.approx(more[0] / 4)


def test_ranks_that_split_sequences():
    model = Architecture.of(GPTConfig(layers=4, heads=4))
    whole, half = (Estimator(model, LAPTOP, 8)(Layout(cp=cp, micro_batch=8, dtype="fp32")) for cp in (1, 2))
    assert half.breakdown.cp > 0
    assert half.breakdown.compute < 0.6 * whole.breakdown.compute
    assert half.memory.activations == pytest.approx(whole.memory.activations / 2)
    assert Estimator(model, LAPTOP, 8).memory(Layout(cp=2, zero=1, dtype="fp32")).optimizer == pytest.approx(
        whole.memory.optimizer / 2
    )
    assert {plan.layout.cp for plan in search(model, LAPTOP, 4, 8, {"cp": 2}, "fp32").plans} == {2}
    for layout, words in (
        (Layout(cp=8, micro_batch=8, cp_attention="ulysses"), "do not split over cp=8"),
        (Layout(cp=96, micro_batch=8), r"--seq \(128\) must be a multiple of --cp x --tp \(96\)"),
    ):
        with pytest.raises(ValueError, match=words):
            raise ValueError(misfit(layout, model, 8))
    windowed = Architecture.of(GPTConfig(layers=4, heads=4, windows=(16,)))
    assert "ring attention has no dropout, windows" in (misfit(Layout(cp=8, micro_batch=8), windowed, 8) or "")
