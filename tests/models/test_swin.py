"""Swin: held against a plain one in float64, windows against attention over the whole image, and SwinV2 of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_swin import attention, swin
from turnout.models import Swin, SwinConfig, recompute
from turnout.models.swin_blocks import NormedExperts, SwinBlock
from turnout.models.windows import WindowAttention
from turnout.moe import Capacity, MoE, aux_loss
from turnout.moe.gates import TopKGate
from turnout.moe.upcycling import upcycle

CONFIG = SwinConfig(channels=2, patch=2, dim=8, depths=(2, 2), heads=(2, 4), window=2, classes=5, num_experts=4)


def build(config: SwinConfig = CONFIG, seed: int = 0) -> Swin:
    """A model in float64 whose parameters all tell: no norm is 1, no bias is 0."""
    torch.manual_seed(seed)
    model = Swin(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=12, deadline=None)
@given(
    windows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.integers(1, 4),
    shifted=st.booleans(),
    pretrained=st.sampled_from([0, 3]),
    seed=st.integers(0, 9),
)
def test_windows_attend_as_a_brute_force_over_the_image_says(windows, window, shifted, pretrained, seed):
    torch.manual_seed(seed)
    layer = WindowAttention(4, 2, window, shifted, pretrained).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))  # scales on both sides of their bound
    x = images(2, windows[0] * window, windows[1] * window, 4, seed=seed)
    torch.testing.assert_close(layer(x), attention(x, layer.state_dict(), 2, window, shifted, pretrained))


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "moe_every": 1}, {"moe_stages": 0}, {"capacity": 0.5}], ids=str)
def test_the_model_is_the_plain_one(options):
    config = replace(CONFIG, **options)
    model, x = build(config), images(3, 2, 16, 8)
    expected = swin(x, model.state_dict(), config)
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(expected[0], expected[1])


def test_one_seed_makes_one_model_and_every_parameter_learns():
    model, x = build(), images(3, 2, 16, 8)
    assert torch.equal(model(x), build()(x))
    (model(x).square().sum() + aux_loss(model)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert [name for name, m in model.named_modules() if isinstance(m, MoE)] == [
        f"stages.{stage}.blocks.1.feed_forward" for stage in (0, 1)
    ]


def test_the_router_learns_from_the_task():
    """A norm after the layer would take away the weight of a token's only expert, and with it the gradient."""
    model = build(replace(CONFIG, capacity=None))
    for layer in (m for m in model.modules() if isinstance(m, MoE)):
        layer.balance = 0
    model(images(3, 2, 16, 8)).square().sum().backward()
    for name, p in model.named_parameters():
        if ".gate." in name:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (16, 9, "patches of 2 x 2 pixels"),
        (16, 0, "patches of 2 x 2 pixels"),
        (16, 10, "16 x 10 pixels has 8 x 5 tokens at stage 1, which windows of 2 do not divide"),
        (12, 8, "6 x 4 tokens at stage 1.*|.*3 x 2 tokens at stage 2, which windows of 2 do not divide: .* of 8"),
    ],
)
def test_images_that_do_not_fit_are_refused(height, width, words):
    with pytest.raises(ValueError, match=words):
        build()(images(1, 2, height, width))


def test_an_odd_image_cannot_be_merged():
    model = build(replace(CONFIG, window=3))
    assert model(images(1, 2, 4, 12)).shape == (1, 5)
    with pytest.raises(ValueError, match="3 x 6 tokens at stage 1, of which patch merging cannot make pairs"):
        model(images(1, 2, 6, 12))


def test_wrong_inputs_and_sizes_are_refused():
    model = build()
    for wrong, kind in ((images(2, 16, 8), ValueError), (images(1, 3, 16, 8), ValueError)):
        with pytest.raises(kind, match=r"images must be \[B, 2, height, width\]"):
            model(wrong)
    with pytest.raises(TypeError, match="images must be floating point"):
        model(torch.zeros(1, 2, 16, 8, dtype=torch.uint8))
    for options, words in {
        "heads=.* of stage 1 must divide": {"heads": (3, 4)},
        "heads=.* one number for each stage": {"heads": (2,)},
        "moe_stages=3 must be between": {"moe_stages": 3},
        "gate must be one of": {"gate": "best"},
        "must not have top_k": {"moe": {"top_k": 2}},
        "name of an activation": {"moe": {"experts": torch.nn.Identity}},
        "window must be positive": {"window": 0},
        "top_k must be positive": {"top_k": 0},
        "heads must be positive": {"heads": (0, 4)},
        "classes must be 0 or more": {"classes": -1},
        "mlp_ratio=0.05 x dim=": {"mlp_ratio": 0.05},
        "must not have shared": {"moe": {"shared": torch.nn.Identity()}},
        "drop_path must lie": {"drop_path": 1.0},
    }.items():
        with pytest.raises(ValueError, match=options):
            replace(CONFIG, **words)
    experts = next(m for m in model.modules() if isinstance(m, NormedExperts))
    with pytest.raises(ValueError, match="etp=1"):
        experts.split_axes()


def test_no_images_are_images_too():
    assert build().eval()(images(0, 2, 16, 8)).shape == (0, 5)


def test_inference_with_another_capacity_than_training():
    model, x = build().eval(), images(3, 2, 16, 8)
    tight = replace(CONFIG, capacity=Capacity(1.25, eval_factor=0.25, drop="priority"))
    other = build(tight)
    other.load_state_dict(model.state_dict())
    before = model(x)
    for layer in (m for m in model.modules() if isinstance(m, MoE)):
        layer.capacity = 0.25  # the order of dropping stays
        assert layer.capacity.drop == "priority"
    assert torch.equal(model(x), other.eval()(x))
    assert not torch.allclose(model(x), before)
    for layer in (m for m in model.modules() if isinstance(m, MoE)):
        kept = int(layer.stats.tokens_per_expert.sum()) if hasattr(layer.stats, "tokens_per_expert") else 0
        assert kept > 0


def test_stochastic_depth_leaves_branches_out_in_training_alone():
    config = replace(CONFIG, drop_path=0.9, moe_stages=0)
    model, x = build(config), images(64, 2, 8, 8)
    block = model.stages[1].blocks[1]
    assert isinstance(block, SwinBlock)
    hidden = images(64, 2, 2, 16)
    y = block(hidden)
    same = (y == hidden).flatten(1).all(1)
    assert 30 < same.sum() < 64  # 0.9 ** 2 of them are expected: 52
    assert not (block.eval()(hidden) == hidden).flatten(1).all(1).any()
    assert torch.equal(model.eval()(x), build(replace(config, drop_path=0.0)).eval()(x))


@pytest.mark.parametrize("what", ["full", "selective"])
def test_recomputation_changes_nothing(what):
    model, again, x = build(), recompute(build(), what), images(3, 2, 16, 8)
    for each in (model, again):
        (each(x).square().sum() + aux_loss(each)).backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_autocast_computes_in_bfloat16():
    model, x = build().float(), images(3, 2, 16, 8).float()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.2, rtol=0.1)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.thorough
def test_one_graph_has_the_same_results():
    model = build(replace(CONFIG, depths=(2,), heads=(2,), moe_stages=1)).float()
    x, results = images(2, 2, 8, 8).float(), []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = forward(x)
        (y.square().sum() + aux_loss(model)).backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    torch._dynamo.reset()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


def test_a_dense_model_becomes_a_mixture():
    """Copies compute what the dense block does where a token's weights add up to 1; shards cannot."""
    dense, x = build(replace(CONFIG, moe_stages=0)), images(3, 2, 16, 8)
    whole = {"capacity": None, "gate": lambda dim, number, k: TopKGate(dim, number, k, normalize=True)}
    copies = upcycle(build(replace(CONFIG, **whole), seed=1), dense)
    torch.testing.assert_close(copies(x), dense(x))
    with pytest.raises(ValueError, match="shards of a block do not add up"):
        upcycle(build(replace(CONFIG, **whole, top_k=2)), dense)
    with pytest.raises(ValueError, match="cannot be scaled"):
        upcycle(build(), dense, scale=2.0)


def test_flops_count_what_a_token_uses():
    dense, moe = Swin(replace(CONFIG, moe_stages=0)), Swin(CONFIG)
    gates = 6 * sum(
        tokens * sum(p.numel() for p in stage.blocks[1].feed_forward.gate.parameters() if p.ndim > 1)
        for tokens, stage in zip((32, 8), moe.stages, strict=True)
    )
    assert moe.flops_per_image(16, 8) == dense.flops_per_image(16, 8) + gates
    linear = (
        32 * (8 * 8 + 2 * 12 * 8 * 8) + 8 * (32 * 16 + 2 * 12 * 16 * 16) + 16 * 5
    )  # embed, blocks; merge, blocks; head
    scores = 32 * 2 * 8 * 4 + 8 * 2 * 16 * 4
    assert dense.flops_per_image(16, 8) == 6 * linear + 12 * scores
