"""Convert a SwinV2 of Hugging Face to a dense `Swin`, which computes the same for images of its config's size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Swinv2ForImageClassification, Swinv2Model

from ..swin import Swin, SwinConfig

__all__ = ["swin_config_from_hf", "swin_from_hf"]

OUTSIDE = {
    "embeddings.patch_embeddings.projection": "embed",
    "embeddings.norm": "embed_norm",
    "layernorm": "norm",
}
INSIDE = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.self.logit_scale": "attention.log_scale",
    "attention.self.continuous_position_bias_mlp.0": "attention.position_bias.up",
    "attention.self.continuous_position_bias_mlp.2": "attention.position_bias.down",
    "attention.output.dense": "attention.out",
    "layernorm_before": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "layernorm_after": "feed_forward_norm",
}


@torch.no_grad()
def swin_from_hf(model: Swinv2Model | Swinv2ForImageClassification) -> Swin:
    """The dense `Swin` that computes what a SwinV2 of transformers does, in eval mode, with copies of its weights.

    Logits are equal for images of ``config.image_size``. For other sizes transformers pads images and keeps the windows
    of ``config.image_size``, while `Swin` refuses images that windows do not divide, and its last stages may have
    larger windows.

    Args:
        model: as ``Swinv2ForImageClassification.from_pretrained(...)`` returns. A `Swinv2Model` has no classifier:
            `Swin.features` are its ``last_hidden_state``, and what the model returns is its ``pooler_output``.

    Raises:
        TypeError: another model.
        ValueError: settings that `Swin` does not have, by name.
    """
    if not isinstance(model, Swinv2Model | Swinv2ForImageClassification):
        raise TypeError(f"model must be a Swinv2Model or Swinv2ForImageClassification; got {type(model).__name__}")
    base = model if isinstance(model, Swinv2Model) else model.swinv2
    classes = 0 if base is model else base.config.num_labels or 0
    config = swin_config_from_hf(base.config, classes)
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        swin = Swin(config).to(first.dtype)
    tensors: dict[str, Tensor] = dict(_renamed(base.state_dict()))
    if swin.head is not None:
        assert isinstance(model, Swinv2ForImageClassification)
        tensors |= {f"head.{name}": p for name, p in model.classifier.state_dict().items()}
    swin.load_state_dict({name: p.detach().clone() for name, p in tensors.items()}, assign=True)
    swin.requires_grad_()
    return swin.eval()


def swin_config_from_hf(hf: Any, classes: int) -> SwinConfig:
    """The config of the dense `Swin` with the sizes of a `Swinv2Config`; raises as `swin_from_hf` does."""
    sides = set(hf.image_size if isinstance(hf.image_size, Sequence) else [hf.image_size])
    size: int = sides.pop() if len(sides) == 1 else 0
    refused = {
        "image_size": not size,
        "patch_size": not isinstance(hf.patch_size, int),
        "hidden_act": hf.hidden_act != "gelu",
        "qkv_bias": not hf.qkv_bias,
        "use_absolute_embeddings": hf.use_absolute_embeddings,
        "hidden_dropout_prob": hf.hidden_dropout_prob > 0,
        "attention_probs_dropout_prob": hf.attention_probs_dropout_prob > 0,
    }
    if wrong := [f"{name}={getattr(hf, name)}" for name, bad in refused.items() if bad]:
        raise ValueError(f"the SwinV2 has what Swin has not: {', '.join(wrong)} (set a dropout to 0 in its config)")
    stages = len(hf.depths)
    config = SwinConfig(
        channels=hf.num_channels,
        patch=hf.patch_size,
        dim=hf.embed_dim,
        depths=hf.depths,
        heads=hf.num_heads,
        window=hf.window_size,
        pretrained_windows=(hf.pretrained_window_sizes or [0] * stages)[:stages],  # the default has 4
        mlp_ratio=hf.mlp_ratio,
        classes=classes,
        moe_stages=0,
        norm_eps=hf.layer_norm_eps,
        drop_path=hf.drop_path_rate,
    )
    config.sides(size, size)  # raises where transformers would pad
    return config


def _renamed(tensors: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our names and shapes of the tensors of a `Swinv2Model`."""
    for theirs, tensor in tensors.items():
        if theirs.endswith("mask_token"):
            continue  # of masked image modelling, unused here
        if theirs.startswith("encoder.layers."):
            _, _, stage, where, *rest = theirs.split(".")
            if where == "downsample":
                ours = f"stages.{int(stage) + 1}.merge.{'.'.join(rest).replace('reduction', 'reduce')}"
            else:
                index, *inner = rest
                ours = f"stages.{stage}.blocks.{index}.{_ours('.'.join(inner), INSIDE)}"
        else:
            ours = _ours(theirs, OUTSIDE)
        tensor = tensor.flatten() if ours.endswith("log_scale") else tensor
        yield ours, tensor.flatten(1) if ours == "embed.weight" else tensor


def _ours(name: str, names: dict[str, str]) -> str:
    """The name with its beginning replaced: `names` has the beginnings."""
    for theirs, ours in names.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    raise ValueError(f"{name} of the SwinV2 has no place in Swin")
