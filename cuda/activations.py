# type: ignore (the language of Triton, which looks like Python)
"""Activations for the Triton kernels: (up, gate) -> the hidden value, and its derivatives by up and by gate.

Each function has the name of its activation in `moe/experts/activation.py`. Without a gate projection, both arguments
are up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(up, gate):
    """x Phi(x), with the cumulative normal distribution Phi."""
    below = 0.5 * (1 + tl.erf(up * 0.7071067811865476))
    return up * below, below + up * tl.exp(-0.5 * up * up) * 0.3989422804014327, gate


@triton.jit
def gelu_tanh(up, gate):
    """x (1 + tanh(...)) / 2, the tanh approximation of gelu."""
    square = up * up
    below = tl.sigmoid(up * (1.5957691216057308 + 0.07135481627260025 * square))  # sigmoid(2 z) = (1 + tanh(z)) / 2
    return up * below, below + up * below * (1 - below) * (1.5957691216057308 + 0.21406444881780076 * square), gate


@triton.jit
def relu(up, gate):
    """max(x, 0)."""
    return tl.where(up <= 0, 0.0, up), tl.where(up <= 0, 0.0, 1.0), gate  # NaN stays NaN, as in torch


@triton.jit
def relu2(up, gate):
    """max(x, 0) squared."""
    positive = tl.where(up <= 0, 0.0, up)
    return positive * positive, 2 * positive, gate


@triton.jit
def swiglu(up, gate):
    """silu(gate) up."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, silu, up * (sigmoid + silu * (1 - sigmoid))


@triton.jit
def geglu(up, gate):
    """gelu(gate) up."""
    value, slope, _ = gelu(gate, gate)
    return value * up, value, up * slope


@triton.jit
def geglu_tanh(up, gate):
    """gelu_tanh(gate) up."""
    value, slope, _ = gelu_tanh(gate, gate)
    return value * up, value, up * slope


@triton.jit
def reglu(up, gate):
    """relu(gate) up."""
    value, slope, _ = relu(gate, gate)
    return value * up, value, up * slope


@triton.jit
def clamped_swiglu(up, gate):
    """g sigmoid(1.702 g) (u + 1), with g = min(gate, 7) and u = up clamped to [-7, 7]."""
    clamped = tl.where(gate > 7.0, 7.0, gate)
    factor = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1
    sigmoid = tl.sigmoid(1.702 * clamped)
    value = clamped * sigmoid
    slope = tl.where(gate <= 7.0, sigmoid * (1 + 1.702 * clamped * (1 - sigmoid)), 0.0)
    return value * factor, tl.where(tl.abs(up) <= 7.0, value, 0.0), factor * slope
