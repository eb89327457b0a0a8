"""SwinV2 of transformers as our dense Swin: equal hidden states and logits, or a refusal by name."""

from __future__ import annotations

import pytest
import torch
from turnout.models import GPT, GPTConfig

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from transformers import Swinv2Config, Swinv2ForImageClassification, Swinv2ForMaskedImageModeling, Swinv2Model
from turnout.models.hf.swin_format import swin_from_hf

SIZES = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def theirs(kind: type = Swinv2ForImageClassification, **options):
    """A tiny model of transformers in eval mode whose parameters all tell."""
    torch.manual_seed(0)
    model = kind(Swinv2Config(**{**SIZES, "num_labels": 5, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 8, "pretrained_window_sizes": [6, 3]},  # the second stage is one window
        {"depths": [1, 2, 1], "num_heads": [1, 2, 2], "mlp_ratio": 2.0, "image_size": [32, 32], "layer_norm_eps": 1e-3},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_are_equal(options):
    model = theirs(**options)
    size = model.config.image_size if isinstance(model.config.image_size, int) else model.config.image_size[0]
    ours, x = swin_from_hf(model), images(size)
    expected = model(x).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)
    assert not ours.training
    ours.head.weight.zero_()  # copies
    assert torch.equal(model(x).logits, expected)


@torch.no_grad()
def test_a_model_without_a_classifier_gives_features():
    model = theirs(Swinv2Model).double()
    ours, x = swin_from_hf(model), images().double()
    expected = model(x)
    torch.testing.assert_close(ours.features(x).flatten(1, 2), expected.last_hidden_state)
    torch.testing.assert_close(ours(x), expected.pooler_output)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "relu"},
        {"qkv_bias": False},
        {"use_absolute_embeddings": True},
        {"hidden_dropout_prob": 0.1},
        {"attention_probs_dropout_prob": 0.1},
        {"image_size": [16, 32]},
    ],
    ids=str,
)
def test_what_swin_has_not_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"the SwinV2 has what Swin has not: {name}="):
        swin_from_hf(theirs(**options))


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="which windows of 3 do not divide"):
        swin_from_hf(theirs(window_size=3))
    for model in (theirs(Swinv2ForMaskedImageModeling, encoder_stride=4), GPT(GPTConfig(layers=1))):
        with pytest.raises(TypeError, match=f"got {type(model).__name__}"):
            swin_from_hf(model)
