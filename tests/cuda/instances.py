"""The kernels, with template arguments, that tests compile and run: all of a source in one go."""

INSTANCES: dict[str, tuple[str, ...]] = {
    "plan.cu": ("plan_count", "plan_place"),
    "router.cu": ("route", "route_backward"),
}
