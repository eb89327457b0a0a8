"""A check of Triton's kernels at their first use, because compilers have bugs and a wrong product raises no error."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cuda.tiles import MANY
from ...dispatch.plan import Plan
from ...dispatch.torch_internals import in_backward
from ..routing import can_be_read
from .activation import ACTIVATIONS
from .blocked import Layer
from .triton_path import fused

Result = TypeVar("Result")

log = logging.getLogger(__name__)
# Largest error that passes, as a share of the largest value. Rounding makes a tenth of it, a wrong product 0.1 to 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
TF32 = 2e-2  # the same for float32 products that `torch.backends` lets tensor cores round


class Kind(NamedTuple):
    """Properties of experts that the compiled code depends on.

    Attributes:
        device: where they are.
        dtype: dtype of rows and layers.
        dim: D, width of the model.
        hidden: H, hidden width of an expert.
        activation: name in `ACTIVATIONS`.
        bias: whether layers have biases.
        many: whether an expert has many rows on average, which decides the tile sizes.
        gathers: whether rows are gathered from tokens.
        precision: ``"fp8"``, or None for products in `dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    dim: int
    hidden: int
    activation: str
    bias: bool
    many: bool
    gathers: bool
    precision: str | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dtype = dtype if self.precision is None else f"{self.precision}, {dtype}"
        return f"experts (D={self.dim}, H={self.hidden}, {self.activation}, {dtype}) on {self.device}"


def computes_correctly(
    x: Tensor, activation: str, up: Tensor, bias: bool, rows: int, gathers: bool, precision: str | None = None
) -> bool:
    """Whether `fused` computes experts correctly on this device. If not, a warning says so once.

    The first call for each kind of experts compares one expert on few rows with plain PyTorch, forward and backward. It
    takes some milliseconds and waits for the device. The compiled code is what the layer itself runs, because it
    depends on D and H, but not on the numbers of experts and rows.

    Args:
        x: tokens or rows.
        activation: name in `ACTIVATIONS`.
        up: up projections [L, D, H].
        bias: whether layers have biases.
        rows: number of rows of all experts.
        gathers: whether rows are gathered from tokens.
        precision: as in `Kind`.
    """
    if not torch.compiler.is_compiling() and not can_be_read(x):
        return True  # a CUDA graph is captured after a warm-up, which has checked
    L, D, H = up.shape
    return correct(x.device, x.dtype, D, H, activation, bias, bool(rows // L > MANY), gathers, precision)


@torch.compiler.assume_constant_result
def correct(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    hidden: int,
    activation: str,
    bias: bool,
    many: bool,
    gathers: bool,
    precision: str | None = None,
) -> bool:
    """`computes_correctly` for a `Kind` with these properties."""
    return _checked(Kind(device, dtype, dim, hidden, activation, bias, many, gathers, precision))


def forget() -> None:
    """Check again at the next use. `autotune` calls it when tile sizes have changed."""
    _checked.cache_clear()


def apart(run: Callable[[], Result]) -> Result:
    """Call a function that trains something else amid a forward, in a thread without the hooks and modes of this one.

    Activation checkpointing counts the tensors that a forward saves, and would take others for its own.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


@functools.cache
def _checked(kind: Kind) -> bool:
    try:
        # a backward that waited for one of another thread might wait for ever: they share the device's thread
        errors = differences(kind) if in_backward() else apart(lambda: differences(kind))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        log.warning("Triton's kernels for %s failed, so torch's compute them instead. %s", kind, said)
        return False
    tf32 = kind.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    limit = TF32 if tf32 else TOLERANCE[kind.dtype]
    wrong = ", ".join(f"{name} {error:.2g}" for name, error in errors.items() if not error <= limit)  # or NaN
    if wrong:
        log.warning(
            "Triton's kernels for %s gave wrong numbers, so torch's compute them instead. Errors as a share of the "
            "largest value: %s. Please report this with the versions of torch and Triton.",
            kind,
            wrong,
        )
    return not wrong


def differences(kind: Kind) -> dict[str, float]:
    """Largest error of the output and of each gradient, as a share of its largest value."""
    device, dtype, D, H, activation, bias, many, gathers, precision = kind
    T = 25 if device.type != "cuda" else 240 if many else 60
    number = T * 4 // 5  # rows, in at most two tiles; the other tokens are dropped
    g = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=g, device=device, dtype=torch.float32) * scale
        return drawn.to(dtype).requires_grad_()

    def layer(fan_in: int, fan_out: int) -> Layer:
        return random(1, fan_in, fan_out, scale=fan_in**-0.5), random(1, fan_out) if bias else None

    with torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad():
        names = ["up", "gate"] if ACTIVATIONS[activation].gated else ["up"]
        ups, down = [layer(D, H) for _ in names], layer(H, D)
        x, grad, weight = random(T, D), random(T, D).detach(), torch.rand(T, 1, generator=g, device=device)
        token = torch.arange(T, device=device)
        weight = torch.where(token % 5 == 0, 0, weight.flatten()).unsqueeze(1).requires_grad_()
        plan = Plan.of(torch.where(weight > 0, 0, -1), 1)
        inputs = {"gradient of x": x, "of the router's weight": weight}
        for name, (matrix, b) in zip([*names, "down"], [*ups, down], strict=True):
            inputs |= {f"of w_{name}": matrix} | ({} if b is None else {f"of b_{name}": b})
        how = "triton" if precision is None else f"triton, {precision}"
        if gathers:
            y = fused(x, weight, plan.counts, activation, ups, down, plan, how)
        else:  # then three rows of padding, whose results are undefined
            rows, by_row = (F.pad(t[plan.token[:number]], (0, 0, 0, 3)) for t in (x, weight))
            rows = fused(rows, by_row.squeeze(1), plan.counts, activation, ups, down, how=how)[:number]
            y = torch.zeros_like(x).index_copy(0, plan.token[:number], rows)
        if precision is None:
            hidden = ACTIVATIONS[activation](*(_linear(x, *up) for up in ups)).to(dtype)
            expected = torch.where(weight > 0, _linear(hidden, *down) * weight, 0)
        else:
            expected = fused(x, weight, plan.counts, activation, ups, down, plan, f"torch, {precision}").float()
        pairs = {"output": (y, expected)}
        got = torch.autograd.grad(y, list(inputs.values()), grad)
        true = torch.autograd.grad(expected, list(inputs.values()), grad.float())
        pairs |= dict(zip(inputs, zip(got, true, strict=True), strict=True))
        return {name: _error(*pair) for name, pair in pairs.items()}


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x matrix + bias, rounded once, as kernels do: ReLU has another slope where rounding turns a sign."""
    return (x @ matrix[0] if bias is None else torch.addmm(bias[0], x, matrix[0])).float()


def _error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().float(), expected.detach().float()
    return float((actual - expected).abs().max() / expected.abs().max())
