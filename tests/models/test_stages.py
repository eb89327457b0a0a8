"""Pipeline stages of a BERT and a T5 in one process: values, names, what travels, and costs, as in the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from turnout.models import T5, BERTConfig, GPTConfig, Stages, SwinConfig, T5Config
from turnout.models.pipeline.partition import flops, model_of

SIZES = {"dim": 16, "layers": 3, "heads": 2, "hidden": 12, "num_experts": 4, "seq_len": 8}
CONFIGS = {
    "bert": BERTConfig(segments=2, **SIZES),
    "t5": T5Config(decoder_layers=2, **SIZES),
}
REAL = torch.arange(8) < torch.tensor([[8], [5], [7]])
TOKENS = torch.randint(250, (3, 8), generator=torch.Generator().manual_seed(0))
INPUTS = {"bert": (TOKENS, REAL, (TOKENS > 100).long()), "t5": (TOKENS, TOKENS[:, :6], REAL, REAL[:, :6])}


def built(kind: str, kept: range | None = None) -> nn.Module:
    torch.manual_seed(0)
    return model_of(CONFIGS[kind], kept)


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [("bert", (1, 2)), ("t5", (3,)), ("t5", (2, 4)), ("t5", (1, 2, 3, 4)), ("t5", (1,))],
)
def test_stages_one_after_another_are_the_model(kind, cuts):
    config, whole, inputs = CONFIGS[kind], built(kind), INPUTS[kind]
    ends = [0, *cuts, config.num_blocks]
    blocks = tuple(map(range, ends[:-1], ends[1:]))
    stages, parts = Stages(config, "1f1b", len(blocks), blocks), [built(kind, each) for each in blocks]
    hidden = ()
    for stage, part in enumerate(parts):
        hidden = part(*inputs, hidden=hidden)
        if stage + 1 < len(parts):
            assert [x.shape[1] for x in hidden] == stages.lengths(stage, [x.shape[1] for x in inputs])
    torch.testing.assert_close(hidden, whole(*inputs), rtol=0, atol=0)

    values, holders = dict(whole.named_parameters()), {}
    for stage, part in enumerate(parts):
        for name, p in part.named_parameters():
            assert torch.equal(p, values[name]), name
            holders.setdefault(name, []).append(stage)
    assert holders.keys() == values.keys()
    assert {name: held for name, held in holders.items() if len(held) > 1} == stages.shared()
    for part in parts:
        wrong = () if part is not parts[0] else (TOKENS,)
        with pytest.raises(ValueError, match="as the pipeline stage before returns them; got"):
            part(*inputs, hidden=wrong)


def test_costs_are_those_of_the_model():
    bert, t5 = BERTConfig(**SIZES), CONFIGS["t5"]
    assert sum(flops(bert)) == model_of(bert).flops_per_token()
    assert sum(flops(t5)) == model_of(t5).flops(8, 1)
    dense = T5(T5Config(moe_every=0, **SIZES))
    encoder, *_, decoder, last = dense.block_flops(8, 8)
    assert decoder - encoder == 8 * (6 * 4 * 16**2 + 12 * 16 * 8)  # cross attention
    assert last - decoder == 8 * 6 * 320 * 16  # the head
    assert Stages.of(dense.config, "1f1b", 2).blocks == (range(2), range(2, 6))  # a long source, a short target


def test_a_pipeline_of_other_models_is_refused():
    with pytest.raises(TypeError, match="a pipeline splits a GPT, BERT or T5; got SwinConfig: spread experts"):
        Stages.of(SwinConfig(), "1f1b", 1)
    with pytest.raises(ValueError, match="4 layers cannot fill 3 ranks x 2 stages"):
        Stages.of(T5Config(), "zbv", 3)
    assert Stages.of(GPTConfig(tied=False), "1f1b", 2).shared() == {}
