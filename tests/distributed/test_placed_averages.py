"""An average of the weights follows its experts when `place_experts` moves them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cases import EXPERTS, build, close, tokens, whole
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from turnout.models import EMA, checkpoint
from turnout.moe import parallelize, place_experts, sync_gradients

ORDERS = [None, [2, 0, 7, 5, 1, 3, 4, 6], [7, 6, 5, 4, 3, 2, 1, 0], None, [1, 0, 3, 2, 5, 4, 7, 6]]


def averages(folder, placed: bool) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))

    def moved(model, optimizer, order) -> None:
        place_experts(model, mesh, optimizer, None if order is None else {"1": order, "3": order})

    model = parallelize(build(balance=0.0), mesh)
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-2), EMA(model, 0.9)
    for order in ORDERS:
        if placed:
            moved(model, optimizer, order)
        model(tokens(20).chunk(2)[dist.get_rank()]).square().mean().backward()
        sync_gradients(model, mesh)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    with ema.applied():
        found = {name: whole(t) for name, t in model.state_dict().items()}
    if placed:
        checkpoint.save(folder, [model, ema], optimizer, 1)
        for order in (None, ORDERS[1]):
            other = parallelize(build(balance=0.0), mesh)
            optimizer, ema = torch.optim.AdamW(other.parameters(), lr=1e-2), EMA(other, 0.9)
            moved(other, optimizer, order)
            checkpoint.load_newest(folder, [other, ema], optimizer)
            with ema.applied():
                for name, t in other.state_dict().items():
                    assert torch.equal(whole(t), found[name]), name
    return found


def test_an_average_follows_its_experts_and_is_saved_by_their_ids(tmp_path):
    expected, found = (run(2, averages, tmp_path, placed)[0] for placed in (False, True))
    for name, t in expected.items():
        close(found[name], t, 1e-12, name)
    assert len(expected["1.experts.w_up"]) == EXPERTS
