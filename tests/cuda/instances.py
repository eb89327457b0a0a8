"""The kernels, with template arguments, that tests compile and run: all of a source in one go."""

INSTANCES: dict[str, tuple[str, ...]] = {}
