"""Timeouts of process groups."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def seconds(timeout: timedelta | float | None) -> timedelta | None:
    """A timeout as a timedelta, from seconds, a timedelta or None.

    Raises:
        ValueError: it is not positive.
        TypeError: it is no number and no timedelta.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, timedelta | int | float):
        raise TypeError(f"timeout must be a number of seconds, a timedelta or None; got {timeout!r}")
    limit = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    if limit <= timedelta(0):
        raise ValueError(f"timeout must be positive; got {timeout!r}")
    return limit


def default_timeout() -> timedelta | None:
    """Timeout that `init_process_group` was given; None for a backend that does not report it."""
    everyone = dist.distributed_c10d._get_default_group()
    for device in everyone._device_types:
        options = getattr(everyone._get_backend(device), "options", None)
        if (timeout := getattr(options, "_timeout", None)) is not None:
            return timeout
    return None
