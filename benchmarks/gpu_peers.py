"""Adapters for MoE layers of other libraries on one GPU. Each is imported only if it is installed.

An adapter takes the router's weight [E, D], H, k and the dtype. It returns the layer's parameters and its forward,
x [T, D] -> y [T, D]. The layer has our router's weight and weights of its own for experts. An adapter raises if the
interface of its library has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Peer = tuple[list[Tensor], Callable[[Tensor], Tensor]]


def installed(name: str) -> bool:
    return find_spec(PEERS[name][0]) is not None


def peer(name: str, router: Tensor, hidden: int, k: int, dtype: torch.dtype) -> Peer:
    """Build the layer of library `name` around the router's weight [E, D]. Its errors are raised as they are."""
    with torch.device(router.device):
        return PEERS[name][1](router, hidden, k, dtype)


def scaled(module: nn.Module) -> list[Tensor]:
    """Parameters of a module, drawn again with one scale for all libraries, since time depends on the values."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.02)
    return list(module.parameters())


def sonicmoe(router: Tensor, hidden: int, k: int, dtype: torch.dtype) -> Peer:
    from sonicmoe import KernelBackendMoE, MoE  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    E, D = router.shape
    layer = MoE(
        num_experts=E,
        num_experts_per_tok=k,
        hidden_size=D,
        intermediate_size=hidden,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to(router.device, dtype)
    parameters = scaled(layer)
    layer.router.weight.data.copy_(router)
    return parameters, lambda x: layer(x, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0]


def scattermoe(router: Tensor, hidden: int, k: int, dtype: torch.dtype) -> Peer:
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    E, D = router.shape
    experts = GLUMLP(input_size=D, hidden_size=hidden, num_experts=E, top_k=k, activation=nn.SiLU())
    experts = experts.to(router.device, dtype)
    gate = nn.Parameter(router.detach().clone().to(dtype))

    def forward(x: Tensor) -> Tensor:  # ScatterMoE has no router
        weight, expert = F.linear(x, gate).float().softmax(-1).topk(k)
        return experts(x, (weight / weight.sum(-1, keepdim=True)).to(dtype), expert)

    return [*scaled(experts), gate], forward


def liger(router: Tensor, hidden: int, k: int, dtype: torch.dtype) -> Peer:
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    E, D = router.shape
    gate = nn.Parameter(router.detach().clone().to(dtype))
    up, down = (nn.Parameter(torch.empty(E, *shape, dtype=dtype)) for shape in ((2 * hidden, D), (D, hidden)))
    with torch.no_grad():
        for p in (up, down):
            p.normal_(std=0.02)

    def forward(x: Tensor) -> Tensor:  # Liger has no router
        weight, expert = F.linear(x, gate).float().softmax(-1).topk(k)
        weight = (weight / weight.sum(-1, keepdim=True)).to(dtype)
        return LigerFusedMoEFunction.apply(x, up, down, expert, weight)

    return [up, down, gate], forward


def megablocks(router: Tensor, hidden: int, k: int, dtype: torch.dtype) -> Peer:
    from megablocks.layers.arguments import Arguments  # pyright: ignore[reportMissingImports]
    from megablocks.layers.dmoe import dMoE  # pyright: ignore[reportMissingImports]
    from megablocks.layers.moe import clear_load_balancing_loss  # pyright: ignore[reportMissingImports]

    E, D = router.shape
    options: dict[str, Any] = {
        "hidden_size": D,
        "ffn_hidden_size": hidden,
        "moe_num_experts": E,
        "moe_top_k": k,
        "moe_normalize_expert_weights": 1,
        "mlp_type": "glu",
        "mlp_impl": "grouped" if find_spec("grouped_gemm") else "sparse",
        "activation_fn": F.silu,
        "bias": False,
        "return_bias": False,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "device": router.device,
    }
    layer = dMoE(Arguments(**options)).to(router.device, dtype)
    parameters = scaled(layer)
    layer.router.layer.weight.data.copy_(router)

    def forward(x: Tensor) -> Tensor:
        y = layer(x.unsqueeze(1))
        clear_load_balancing_loss()  # it keeps a loss of each forward
        return (y[0] if isinstance(y, tuple) else y).squeeze(1)

    return parameters, forward


class BatchedSwiGLU(nn.Module):
    """Expert module for Tutel: x [E, C, D] -> [E, C, D]."""

    def __init__(self, model_dim: int, num_experts_per_device: int, sharded_count: int, hidden: int) -> None:
        super().__init__()
        E = num_experts_per_device
        self.up, self.gate = (nn.Parameter(torch.empty(E, model_dim, hidden)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(E, hidden, model_dim))

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        return torch.bmm(F.silu(torch.bmm(x, self.gate)) * torch.bmm(x, self.up), self.down)


def tutel(router: Tensor, hidden: int, k: int, dtype: torch.dtype) -> Peer:
    from tutel import moe  # pyright: ignore[reportMissingImports]

    E, D = router.shape
    layer = moe.moe_layer(
        gate_type={
            "type": "top",
            "k": k,
            "fp32_gate": True,
            "capacity_factor": 0.0,
        },  # 0: dropless, padded to the largest load
        experts={"type": "custom", "module": BatchedSwiGLU, "num_experts_per_device": E, "hidden": hidden},
        model_dim=D,
    ).to(router.device)
    layer.experts.to(dtype)
    parameters = scaled(layer)
    layer.gates[0].wg.weight.data.copy_(router)
    return parameters, layer


PEERS: dict[str, tuple[str, Callable[[Tensor, int, int, torch.dtype], Peer]]] = {
    "SonicMoE": ("sonicmoe", sonicmoe),
    "ScatterMoE": ("scattermoe", scattermoe),
    "Liger": ("liger_kernel", liger),
    "MegaBlocks": ("megablocks", megablocks),
    "Tutel": ("tutel", tutel),
}
