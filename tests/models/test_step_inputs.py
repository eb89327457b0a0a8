"""Inputs and targets of a step that do not fit raise one sentence, before anything is computed."""

import pytest
import torch
from turnout.models import BERT, GPT, T5, BERTConfig, GPTConfig, T5Config
from turnout.models.pipeline.inputs import check_targets, checked, pieces

SIZES = {"dim": 8, "heads": 2, "layers": 1, "seq_len": 8, "moe_every": 0, "hidden": 4}
MODELS = {
    "gpt": GPT(GPTConfig(**SIZES)),
    "bert": BERT(BERTConfig(segments=2, **SIZES)),
    "t5": T5(T5Config(**SIZES)),
}
IDS, SHORT = torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.int64)
TAKES = "the model takes source, target, and may take mask, target_mask; got "


@pytest.mark.parametrize(
    ("name", "inputs", "error", "message"),
    [
        ("t5", IDS, ValueError, TAKES + "a tensor"),
        ("t5", (IDS, None), ValueError, TAKES + "a tensor, None"),
        ("t5", (), ValueError, TAKES + "nothing"),
        ("gpt", (IDS, IDS > 0), ValueError, "the model takes tokens; got a tensor, a tensor"),
        ("t5", [IDS, SHORT], TypeError, "inputs must be a tensor or a tuple of tensors; got list"),
        ("t5", (IDS, SHORT[:2]), ValueError, "inputs and targets must be of as many sequences; got 2 and 4"),
        ("t5", (IDS, SHORT, None, IDS > 0), ValueError, r"mask must be bool \(4, 6\); got torch.bool \(4, 8\)"),
        ("gpt", IDS.int(), ValueError, "tokens must be int64; got torch.int32"),
        ("bert", (IDS, None, SHORT), ValueError, r"segments must be int64 \(4, 8\); got torch.int64 \(4, 6\)"),
    ],
)
def test_inputs_are_named(name, inputs, error, message):
    with pytest.raises(error, match=message):
        checked(MODELS[name], inputs, 4)


@pytest.mark.parametrize("targets", [SHORT.float(), IDS])
def test_targets_are_those_of_the_decoder(targets):
    with pytest.raises(ValueError, match=r"targets must be int64 \(4, 6\); got "):
        check_targets(MODELS["t5"], (IDS, SHORT), targets)
    check_targets(MODELS["bert"], (IDS, SHORT), IDS)
    with pytest.raises(ValueError, match="at least one sequence"):
        check_targets(MODELS["bert"], (IDS[:0],), IDS[:0])


def test_none_stays_none_in_every_piece():
    for number, rows in ((2, [2, 2]), (6, [1, 1, 1, 1])):
        cut = pieces(checked(MODELS["bert"], (IDS, None, IDS)), number)
        assert [(len(tokens), mask, len(segments)) for tokens, mask, segments in cut] == [(n, None, n) for n in rows]
