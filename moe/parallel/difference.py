"""Compare two modules of a user, by classes, attributes and functions, to tell whether they compute the same."""

from __future__ import annotations

from collections import deque
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OF_MODULES = {"training", "_parameters", "_buffers", "_modules"}
OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__", "_abc_impl"}


def difference(one: Any, other: Any, where: str = "", seen: set[tuple[int, int]] | None = None) -> str | None:
    """The first difference between two objects as "path is a and b", or None if they compute the same.

    Modules may differ in the values and shapes of parameters and buffers, and in training or eval mode. Functions and
    classes from the same code are equal if the variables that they enclose are equal. Other objects are compared with
    ``==``.

    >>> difference(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2)))
    '1.p is 0.1 and 0.2'
    >>> difference(nn.Linear(2, 2), nn.Linear(2, 2)) is None
    True
    """
    seen = set() if seen is None else seen
    if one is other or (id(one), id(other)) in seen:
        return None
    mine, theirs = _parts(one), _parts(other)
    if mine is None or theirs is None:
        return None if type(one) is type(other) and _equal(one, other) else _said(where, one, other)
    if not isinstance(one, tuple):  # tuples may be temporary, and their ids used again
        seen.add((id(one), id(other)))
    if difference(type(one), type(other), where, seen) or mine.keys() != theirs.keys():
        return _said(where, one, other)
    return next(
        (found for name in mine if (found := difference(mine[name], theirs[name], _path(where, name), seen))), None
    )


def _parts(x: Any) -> dict[str, Any] | None:
    """The parts of an object to compare, by name. None means that the object itself is compared."""
    if isinstance(x, nn.Module):
        tensors = {
            name: t if t is None else (t.dtype, t.requires_grad) for name, t in (x._parameters | x._buffers).items()
        }
        own = {name: value for name, value in vars(x).items() if name not in OF_MODULES}
        hooks = {name: tuple(value.values()) for name, value in own.items() if "_hooks" in name and value}
        return own | hooks | x._modules | tensors
    if isinstance(x, FunctionType):
        enclosed = tuple(_content(cell) for cell in x.__closure__ or ())
        return {"code": x.__code__, "defaults": x.__defaults__, "keywords": x.__kwdefaults__, "enclosed": enclosed}
    if isinstance(x, MethodType):
        return {"function": x.__func__, "of": x.__self__}
    if isinstance(x, partial):
        return {"function": x.func, "arguments": x.args, "keywords": x.keywords}
    if isinstance(x, property):
        return {"get": x.fget, "set": x.fset, "delete": x.fdel}
    if isinstance(x, classmethod | staticmethod):
        return {"function": x.__func__}
    if isinstance(x, type):
        own = {name: value for name, value in vars(x).items() if name not in OF_CLASSES}
        return own | {"name": x.__qualname__, "bases": x.__bases__}
    if isinstance(x, list | tuple | deque):
        return {str(place): value for place, value in enumerate(x)}
    if isinstance(x, dict):
        return {str(key): value for key, value in x.items()}
    if isinstance(x, Tensor | np.ndarray) or not hasattr(x, "__dict__"):
        return None
    return vars(x)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is still empty
        return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and (one.is_meta or torch.equal(one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    try:
        return bool(one == other or (one != one and other != other))  # NaN
    except Exception:  # objects that cannot be compared count as different
        return False


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _said(where: str, one: Any, other: Any) -> str:
    return f"{where or 'the module itself'} is {_shown(one)} and {_shown(other)}"


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(x).__qualname__}"
