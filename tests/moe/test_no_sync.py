"""On one rank the host never waits for the device: shown on the meta device, where there is nothing to wait for.

A tensor there has no values, so that whatever asks for one raises: `.item()`, `bool`, `nonzero`, a boolean index, a
copy. With a GPU the same is asked of CUDA itself.
"""

from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from turnout.dispatch import Plan
from turnout.dispatch import reorder as ops
from turnout.dispatch.agreement import Note
from turnout.moe import Balance, Capacity, MoE, Residual, aux_loss
from turnout.moe.gates import GATES

LAYERS = {
    "ragged": {},
    "capped": {"capacity": 1.1},
    "padded": {"capacity": Capacity(1.25, pad=True)},
    "padded, gelu, by position": {"capacity": Capacity(0.7, drop="position", pad=True), "experts": "gelu"},
    "shared, bias, z-loss": {"shared": 1, "bias": True, "balance": Balance(z_loss=1e-3)},
    "sequence": {"balance": Balance(over="sequence", choices=1)},
    "by priority": {"capacity": Capacity(0.1, minimum=6, drop="priority")},
    "two balances": {"balance": Balance(over={"global": 1.0, "sequence": 0.1})},
    "free experts": {"free": ["null", "identity", "constant"], "capacity": 1.1},
    "weight on the input": {"weight_on": "input"},
    "residual": {"shared": Residual(1)},
    **{f"gate {name}": {"gate": name} for name in GATES if name != "base"},  # that one the host computes, and says so
}
KERNELS = ["torch", "triton"]


def step(device: str, kernel: str = "torch", masked: bool = False, weight_on: str = "output", **options: Any) -> None:
    """Forward, losses, statistics, backward."""
    layer = MoE(32, 64, 8, **options).to(device, torch.bfloat16)
    layer.experts.kernel, layer.experts.weight_on = kernel, weight_on
    x = torch.randn(2, 24, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(2, 24, dtype=torch.int64, device=device)
    mask = torch.ones(2, 24, dtype=torch.bool, device=device) if masked else None
    if device == "cuda":
        with torch.no_grad():
            layer(x, mask=mask, ids=ids)  # a gate's first answer is read
    with waiting_forbidden(device):
        y = layer(x, mask=mask, ids=ids)
        assert layer.stats.tokens_per_expert.device.type == device
        (y.float().square().mean() + aux_loss(layer)).backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.experts.parameters())


@contextmanager
def waiting_forbidden(device: str):
    """Copies from the host wait as well: `torch.tensor` on a device is one that meta would not notice."""
    made = torch.tensor

    def on_host(data, *, device=None, **options):
        if device is not None:
            raise RuntimeError("torch.tensor copies from the host and waits")
        return made(data, **options)

    with mock.patch.object(torch, "tensor", on_host):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["as operators", "written out"])
def operators(request, monkeypatch):
    """On meta only the shapes of an operator's result are made; written out, what it does is run as well."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    if request.param == "written out":
        for name in ("_encode", "_decode"):
            monkeypatch.setattr(ops, name, getattr(ops, name)._init_fn)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_never_waits(name, masked, operators):
    step("meta", masked=masked, **LAYERS[name])


@pytest.mark.parametrize("name", ["ragged", "capped", "padded", "padded, gelu, by position", "shared, bias, z-loss"])
def test_the_layer_never_waits_with_triton(name, operators):
    step("meta", "triton", masked=True, **LAYERS[name])


def test_a_note_for_the_other_ranks_is_made_without_waiting():
    x, weight = torch.zeros(4, 8, device="meta"), torch.zeros(4, 2, device="meta")
    with waiting_forbidden("meta"):
        assert Note.tensor(x, weight, Plan.of(weight.long(), 4)).device.type == "meta"


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.isnan().any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.unique(),
        lambda x: torch.ones(3, device=x.device).repeat_interleave(x.long()),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
)
def test_waiting_is_seen(waits):
    x = torch.ones(3, device="meta")
    with waiting_forbidden("meta"), pytest.raises((RuntimeError, NotImplementedError)):
        waits(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_never_waits_for_a_gpu(name, kernel):
    if kernel == "torch" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped_mm itself waits there")
    step("cuda", kernel, masked=True, **LAYERS[name])
