"""Recomputation changes what is kept, and nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from ranks import run
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import collectives
from turnout.models import GPT, GPTConfig, recompute
from turnout.moe import aux_loss, parallelize

CONFIG = GPTConfig(vocab=32, dim=16, layers=5, heads=2, hidden=24, seq_len=16, num_experts=4)
WAYS = [("full", 1), ("full", 2), ("full", "sqrt"), ("full", 9), ("selective", 1)]


def build(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randint(32, (batch, 16), generator=torch.Generator().manual_seed(1))


@contextmanager
def kept():
    """Elements that autograd keeps from the forward, each tensor counted once."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def step(model: GPT) -> tuple[list[torch.Tensor], int]:
    """The loss and all gradients, and the bytes that were kept beside the parameters."""
    model.zero_grad()
    with kept() as sizes:
        loss = model(tokens()).logsumexp(-1).mean() + aux_loss(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())], sum(
        size for place, size in sizes.items() if place not in own
    )


@pytest.mark.parametrize(("what", "every"), WAYS)
def test_the_same_gradients_to_the_bit(what, every):
    expected, most = step(build())
    model = recompute(build(), what, every)
    for _ in range(2):
        actual, fewer = step(model)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert fewer < most
    _, again = step(recompute(model, "none"))
    assert again == most


def test_segments_keep_their_inputs_alone():
    width = tokens().numel() * CONFIG.dim * 4
    rest = step(recompute(build(), "full", 9))[1]  # one segment: its input, and what follows the blocks
    for every, segments in ((1, 5), (2, 3), ("sqrt", 3), (3, 2)):
        assert step(recompute(build(), "full", every))[1] - rest == (segments - 1) * width


def test_selective_lies_between():
    full, selective, none = (step(recompute(build(), what))[1] for what in ("full", "selective", "none"))
    assert full < selective < none


def exchanges(what: str) -> int:
    """All-to-alls of rows in a step of two ranks."""
    mesh, number = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), 0
    start = collectives._Exchange.start

    def counted(leg, x):
        nonlocal number
        number += x.ndim == 2 and x.is_floating_point()
        return start(leg, x)

    collectives._Exchange.start = counted  # in this process alone
    model = recompute(parallelize(build(replace(CONFIG, layers=4)), mesh), what)
    model(tokens()).logsumexp(-1).mean().backward()
    return number


@pytest.mark.parametrize(("what", "times"), [("none", 4), ("selective", 4), ("full", 6)])
def test_rows_travel_again_with_full_alone(what, times):
    assert run(2, exchanges, what) == [2 * times] * 2  # two layers; there and home, forward and backward


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("half",), "recompute must be"),
        (("full", 0), "every must be a positive number"),
        (("full", "cube"), "every must be a positive number"),
        (("selective", 2), 'every=2 needs recompute "full"'),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        recompute(build(), *arguments)


def test_without_gradients_nothing_is_kept_or_computed_twice():
    model = recompute(build(), "full").eval()
    with torch.no_grad():
        assert torch.equal(model(tokens()), build().eval()(tokens()))
