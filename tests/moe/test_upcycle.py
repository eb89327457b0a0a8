"""Upcycling: a dense model as a mixture of experts computes the same at first, and then learns."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from reference import close
from torch import nn
from turnout.models import GPT, GPTConfig, next_token_loss
from turnout.moe import MoE, aux_loss
from turnout.moe.experts.shared import FeedForward
from turnout.moe.gates import SigmoidGate, TopKGate
from turnout.moe.upcycling import upcycle

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def layer(hidden=24, num_experts=8, top_k=4, dim=16, weight_on="output", **options) -> MoE:
    torch.manual_seed(1)
    moe = MoE(dim, hidden, num_experts, top_k, **options).double()
    moe.experts.weight_on = weight_on
    return moe


def block(activation="swiglu", bias=False) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(16, 48, activation, bias).double()


@pytest.mark.parametrize("hidden", [48, 24])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", True), ("relu", False)])
def test_a_block_is_the_same_function(activation, bias, hidden):
    dense = block(activation, bias)
    moe = upcycle(layer(hidden, experts=activation, bias=bias), dense)
    assert close(moe(X), dense(X), 1e-12)
    assert not close(upcycle(moe, dense, noise=1e-3)(X), dense(X), 1e-6), "the tolerance tells a small change"


@pytest.mark.parametrize(
    "gate",
    [
        TopKGate(16, 8, 1, normalize=True),
        TopKGate(16, 8, 4, order="choose_first"),
        TopKGate(16, 8, 4, jitter=0.1),
        SigmoidGate(16, 8, 4, scale=2.5),
        "noisy_topk",
        "cosine",
        "hash",
        "random",
    ],
    ids=str,
)
def test_any_gate_whose_weights_add_up_to_a_constant(gate):
    dense, k = block(), None if isinstance(gate, nn.Module) else {"hash": 1, "random": 1}.get(gate, 2)
    moe = upcycle(layer(48, top_k=k, gate=gate), dense)
    assert close(moe(X, ids=torch.arange(len(X))), dense(X), 1e-12)


def test_shards_of_a_copy_have_one_router_bias():
    dense, gate = block(), TopKGate(16, 8, 4, bias=True)
    torch.nn.init.normal_(gate.bias, generator=torch.Generator().manual_seed(2))
    moe = upcycle(layer(24, top_k=None, gate=gate), dense)
    assert close(moe(X), dense(X), 1e-12)
    assert gate.bias.unique().numel() == 4


@pytest.mark.parametrize(
    ("options", "hidden", "says"),
    [
        ({"gate": "switch", "top_k": 1}, 48, "add up to"),
        ({"gate": "expert_choice"}, 48, "add up to"),
        ({"gate": "gshard", "top_k": 2}, 48, "add up to"),
        ({"gate": "hierarchical", "top_k": 2}, 48, "add up to"),
        ({"gate": "noisy_topk"}, 24, "add up to"),  # noise tells the shards of a copy apart
        ({"gate": "hash", "top_k": 4}, 24, "add up to"),
        ({"top_k": 3}, 24, "top_k=3 must be multiples of 2"),
        ({"num_experts": 7}, 24, "num_experts=7"),
        ({"shared": 1}, 48, "layer.* has shared"),
        ({"free": ["null"]}, 48, "has free"),
        ({"weight_on": "input"}, 48, "weight_on"),
        ({"experts": "gelu"}, 48, "same kind"),
        ({}, 36, "divisor"),
        ({"dim": 8}, 48, "dim must be equal"),
    ],
)
def test_what_cannot_be_equal_is_refused_and_nothing_is_changed(options, hidden, says):
    moe = layer(hidden, **options)
    before = {name: t.clone() for name, t in moe.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        upcycle(moe, block())
    assert all(torch.equal(t, before[name]) for name, t in moe.state_dict().items())


def test_a_scale_is_taken_for_softmax_scores():
    dense, moe = block(), layer(48, num_experts=4, top_k=1, gate="switch").eval()
    upcycle(moe, dense, scale=4.0)  # E / k
    with torch.no_grad():
        moe.gate.weight.zero_()
    assert close(moe(X), dense(X), 1e-12), "scores of an untrained router are 1 / E"


@pytest.mark.parametrize(("act", "kind"), [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu")])
def test_a_sequential_and_tensors_by_name(act, kind):
    dense = nn.Sequential(nn.Linear(16, 48), act, nn.Linear(48, 16)).double()
    assert close(upcycle(layer(experts=kind, bias=True), dense)(X), dense(X), 1e-12)
    tensors = {"w_up": dense[0].weight.T, "b_up": dense[0].bias, "w_down": dense[2].weight.T, "b_down": dense[2].bias}
    assert close(upcycle(layer(experts=kind, bias=True), tensors)(X), dense(X), 1e-12)
    with pytest.raises(ValueError, match="another activation"):
        upcycle(
            layer(experts=kind, bias=True),
            nn.Sequential(dense[0], nn.GELU("none" if kind == "gelu_tanh" else "tanh"), dense[2]),
        )


def test_experts_of_any_kind():
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 16)).double()

    dense = network()
    assert close(upcycle(layer(experts=network), dense)(X), dense(X), 1e-12)
    with pytest.raises(ValueError, match="another kind"):
        upcycle(layer(experts=network), block())
    with pytest.raises(ValueError, match="cannot be scaled"):
        upcycle(layer(experts=network, top_k=None, gate=SigmoidGate(16, 8, 4, scale=2.5)), dense)


def test_noise_and_reset():
    dense = block()
    kept = upcycle(layer(48), dense).experts
    drawn = upcycle(layer(48), dense, reset=0.5).experts
    same = drawn.w_up == kept.w_up
    assert torch.equal(same.sum((1, 2)), torch.full((8,), 16 * 24)), "half of the units"
    assert torch.equal(same.all(1), (drawn.w_gate == kept.w_gate).all(1)), "the same ones in each matrix"
    assert torch.equal(same.all(1), (drawn.w_down == kept.w_down).all(2))
    assert not torch.equal(same[0], same[1]), "others in each expert"
    assert 0.8 < drawn.w_up[~same].std() / dense.up.weight.std() < 1.2
    noisy = upcycle(layer(48), dense, noise=0.1).experts
    assert torch.equal(noisy.w_up, upcycle(layer(48), dense, noise=0.1).experts.w_up), "by the layer's seed"
    change = noisy.w_up - kept.w_up
    assert 0.09 < change.std() / dense.up.weight.std() < 0.11
    assert not torch.equal(change[0], change[1])


CONFIG = GPTConfig(vocab=32, layers=2, dim=32, hidden=32, top_k=2, num_experts=8, moe_every=1, seq_len=32)


def gpts(**options) -> tuple[GPT, GPT]:
    torch.manual_seed(0)
    dense = GPT(replace(CONFIG, moe_every=0)).double()
    torch.manual_seed(1)
    return dense, GPT(replace(CONFIG, **options)).double()


@pytest.mark.parametrize("options", [{}, {"hidden": 64}, {"moe_every": 2}], ids=str)
def test_a_gpt_has_the_loss_of_the_dense_one(options):
    dense, model = gpts(**options)
    tokens = torch.randint(32, (4, 33), generator=torch.Generator().manual_seed(2))
    expected = next_token_loss(dense(tokens[:, :-1]), tokens[:, 1:])
    assert not close(next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]), expected, 1e-4)
    upcycle(model, dense)
    assert close(model(tokens[:, :-1]), dense(tokens[:, :-1]), 1e-12)


def test_it_then_trains_and_experts_part():
    _, model = gpts()
    dense, _ = gpts()
    upcycle(model, dense)
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    assert all(torch.equal(m.experts.w_up[0], m.experts.w_up[2]) for m in layers), "shards 0 of two copies"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(32, (4, 33), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(10):
        loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        (loss + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    for m in layers:
        assert (m.experts.w_up[0] - m.experts.w_up[2]).abs().max() > 1e-3
        assert (m.gate.weight[0] - m.gate.weight[1]).abs().max() > 1e-3, "the rows of a copy are free to part as well"


def test_models_that_do_not_fit():
    dense, model = gpts()
    with pytest.raises(ValueError, match="no MoE layer"):
        upcycle(dense, dense)
    with pytest.raises(ValueError, match=re.escape("is (32, 32), but (24, 32) in the dense model")):
        upcycle(model, GPT(replace(CONFIG, moe_every=0, vocab=24)))
    with pytest.raises(ValueError, match=r"no module blocks\.1\.feed_forward"):
        upcycle(model, GPT(replace(CONFIG, moe_every=0, layers=1)))
    with pytest.raises(ValueError, match="meta device"):
        upcycle(model.to("meta"), dense)


@pytest.mark.parametrize(("family", "options"), [("Llama", {}), ("Qwen3", {"head_dim": 8}), ("Mistral", {})])
def test_a_dense_model_of_hugging_face(family, options):
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
    from turnout.models.hf import replace_dense

    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3, **options}
        return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).double()

    model, ids = build(), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=ids, labels=ids)
    assert replace_dense(model, num_experts=8, top_k=4, every=2, granularity=2) is model
    assert [isinstance(block.mlp, MoE) for block in model.model.layers] == [False, True, False, True]
    after = model(input_ids=ids, labels=ids)
    assert close(after.logits, before.logits, 1e-12)
    assert close(after.loss, before.loss, 1e-6)  # transformers takes it in float32
    after.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []

    with torch.device("meta"):
        late = replace_dense(build(), num_experts=8, top_k=4, every=2, granularity=2)
    late.to_empty(device="cpu")
    for layer in late.modules():
        if isinstance(layer, MoE):
            layer.gate.reset_parameters()
    upcycle(late, build())
    assert close(late(input_ids=ids).logits, before.logits, 1e-12)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({"hidden_act": "tanh"}, {}, "gated by"),
        ({}, {"every": 3}, "has 2 dense blocks"),
        ({}, {"every": 0}, "positive"),
        ({}, {"granularity": 5}, "48 wide"),
        ({}, {"top_k": 1}, "add up to"),
    ],
    ids=str,
)
def test_a_dense_model_of_hugging_face_that_cannot_be_replaced(config, options, says):
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
    from turnout.models.hf import replace_dense

    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=64, **sizes, **config))
    with pytest.raises(ValueError, match=says):
        replace_dense(model, **{"num_experts": 4, **options})
    assert not any(isinstance(m, MoE) for m in model.modules())


class Block(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.act_fn = factor, nn.SiLU()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 48), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor


def test_blocks_with_more_in_them_and_gates_of_ones_own():
    from turnout.models.hf import replace_dense

    with pytest.raises(ValueError, match="computes more than"):
        replace_dense(nn.Sequential(Block(), Block(factor=1.25)), 4)  # as in Falcon-H1
    dense = nn.Sequential(Block(), Block()).to(torch.bfloat16).eval()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    model = replace_dense(copy.deepcopy(dense), 4, gate=TopKGate(16, 4, 2))
    assert close(model(x), dense(x), 1e-2)
    first, second = (layer.gate.weight for layer in model)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
