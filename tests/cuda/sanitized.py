"""Kernels under the address and undefined-behaviour sanitizers: run by test_sanitizers.py, with libasan loaded first.

Each case runs in a fork of its own, whose errors go to a file named after it: a sanitizer stops the process.
"""

import os
import sys
from pathlib import Path

import runner
import torch
from runner import RANDOM, SANITIZERS, Runner, installed
from turnout.cuda import launch
from turnout.dispatch import Plan, decode, encode
from turnout.moe.gates.router import route

PLANTED = Path(__file__).with_name("planted.cu")


def lay_out_and_route():
    """Plans of one block and of several, ragged and padded, some experts too full; the router's ways and back."""
    for T, k, E in [(0, 2, 3), (7, 3, 5), (600, 4, 300)]:
        expert = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :k].contiguous()
        expert[::3, 1] = -1
        for capacity in (None, 1, 2 * T):
            Plan.of(expert, E, capacity)
    for E, k in [(2, 1), (33, 4)]:
        for score, normalize, bias in [("softmax", True, None), ("sigmoid", False, torch.ones(E))]:
            logits = torch.randn(5, E)
            logits[0, E - 1] = float("nan")
            logits[1:3] = -200.0
            _, weight, scores = route(logits.requires_grad_(), k, score, normalize, bias)
            torch.autograd.grad((weight.sum() + scores.sum()), logits, retain_graph=True)
            torch.autograd.grad(weight.sum(), logits)


def sound():
    """The operators with their gradients, at widths that take each kind of access."""
    lay_out_and_route()
    expert = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).argsort(1)
    expert[0, 1] = expert[2] = -1
    for k, D, dtype in [(2, 8, torch.bfloat16), (2, 7, torch.float16), (3, 4, torch.float32), (3, 5, torch.float32)]:
        ragged = Plan.of(expert[:, :k].contiguous(), 4)
        for plan in (ragged, ragged.padded(5)):
            x = torch.ones(5, D, dtype=dtype, requires_grad=True)
            weight = torch.ones(5, k, requires_grad=True)
            (decode(encode(x, plan), plan) + decode(encode(x, plan), plan, weight)).sum().backward()


def past_the_end():
    """The check of the bounds is missing."""
    launch.launch("fill<false>", (1,), (32,), [torch.zeros(31), 31])


def past_shared_memory():
    """Dynamic shared memory for one int too few."""
    values = torch.arange(32, dtype=torch.int32)
    launch.launch("reverse_dynamic", (1,), (32,), [values, torch.zeros_like(values), 32], shared=124)


def misaligned():
    """16 bytes at an address that is a multiple of 4."""
    launch.launch("fill_wide", (1,), (1,), [torch.zeros(9)[1:]])


USED = {  # the instances that `sound` takes
    "encode.cu": ("encode<uint4, 2>", "encode<unsigned short, 2>", "encode<uint4, 0>", "encode<unsigned, 0>"),
    "decode.cu": tuple(
        f"{kernel}<{arguments}>"
        for kernel in ("decode", "decode_backward")
        for arguments in (
            "__nv_bfloat16, uint4, 2",
            "__half, unsigned short, 2",
            "float, uint4, 0",
            "float, unsigned, 0",
        )
    ),
    "plan.cu": ("plan_count", "plan_place"),
    "router.cu": ("route", "route_backward"),
}
CASES = [sound, past_the_end, past_shared_memory, misaligned]


def main(folder):
    launch.KERNELS["fill"] = launch.Kernel(str(PLANTED), "Pq")
    launch.KERNELS["reverse_dynamic"] = launch.Kernel(str(PLANTED), "PPi")
    launch.KERNELS["fill_wide"] = launch.Kernel(str(PLANTED), "P")
    runner.INSTANCES.clear()
    runner.INSTANCES.update(USED, **{str(PLANTED): ("fill<false>", "reverse_dynamic", "fill_wide")})
    for case in CASES:
        if pid := os.fork():
            os.waitpid(pid, 0)
            continue
        with open(Path(folder) / case.__name__, "w") as errors:
            os.dup2(errors.fileno(), 2)
        with installed(Runner(RANDOM, SANITIZERS)):
            case()
        os.write(2, b"done")
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
