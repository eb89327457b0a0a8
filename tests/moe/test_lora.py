"""LoRA: thin matrices beside frozen ones compute and learn what the sum of both would, and cost no more than that."""

import copy
from itertools import combinations
from pathlib import Path

import pytest
import torch
from reference import close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from turnout.moe import MoE, aux_loss
from turnout.moe.adapters import add_lora, lora_parameters, merge_lora, unmerge_lora
from turnout.moe.gates import TopKGate

D, E, RANK = 16, 4, 4


def layer(hidden=24, dtype=torch.float64, **options) -> MoE:
    torch.manual_seed(1)
    return MoE(D, hidden, E, 2, **options).to(dtype)


def trained(model: nn.Module) -> nn.Module:
    """With adapters that are not zero any more."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokens(number=20, dtype=torch.float64) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def summed(moe: MoE) -> tuple[MoE, dict[str, tuple[Tensor, Tensor]]]:
    """A layer without adapters whose matrices are the sums, and the products by the name of the matrix, as leaves."""
    plain, factors = copy.deepcopy(moe), {}
    plain.experts.lora = plain.gate.lora = None
    for name, adapter in moe.experts.lora["default"].items():
        a, b = (p.detach().clone().requires_grad_() for p in (adapter.a, adapter.b))
        w = plain.experts.get_parameter(f"w_{name}").detach() + adapter.scale * a @ b.mT
        factors[f"experts.lora.default.{name}"] = a, b
        del plain.experts._parameters[f"w_{name}"]
        setattr(plain.experts, f"w_{name}", w)
    a, b = (p.detach().clone().requires_grad_() for p in (moe.gate.lora["default"].a, moe.gate.lora["default"].b))
    factors["gate.lora.default"] = a, b
    w = plain.gate.weight.detach() + moe.gate.lora["default"].scale * b @ a.T
    del plain.gate._parameters["weight"]
    plain.gate.weight = w
    return plain, factors


@pytest.mark.parametrize("hidden", [8, 24])  # the gate's weight before the down projection, and after it
@pytest.mark.parametrize(("experts", "bias"), [("swiglu", False), ("gelu", True), ("relu", False)])
def test_values_and_gradients_are_those_of_the_sum(experts, bias, hidden):
    moe = layer(hidden, experts=experts, bias=bias, gate=TopKGate(D, E, 2, bias=bias))
    with torch.no_grad():
        if bias:
            moe.gate.bias.copy_(torch.arange(E) / E)
        untouched = moe(tokens())
        assert torch.equal(add_lora(moe, RANK, alpha=6.0)(tokens()), untouched), "nothing changes at first"
    plain, factors = summed(trained(moe))
    x, also = tokens().requires_grad_(), tokens().requires_grad_()
    y, expected = moe(x), plain(also)
    assert close(y, expected, 1e-12)
    assert not close(y, untouched, 1e-2)
    (y.square().mean() + aux_loss(moe)).backward()
    (expected.square().mean() + aux_loss(plain)).backward()
    assert close(x.grad, also.grad, 1e-12)
    for name, (a, b) in factors.items():
        adapter = moe.get_submodule(name)
        assert close(adapter.a.grad, a.grad, 1e-11), name
        assert close(adapter.b.grad, b.grad, 1e-11), name
    assert {name for name, p in moe.named_parameters() if p.grad is not None} == lora_parameters(moe).keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_and_unmerged(dtype):
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    moe = trained(add_lora(layer(dtype=dtype, bias=True), RANK))
    before = {name: p.clone() for name, p in moe.named_parameters()}
    y = moe(tokens(dtype=dtype))
    assert {p.dtype for p in lora_parameters(moe).values()} == {torch.promote_types(dtype, torch.float32)}
    assert merge_lora(moe) is moe
    assert not moe.experts.adapts
    assert not close(moe.experts.w_up, before["experts.w_up"], 1e-2)
    assert close(moe(tokens(dtype=dtype)), y, tolerance)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(moe)
    unmerge_lora(moe)
    assert all(close(p, before[name], tolerance) for name, p in moe.named_parameters())
    assert close(moe(tokens(dtype=dtype)), y, tolerance)
    with pytest.raises(ValueError, match="not merged"):
        unmerge_lora(moe)
    merge_lora(moe, keep=False)
    assert moe.state_dict().keys() == layer(bias=True).state_dict().keys()
    assert close(moe(tokens(dtype=dtype)), y, tolerance)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("merged", [(), (1,), (0, 1)])
def test_adapters_that_are_merged_are_not_merged_again(merged, keep):
    model = trained(add_lora(nn.Sequential(layer(), layer()), RANK))
    y = model(tokens())
    for place in merged:
        merge_lora(model[place])
    if keep and len(merged) == 2:
        with pytest.raises(ValueError, match="merged already"):
            merge_lora(model)
    else:
        merge_lora(model, keep)
    assert close(model(tokens()), y, 1e-12)
    assert bool(lora_parameters(model)) == keep
    assert not any(moe.experts.adapts for moe in model)
    if keep:
        unmerge_lora(model[0])
        assert not model[0].gate.lora["default"].merged
        assert not any(adapter.merged for adapter in unmerge_lora(model)[1].experts.lora["default"].values())
        assert close(model(tokens()), y, 1e-12)
    else:
        with pytest.raises(ValueError, match="call add_lora first"):
            merge_lora(model, keep=False)


class Made(TorchDispatchMode):
    """Shapes of all tensors that operators return in memory of their own."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.shapes = {t.untyped_storage().data_ptr() for t in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.numel() and t.untyped_storage().data_ptr() not in self.known:
                self.shapes.append(tuple(t.shape))
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_experts_cost_no_gradient(frozen, dtype):
    moe = add_lora(layer(hidden=40, dtype=dtype), RANK)
    base = [p for name, p in moe.experts.named_parameters() if not name.startswith("lora")]
    for p in base:
        p.requires_grad_(not frozen)
    saved: list[Tensor] = []
    with Made(base) as made:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = moe(tokens(dtype=dtype).requires_grad_())
        y.square().mean().backward()
    large = min(p.numel() for p in base)
    gradients = [shape for shape in made.shapes if torch.Size(shape).numel() >= large]
    assert bool(gradients) != frozen, "of experts that learn there are some"
    kept = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= large}
    assert kept <= made.known, "of that size nothing is kept but the matrices themselves"
    assert all((p.grad is None) == frozen for p in base)


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_frozen_experts_without_adapters_keep_no_rows(one_at_a_time, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: one_at_a_time)
    moe, saved = layer(hidden=8).requires_grad_(False), []
    x = tokens(50).requires_grad_()
    with Made(list(moe.experts.parameters())) as made:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            y = moe(x)
        y.sum().backward()
    assert x.grad.any()
    assert one_at_a_time or (100, D) not in saved, "rows are for the gradients of the matrices above them alone"
    assert not {(E, D, 8), (E, 8, D)} & set(made.shapes), "no gradients of matrices"


def test_no_adapters_one_expert_at_a_time(monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: True)
    moe = trained(add_lora(layer(), RANK))
    y = moe(tokens())  # all at once, in spite of that
    assert close(merge_lora(moe)(tokens()), y, 1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_any_rank(rank):
    moe = trained(add_lora(layer(dtype=torch.float32, balance=0), rank))
    y = moe(tokens(dtype=torch.float32))
    y.square().mean().backward()
    assert all(p.grad.any() for p in lora_parameters(moe).values())
    assert close(merge_lora(moe)(tokens(dtype=torch.float32)), y, 1e-5)


def test_half_precision_beside_float32_adapters():
    exact = trained(add_lora(layer(dtype=torch.float32), RANK))
    y = exact(tokens(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(exact(tokens(dtype=torch.float32)), y, 5e-2)
    half = trained(add_lora(layer(dtype=torch.bfloat16), RANK))
    assert all(p.dtype == torch.float32 for p in lora_parameters(half).values())
    out = half(tokens(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert close(out, y, 8e-2)


def test_only_adapters_are_saved_and_loaded(tmp_path: Path):
    torch.manual_seed(0)
    model = trained(add_lora(nn.Sequential(nn.Linear(D, D), MoE(D, 24, E, seed=1)), RANK))
    assert lora_parameters(model).keys() == {
        f"1.{at}.{factor}"
        for at in ("gate.lora.default", *(f"experts.lora.default.{n}" for n in ("up", "gate", "down")))
        for factor in "ab"
    }
    torch.save(lora_parameters(model), tmp_path / "adapters.pt")
    torch.manual_seed(0)
    other = add_lora(nn.Sequential(nn.Linear(D, D), MoE(D, 24, E, seed=1)), RANK)
    x = tokens(dtype=torch.float32)
    assert not torch.equal(other(x), model(x))
    missing = other.load_state_dict(torch.load(tmp_path / "adapters.pt"), strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(other(x), model(x))


def test_what_is_trained_and_where_it_starts():
    model = add_lora(nn.Sequential(nn.Linear(D, D), layer(), layer(gate="hash"), layer()), RANK, router=False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == lora_parameters(model).keys()
    assert not any("gate.lora" in name for name in lora_parameters(model))
    first, again = model[1].experts.lora["default"], model[3].experts.lora["default"]
    assert torch.equal(first["up"].a, again["up"].a), "by the seed of the experts"
    assert not torch.equal(first["up"].a[0], first["up"].a[1])
    assert not torch.equal(first["up"].a, first["gate"].a)
    assert 0 < first["down"].a.abs().max() <= 24**-0.5
    assert not any(adapter.b.any() for adapter in first.values())
    with torch.device("meta"):
        empty = add_lora(MoE(D, 24, E, seed=model[1].experts.seed), RANK)
    for p in empty.to_empty(device="cpu").parameters():
        p.data.fill_(7)  # whatever was there
    empty.experts.reset_parameters()
    empty.gate.reset_parameters()
    assert close(empty.experts.lora["default"]["up"].a, first["up"].a, 1e-6)
    assert not any(p.any() for name, p in lora_parameters(empty).items() if name.endswith(".b"))


def test_what_does_not_go():
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        add_lora(layer(), 0)
    with pytest.raises(ValueError, match="has no MoE layer"):
        add_lora(nn.Linear(2, 2), RANK)
    with pytest.raises(ValueError, match="already"):
        add_lora(add_lora(layer(), RANK), RANK)
    with pytest.raises(ValueError, match="its factory builds"):
        add_lora(layer(experts=lambda: nn.Linear(D, D)), RANK)
    with pytest.raises(ValueError, match="call add_lora first"):
        merge_lora(layer())
    moe = layer()
    moe.experts.kernel = "triton"
    with pytest.raises(ValueError, match='"triton", which has no adapters'):
        add_lora(moe, RANK)
    moe.experts.kernel = "torch"
    add_lora(moe, RANK)
    with pytest.raises(ValueError, match="merge_lora"):
        moe.experts.kernel = "triton"
    with pytest.raises(ValueError, match="etp=1"):
        moe.experts.split_axes()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_experts_of_a_bridge(family):
    pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
    from hf_families import tiny
    from turnout.models.hf import replace_moe, restore_moe

    model, ids = tiny(family).eval(), torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    before = model(input_ids=ids).logits
    add_lora(replace_moe(model), RANK)
    assert close(model(input_ids=ids).logits, before, 1e-6)
    drawn = [p for name, p in lora_parameters(model).items() if name.endswith(".a")]
    assert not any(torch.equal(a, b) for a, b in combinations(drawn, 2)), "others in each layer"
    after = trained(model)(input_ids=ids).logits
    assert not close(after, before, 1e-2)
    after.square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == lora_parameters(model).keys()
    with pytest.raises(ValueError, match="merge_lora"):
        restore_moe(model)
    restore_moe(merge_lora(model))
    assert close(model(input_ids=ids).logits, after, 1e-4)
