"""Models made on the meta device, given memory and loaded: nothing depends on what that memory held."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD
from transformers import PretrainedConfig, PreTrainedModel
from turnout.models import BERT, GPT, T5, BERTConfig, GPTConfig, T5Config
from turnout.moe import MoE, aux_loss, update_expert_biases
from turnout.moe.gates import GATES, SigmoidGate

SIZES = {"dim": 16, "hidden": 8, "layers": 2, "heads": 2, "num_experts": 4, "seq_len": 12}


class Placed(nn.Module):
    """An expert with a table that is in no state dict, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("table", torch.arange(16) / 16, persistent=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        return self.linear(x) * self.table + self.seen


MODELS = {
    "gpt": lambda: GPT(GPTConfig(**SIZES)),
    "gpt, modules": lambda: GPT(GPTConfig(**SIZES, moe={"experts": Placed})),
    "bert": lambda: BERT(BERTConfig(**SIZES, segments=2)),
    "t5": lambda: T5(T5Config(**SIZES)),
    "sigmoid": lambda: GPT(GPTConfig(**SIZES, moe={"gate": SigmoidGate(16, 4)})),
    "free and shared": lambda: GPT(GPTConfig(**SIZES, moe={"free": ["constant"], "shared": 1})),
}


def ids():
    return torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))


def outputs(model):
    """Of two steps of training, with the biases of gates balanced in between, and of an evaluation."""
    model.train()
    model.zero_grad()
    optimizer, seen = SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        torch.manual_seed(0)
        y = model(ids(), ids()) if isinstance(model, T5) else model(ids())
        seen.append(y.detach().clone())
        (y.square().mean() + aux_loss(model)).backward()
        optimizer.step()
        update_expert_biases(model)
    model.eval()
    with torch.no_grad():
        return [*seen, model(ids(), ids()) if isinstance(model, T5) else model(ids())]


def poison(model):
    """What an allocator may leave behind."""
    for t in [*model.parameters(), *model.buffers()]:
        t.data.fill_(3)


@pytest.mark.parametrize("how", ["to_empty", "assign", "both"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_loaded_from_the_meta_device_it_computes_what_the_source_does(make, how):
    torch.manual_seed(0)
    source = make()
    with torch.device("meta"):
        other = make()
    if how != "assign":
        other = other.to_empty(device="cpu")
        poison(other)
    state = copy.deepcopy(source.state_dict())
    other.load_state_dict(state, assign=how != "to_empty")
    assert not any(t.is_meta for t in [*other.parameters(), *other.buffers()])
    for ours, expected in zip(outputs(other), outputs(source), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_made_on_the_meta_device(gate):
    torch.manual_seed(0)
    source = MoE(16, 8, 4, gate=gate, seed=0)
    with torch.device("meta"):
        other = MoE(16, 8, 4, gate=gate, seed=0)
    other = other.to_empty(device="cpu")
    poison(other)
    other.load_state_dict(source.state_dict())
    x = torch.randn(9, 16)
    for _ in range(2):
        results = []
        for layer in (source, other):
            torch.manual_seed(1)
            y = layer(x, ids=torch.arange(9))
            (y.sum() + aux_loss(layer)).backward()
            update_expert_biases(layer)
            results.append(y)
        assert torch.equal(*results)


def test_tables_of_a_live_layer_stay_right_when_a_state_is_loaded():
    layer, other = (MoE(16, 8, 4, experts=Placed, seed=seed) for seed in (0, 1))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(9, 16)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), other(x))
    assert torch.equal(layer.experts.module.table[2], torch.arange(16) / 16)


def test_rotary_tables_keep_their_precision_in_half_precision():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | {"seq_len": 512}))
    assert not list(model.buffers())
    half = copy.deepcopy(model).bfloat16()
    tables = []
    half.blocks[0].register_forward_pre_hook(lambda _, args: tables.append(args[1].cos))
    half(ids())
    assert tables[0].dtype == torch.float32


class Config(PretrainedConfig):
    model_type = "turnout-test"


class Family(PreTrainedModel):
    """A model of transformers that is built of ours."""

    config_class = Config

    def __init__(self, config) -> None:
        super().__init__(config)
        self.inner = GPT(GPTConfig(**SIZES, moe={"gate": SigmoidGate(16, 4)}))
        self.post_init()

    def _init_weights(self, module) -> None:
        pass

    def forward(self, input_ids):
        return self.inner(input_ids)


def test_from_pretrained(tmp_path):
    torch.manual_seed(0)
    source = Family(Config())
    outputs(source)  # trained for a while: its gates have biases
    source.save_pretrained(tmp_path)
    other = Family.from_pretrained(tmp_path)
    for ours, expected in zip(outputs(other), outputs(source), strict=True):
        assert torch.equal(ours, expected)
