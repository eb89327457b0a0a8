"""Loops over products, right and as Triton 3.6 to 3.8 compiles them wrong, for the test that sees which is which."""

import triton
import triton.language as tl
from compile_experts import chained
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(a, b, out, FORM: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    first = tl.zeros([SIZE, SIZE], tl.float32)
    second = first
    for _ in range(4):
        left, right = tl.load(a + at), tl.load(b + at)
        first = tl.dot(left, right, first)
        if FORM == "one loop, one sum":
            first = tl.dot(right, left, first)
        elif FORM == "one loop, two sums":
            second = tl.dot(right, left, second)
    if FORM == "two loops, one sum":
        for _ in range(4):
            first = tl.dot(tl.load(b + at), tl.load(a + at), first)
    tl.store(out + at, first + second)


def forms() -> dict[str, int]:
    """Chained products of each form."""
    found = {}
    for form in ("one loop, one sum", "one loop, two sums", "two loops, one sum"):
        kinds = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "FORM": "constexpr", "SIZE": "constexpr"}
        source = ASTSource(kernel, kinds, {(3,): form, (4,): 64}, {})
        found[form] = chained(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"])
    return found


if __name__ == "__main__":
    print(forms())
