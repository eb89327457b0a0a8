"""Every family of the installed transformers with a mixture of experts: computed as before, or refused by name."""

import copy
import importlib

import pytest
import torch
from torch import nn
from turnout.models.hf import BridgedMoE, replace_moe, restore_moe

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from hf_walk import PAGE, REFUSED, batch, families, row, shrunk, tiny

TOLERANCE = 1e-5


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    """Outputs in eval and in training, and the gradients of both."""
    values, given = {}, batch(model)
    for mode in (False, True):
        torch.manual_seed(1)
        y = model.train(mode)(**given)[0]
        (y.flatten() * torch.linspace(-1, 1, y.numel())).sum().backward()
        values["train" if mode else "eval"] = y.detach()
    return values


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1e-20))


@pytest.mark.sampled
@pytest.mark.parametrize("family", families())
@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed, and rope of odd sizes
def test_family(family, tmp_path):
    original = tiny(family)
    ours = copy.deepcopy(original)
    if family in REFUSED:
        with pytest.raises(ValueError, match="adapter"):
            replace_moe(ours)
        assert not any(isinstance(m, BridgedMoE) for m in ours.modules())
        assert all(map(torch.equal, original.state_dict().values(), ours.state_dict().values()))
        return
    assert replace_moe(ours) is ours
    assert row(family, ours) in PAGE.read_text()
    outputs = [run(model) for model in (original, ours)]
    assert {name: difference(t, outputs[1][name]) for name, t in outputs[0].items()} == pytest.approx(
        {"eval": 0, "train": 0}, abs=TOLERANCE
    )
    original.save_pretrained(tmp_path / "before")
    restore_moe(ours).save_pretrained(tmp_path / "after")
    expected, got = gradients(original), gradients(ours)
    assert expected.keys() == got.keys()
    assert [name for name in expected if difference(expected[name], got[name]) > TOLERANCE] == []
    before, after = (sorted((tmp_path / name).iterdir()) for name in ("before", "after"))
    assert [path.name for path in before] == [path.name for path in after]
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after]


def test_the_page_has_all_families():
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == families()  # without the table's head


@pytest.mark.parametrize(
    ("family", "name", "more", "block"),
    [
        (
            "qwen3_omni_moe",
            "Qwen3OmniMoeTalkerModel",
            {"shared_expert_intermediate_size": 16},
            "Qwen3OmniMoeTalkerTextSparseMoeBlock",
        ),
        (
            "dots3_note",
            "Dots3NoteVisionModel",
            {
                "adapter_in_dim": 32,
                "router_scaling_factor": 1.5,
                "mlp_layer_types": ["dense", "dense", "dense", "sparse"],
                "per_layer_config": {3: {"num_local_experts": 8}},
            },
            "Dots3NoteExperts",
        ),
    ],
)
def test_a_model_beside_the_one_that_writes_text(family, name, more, block):
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    model = replace_moe(kind(shrunk(kind.config_class, more)))
    assert {type(m.block).__name__ for m in model.modules() if isinstance(m, BridgedMoE)} == {block}
