"""Padding has no part in what every token visits: shared, residual and free experts, modules of a user's own."""

import copy

import pytest
import torch
from reference import close
from torch import nn
from turnout.moe import Balance, Capacity, MoE, Residual, aux_loss

D, H, E, NAN = 6, 5, 4, float("nan")


class Norm(nn.Module):
    """A shared module with parameters that every token reaches, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x):
        return self.norm(self.inner(x).relu())


LAYERS = {
    "routed": {},
    "shared": {"shared": 1, "bias": True},
    "shared module": {"shared": Norm()},
    "shared by a factory": {"shared": 2, "experts": lambda: nn.Linear(D, D)},
    "residual": {"shared": Residual(1), "bias": True},
    "free": {"free": ["identity", "constant", "null"]},
    "all": {"shared": Residual(1), "free": ["constant"], "capacity": 0.8},
    "input weighted": {"shared": 1, "weight_on": "input"},
    "padded": {"shared": 1, "capacity": Capacity(1.0, pad=True)},
}


def built(options):
    torch.manual_seed(0)
    options = copy.deepcopy(options)
    weight_on = options.pop("weight_on", "output")
    layer = MoE(D, H, E, seed=1, balance=Balance(z_loss=0.1), **options).double()
    layer.experts.weight_on = weight_on
    return layer


def batch():
    x = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.arange(7) < torch.tensor([7, 4, 0])[:, None]


def step(layer, forward, x, mask, everywhere=False):
    """Output and every gradient; of a loss over the tokens alone, or over padding, too."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x, mask)
    (y if everywhere else y[mask]).sin().sum().add(aux_loss(layer)).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("bad", [NAN, float("inf"), 1e300])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_whatever_stands_in_padding_reaches_nothing(options, bad):
    layer, (x, mask) = built(options), batch()
    clean = step(layer, layer, x, mask)
    poisoned = step(layer, layer, torch.where(mask.unsqueeze(-1), x, bad), mask, everywhere=True)
    for name, expected in clean.items():
        assert poisoned[name].isfinite().all(), name
        assert torch.equal(poisoned[name], expected), name
    assert not poisoned["y"][~mask].any()
    assert not poisoned["x"][~mask].any()
    assert poisoned["x"][mask].any()


@pytest.mark.parametrize("name", [name for name, options in LAYERS.items() if "capacity" not in options])
def test_the_tokens_get_what_they_get_without_padding(name):
    layer, (x, mask) = built(LAYERS[name]), batch()
    padded, alone = step(layer, layer, x, mask), step(layer, lambda x, _: layer(x[mask]), x, mask[mask])
    for name, expected in alone.items():
        assert close(padded[name][mask] if name == "y" else padded[name], expected, 1e-11), name


@pytest.mark.parametrize("options", [LAYERS["shared"], LAYERS["all"]], ids=["shared", "all"])
def test_compiled(options):
    torch._dynamo.reset()
    layer, (x, mask) = built(options), batch()
    x = torch.where(mask.unsqueeze(-1), x, NAN)
    compiled = step(layer, torch.compile(layer, backend="aot_eager", fullgraph=True), x, mask)
    for name, expected in step(layer, layer, x, mask).items():
        assert close(compiled[name], expected, 1e-11), name


def test_in_half_precision_the_dtype_stays():
    layer, (x, mask) = built(LAYERS["residual"]).bfloat16(), batch()
    y = layer(torch.where(mask.unsqueeze(-1), x, NAN).bfloat16(), mask)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
