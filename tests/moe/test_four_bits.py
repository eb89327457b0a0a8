"""QLoRA: experts in 4 bits compute, and let adapters learn, what the dequantised matrices would."""

import copy

import pytest
import torch
from reference import close
from torch import nn
from turnout.moe import MoE, aux_loss
from turnout.moe.adapters import (
    add_lora,
    dequantize_experts,
    disable_lora,
    lora_parameters,
    merge_lora,
    quantize_experts,
)
from turnout.moe.autotune import autotune
from turnout.moe.experts.four_bit import FourBitMatrix
from turnout.moe.experts.shared import FeedForward
from turnout.moe.upcycling import upcycle

pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install -e ".[qlora]"')

D, H, E = 16, 24, 6


def layer(dtype=torch.float32, **options) -> MoE:
    torch.manual_seed(1)
    return MoE(D, H, E, 2, **options).to(dtype)


def tokens(number=30, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(3)).to(dtype)


def adapted(model: nn.Module, router=True) -> nn.Module:
    """With adapters that are not zero."""
    generator = torch.Generator().manual_seed(2)
    add_lora(model, 4, router=router)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def learned(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y.square().mean() + aux_loss(model)).backward()
    return y.detach(), {name: p.grad for name, p in lora_parameters(model).items()} | {"x": x.grad}


@pytest.mark.parametrize("few", [1, 2, 1 << 25])  # experts at a time: one, two, all
@pytest.mark.parametrize(("experts", "dtype"), [("swiglu", torch.float64), ("gelu", torch.float32)])
def test_values_and_gradients_are_those_of_the_dequantised_matrices(few, experts, dtype, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.four_bit._GROUP", few * D * H if few < 3 else few)
    moe = adapted(quantize_experts(layer(dtype, experts=experts, bias=True)))
    assert moe.experts.in_four_bits
    plain = dequantize_experts(copy.deepcopy(moe))
    assert plain.experts.w_up.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for number in (30, 1, 0):
        (y, grads), (expected, wanted) = (learned(each, tokens(number, dtype)) for each in (moe, plain))
        assert close(y, expected, tolerance)
        for name, grad in wanted.items():
            assert close(grads[name], grad, tolerance), name
        for p in (*moe.parameters(), *plain.parameters()):
            p.grad = None


LEVELS = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]  # QLoRA, appendix E
LEVELS += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1.0]


@pytest.mark.parametrize("shape", [(3, 24, 16), (3, 16, 24), (2, 96, 32), (2, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_becomes_the_nearest_level_of_its_block(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = matrix.double().view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    nearest = (blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)
    expected = (levels[nearest] * largest).view(shape)
    quantized = FourBitMatrix(matrix)
    assert close(quantized.dense(torch.float64), expected, 1e-6)
    assert close(quantized.held.mT.dense(1, 2, torch.float64), expected[1:2].mT, 1e-6)


def test_the_error_is_that_of_four_bits_and_the_memory_too():
    moe = MoE(64, 128, 4, 2, seed=0)
    dense = copy.deepcopy(moe.experts)
    quantize_experts(moe)
    packed = sum(p.nbytes for p in moe.experts.parameters())
    assert packed == sum(p.numel() for p in dense.parameters()) * 4.5 / 8
    back = dequantize_experts(moe).experts
    for name, p in dense.named_parameters():
        error = (back.get_parameter(name) - p).norm() / p.norm()
        assert 0.05 < error < 0.1, name  # of an even distribution; of a normal one 0.092
        assert not close(back.get_parameter(name)[0], p[1], 0.5), "each expert from its own"


def test_half_precision_and_autocast():
    moe = adapted(quantize_experts(layer()), router=False)
    y, _ = learned(moe, tokens())
    half = copy.deepcopy(moe).bfloat16()
    assert half.experts.w_up.absmax.dtype == torch.int32
    for own, p in moe.experts.named_parameters():
        if not own.startswith("lora."):
            assert torch.equal(half.experts.get_parameter(own), p), "nothing of 4 bits is rounded"
    assert close(half(tokens(dtype=torch.bfloat16)), y, 8e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(moe(tokens()), y, 5e-2)


def test_saved_and_loaded():
    moe, other = quantize_experts(layer(seed=3)), quantize_experts(layer(seed=4))
    assert {"experts.w_up.packed", "experts.w_up.absmax"} < moe.state_dict().keys()
    assert not torch.equal(other(tokens()), moe(tokens()))
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(tokens()), moe(tokens()))
    with pytest.raises(RuntimeError, match="experts\\.w_up\\.packed"):
        other.load_state_dict(layer().state_dict())


def test_nothing_trains_what_is_frozen():
    moe = adapted(quantize_experts(layer(bias=True)))
    assert {name for name, p in moe.named_parameters() if p.requires_grad} == lora_parameters(moe).keys()
    before = {name: p.clone() for name, p in moe.named_parameters()}
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, weight_decay=0.5)
    learned(moe, tokens())
    optimizer.step()
    changed = {name for name, p in moe.named_parameters() if not torch.equal(p, before[name])}
    assert changed == lora_parameters(moe).keys()
    with pytest.raises(RuntimeError, match="floating point"):
        moe.experts.requires_grad_()
    with pytest.raises(ValueError, match="dequantize_experts"):
        merge_lora(moe)
    y = moe(tokens())
    assert close(merge_lora(dequantize_experts(moe))(tokens()), y, 1e-5)


def test_what_does_not_go():
    with pytest.raises(ValueError, match="kind must be one of nf4"):
        quantize_experts(layer(), "int8")
    with pytest.raises(ValueError, match="has no MoE layer"):
        quantize_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already"):
        quantize_experts(quantize_experts(layer()))
    with pytest.raises(ValueError, match="not known"):
        quantize_experts(layer(experts=lambda: nn.Linear(D, D)))
    with pytest.raises(ValueError, match="no whole number of blocks of 64"):
        quantize_experts(MoE(10, 10, 2, 1))
    with pytest.raises(ValueError, match="meta device"):
        quantize_experts(layer().to("meta"))
    with pytest.raises(ValueError, match="no experts in 4 bits"):
        dequantize_experts(layer())
    moe = quantize_experts(layer())
    with pytest.raises(ValueError, match="takes no experts in 4 bits"):
        moe.experts.kernel = "triton"
    with pytest.raises(ValueError, match="etp=1"):
        moe.experts.split_axes()
    with pytest.raises(ValueError, match="before quantize_experts"):
        upcycle(moe, FeedForward(D, 2 * H))
    autotune(moe, 8, clock=lambda run: 1.0)
    assert moe.experts.kernel == "torch"
    with pytest.raises(ValueError, match="not initialised"):
        moe.experts.reset_parameters()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])  # [E, out, in], [E, in, out], and three matrices
def test_experts_of_a_bridge(family):
    pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
    from hf_families import tiny
    from turnout.models.hf import replace_moe, restore_moe, save_pretrained

    model, ids = replace_moe(tiny(family)), torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    add_lora(quantize_experts(model), 4)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.normal_(generator=torch.Generator().manual_seed(len(p)))
    plain = dequantize_experts(copy.deepcopy(model))
    for each in (model, plain):
        each(input_ids=ids).logits.square().mean().backward()
    assert close(model(input_ids=ids).logits, plain(input_ids=ids).logits, 1e-5)
    for name, p in lora_parameters(plain).items():
        assert close(lora_parameters(model)[name].grad, p.grad, 1e-4), name
    for refused in (restore_moe, lambda model: save_pretrained(model, "nowhere")):
        with pytest.raises(ValueError, match=r"merge_lora|dequantize_experts"):
            refused(model)
    with disable_lora(model), pytest.raises(ValueError, match="dequantize_experts"):
        restore_moe(model)
    y = model(input_ids=ids).logits
    restored = restore_moe(merge_lora(dequantize_experts(model), keep=False))
    assert close(restored(input_ids=ids).logits, y, 1e-4)


def test_compiled():
    moe = adapted(quantize_experts(layer()))
    (y, grads), (expected, wanted) = (learned(each, tokens()) for each in (torch.compile(moe, backend="eager"), moe))
    assert close(y, expected, 1e-6)
    for name in wanted:
        assert name == "x" or grads.get(f"_orig_mod.{name}", grads.get(name)) is not None


def test_row_flops_count_numbers_not_bytes():
    moe = layer()
    before = moe.experts.row_flops
    assert quantize_experts(moe).experts.row_flops == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("few", [1, 1 << 25])
def test_on_a_gpu(few, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.four_bit._GROUP", few)
    moe = adapted(quantize_experts(layer(torch.bfloat16)), router=False)
    there = adapted(quantize_experts(layer(torch.bfloat16).cuda()), router=False)
    assert torch.equal(there.experts.w_up.packed.cpu(), moe.experts.w_up.packed)
    assert close(there.experts.w_up.dense(torch.float32).cpu(), moe.experts.w_up.dense(torch.float32), 1e-2)
    plain = dequantize_experts(copy.deepcopy(there))
    x = tokens(dtype=torch.bfloat16).cuda()
    (y, grads), (expected, wanted) = (learned(each, x) for each in (there, plain))
    assert close(y, expected, 1e-2)
    for name, grad in wanted.items():
        assert close(grads[name], grad, 5e-2), name
