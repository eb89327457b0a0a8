"""The kernels, with template arguments, that tests compile and run: all of a source in one go."""

from itertools import product

UNROLLED = (1, 2, 4, 8, 0)
ELEMENTS = {"float": "unsigned", "__nv_bfloat16": "unsigned short", "__half": "unsigned short"}
SCALARS = ("unsigned char", "unsigned short", "unsigned", "unsigned long long")

ENCODE = [f"encode<{chunk}, {k}>" for chunk, k in product(("uint4", *SCALARS), UNROLLED)]
DECODE = [
    f"{kernel}<{element}, {chunk}, {k}>"
    for kernel, (element, scalar), k in product(("decode", "decode_backward"), ELEMENTS.items(), UNROLLED)
    for chunk in ("uint4", scalar)
]

INSTANCES: dict[str, tuple[str, ...]] = {
    "encode.cu": tuple(ENCODE),
    "decode.cu": tuple(DECODE),
    "plan.cu": ("plan_count", "plan_place"),
    "router.cu": ("route", "route_backward"),
}
