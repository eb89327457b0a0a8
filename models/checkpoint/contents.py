"""Contents of a checkpoint: values of a model and its optimizer, by the names of the whole model.

Each name has the places where torch keeps its value: a dict of the model or the optimizer, and a key. A parameter that
pipeline stages share, such as a tied embedding, has several places. It is saved once and loaded into all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from inspect import unwrap
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict
from torch.optim import Optimizer

from ...moe.experts.sharded import local
from ...moe.parallel.place_experts import keep_global_order
from ..ema import AVERAGE, UPDATES
from .frozen import BASE, check_base, frozen_base, sums
from .plain_files import PlainReader, is_finite, may_overflow, plain_bytes, read_values
from .together import CheckpointError, place, together

Model = nn.Module | Sequence[nn.Module]
_Values = dict[str, Any]  # name in the file: value
_Place = tuple[dict[Any, Any], Any]  # a dict, and the key that has the value
_Places = dict[str, list[_Place]]  # name in the file: all places of its value


class Contents:
    """Values of a model and its optimizer, to save and to load.

    Their names are ``model.N``, ``optimizer.state.N.KEY`` and ``optimizer.param_groups.N.KEY``, where N is the name of
    a parameter. Of a model with adapters (LoRA, PEFT's too) the frozen parameters are left out: the base has them.
    """

    def __init__(self, model: Model, optimizer: Optimizer) -> None:
        self.modules = nn.ModuleList([model] if isinstance(model, nn.Module) else model)
        self.optimizer = optimizer
        keep_global_order(optimizer, self.modules)  # it may be newer than the placement of experts
        self.weights: _Values = get_model_state_dict(self.modules)
        self.parameters = _named(self.modules, optimizer)
        self.base = frozen_base(self.modules)

    def values(self) -> _Values:
        """Values on this rank, by the names in the file. Tensors are not copied.

        Raises:
            CheckpointError: a number is not finite, or a value has a type that a checkpoint cannot keep.
        """
        own = self.optimizer.state_dict()
        held = _values(self._places(own, self.base.keys()))
        values = held | _values(self._settings(own, {name for name, _ in self.parameters}))
        plain_bytes([value for value in values.values() if not isinstance(value, Tensor)])
        state = {name: value for name, value in held.items() if name.startswith("optimizer.")}
        model = {f"model.{_whole(n)}": p for n, p in self.modules.named_parameters() if n not in self.base}
        _check_finite(model | state)
        if self.base and place()[0] == 0:
            values[BASE] = sums({_whole(name): p for name, p in self.base.items()})
        return values

    def read(self, reader: PlainReader) -> None:
        """Read all values into model and optimizer. All ranks call it.

        A parameter without optimizer state in the checkpoint has none afterwards. If the checkpoint's optimizer did
        not have the parameter at all, the settings for it stay as they are now. In a model with
        adapters, frozen parameters that the checkpoint lacks stay as they are.

        Raises:
            DamagedError: on every rank, if the checkpoint holds code.
            CheckpointError: on every rank, if it does not fit. Model and optimizer are unchanged in both cases, unless
                the message says that a part was read.
        """
        folder, saved = reader.path, reader.metadata.state_dict_metadata
        everyones = {n for each in together(lambda: [f"model.{_whole(n)}" for n in self.weights]) for n in each}
        names, state = {name for name, _ in self.parameters}, self.optimizer.state
        stateful, known = (_owned(saved, f"optimizer.{kind}.", names) for kind in ("state", "param_groups"))
        started = [p for name, p in self.parameters if name in stateful and not state.get(p)]
        own: _Values = {}
        places: _Places = {}
        settings: _Places = {}
        plain: _Values = {}
        agreed: list[tuple[_Place, Any]] = []

        def fit() -> None:
            if left := [name for name in saved if name.startswith("model.") and name not in everyones]:
                raise _lacking("model", [name.removeprefix("model.") for name in left])
            _start(self.optimizer, started)
            own.update(self.optimizer.state_dict())
            for index, (name, _) in enumerate(self.parameters):
                if name not in stateful:
                    own["state"].pop(index, None)
            left_out = {name for name in self.base if f"model.{_whole(name)}" not in saved}
            places.update(self._places(own, left_out))
            settings.update(self._settings(own, known))
            if left := [name for each in stateful.values() for name in each if name not in places]:
                raise _misfit("another kind of optimizer", f"the optimizer keeps no {left[0]}")
            _check_fit(_values(places), settings, saved)
            plain.update({name: value for name, value in _values(places).items() if not isinstance(value, Tensor)})
            plain.update({name: _target(saved[name], value) for name, value in _values(settings).items()})

        try:
            if BASE in saved:
                base = read_values(reader, {BASE: ""})[BASE]
                together(lambda: check_base(base, {_whole(name): p for name, p in self.base.items()}))
            together(fit)
            plain = read_values(reader, plain)
            together(lambda: agreed.extend(_agreed(settings, plain)))
        except CheckpointError as error:
            for p in started:
                state.pop(p, None)
            raise type(error)(f"{folder} does not load: {error}") from None
        tensors = {name: value for name, value in _values(places).items() if isinstance(value, Tensor)}
        try:
            read = plain | read_values(reader, tensors)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: a part was read into model and optimizer, then reading failed: {error}; load a checkpoint "
                "again before training"
            ) from None

        for name, held in places.items():
            for copy, (values, key) in enumerate(held):  # clone: two parameters must not share a tensor of state
                values[key] = read[name].clone() if copy and isinstance(read[name], Tensor) else read[name]
        for (group, key), value in agreed:
            group[key] = value
        set_model_state_dict(self.modules, self.weights)
        self.optimizer.load_state_dict(own)

    def _places(self, own: _Values, left_out: Collection[str]) -> _Places:
        """Places of the model's values but those left out, and of the state in an optimizer's state dict."""
        places: _Places = {}
        for name in (name for name in self.weights if name not in left_out):
            places.setdefault(f"model.{_whole(name)}", []).append((self.weights, name))
        for index, (parameter, _) in enumerate(self.parameters):
            for name, *at in _leaves(own["state"].get(index, {}), f"optimizer.state.{parameter}"):
                places.setdefault(name, []).append((at[0], at[1]))
        return places

    def _settings(self, own: _Values, parameters: Collection[str]) -> _Places:
        """Places of these parameters' settings in an optimizer's state dict, such as learning rate and betas."""
        places: _Places = {}
        for group in own["param_groups"]:
            for name in (self.parameters[index][0] for index in group["params"]):
                for key in group.keys() - {"params", "param_names"} if name in parameters else ():
                    places.setdefault(f"optimizer.param_groups.{name}.{key}", []).append((group, key))
        return places


def _whole(name: str) -> str:
    """Name of a parameter in the whole model, without the index of its module in the list of stages."""
    return name.partition(".")[2]


def _named(modules: nn.ModuleList, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an optimizer in its order, with their names in the whole model."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.setdefault(parameters[0], {})  # torch makes a step of an optimizer that has no state at all
    try:
        groups: Any = get_optimizer_state_dict(modules, optimizer)["param_groups"]
    finally:
        if not optimizer.state[parameters[0]]:
            del optimizer.state[parameters[0]]
    return list(zip((_whole(name) for group in groups for name in group["params"]), parameters, strict=True))


def _leaves(values: dict[Any, Any], prefix: str) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    for key, value in values.items():
        name = f"{prefix}.{key}"
        if isinstance(value, dict):
            yield from _leaves(value, name)
        elif value is None or isinstance(value, Tensor | int | float | str):
            yield name, values, key
        else:
            raise CheckpointError(
                f"{name} is of type {type(value).__name__}; an optimizer's state may have tensors, numbers, str, None "
                "and dicts of them: use another optimizer, or give it such a state_dict"
            )


def _values(places: _Places) -> _Values:
    return {name: held[key] for name, [(held, key), *_] in places.items()}


def _owned(saved: Collection[str], prefix: str, parameters: Collection[str]) -> dict[str, list[str]]:
    """Names in a checkpoint that begin with `prefix`, grouped by parameter, for these parameters alone."""
    found: dict[str, list[str]] = {}
    for name in saved:
        if name.startswith(prefix):
            parts = accumulate(name.removeprefix(prefix).split("."), "{}.{}".format)
            if parameter := next((part for part in parts if part in parameters), None):
                found.setdefault(parameter, []).append(name)
    return found


@torch.no_grad()
def _start(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Give parameters the optimizer state of a first step, made with zero gradients and a learning rate of zero."""
    if not parameters:
        return
    rates = [group.get("lr") for group in optimizer.param_groups]
    try:
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        unwrap(type(optimizer).step)(optimizer)  # without its hooks: they may wait for other ranks
    finally:
        for p in parameters:
            p.grad = None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if "lr" in group:
                group["lr"] = rate


def _check_fit(values: _Values, settings: Collection[str], saved: _Values) -> None:
    if missing := [name for name in (*values, *settings) if name not in saved]:
        raise _lacking("checkpoint", missing)
    for name, value in values.items():
        entry = saved[name]
        if isinstance(value, Tensor) != isinstance(entry, TensorStorageMetadata):
            raise _misfit("a model of another kind", f"only one of checkpoint and model has {name} as a tensor")
        if isinstance(value, Tensor) and value.shape != entry.size:
            sizes = f"{list(entry.size)}, and the model's {list(value.shape)}"
            raise _misfit("a model of other sizes", f"the checkpoint's {name} is {sizes}")


def _lacking(what: str, names: list[str]) -> CheckpointError:
    """Error for names that the model or the checkpoint lacks."""
    averages = tuple(prefix + name for prefix in ("", "model.") for name in (AVERAGE, UPDATES))
    if others := [name for name in names if not name.startswith(averages)]:
        return _misfit("a model of other sizes", f"the {what} has no {others[0]}")
    if what == "model":
        return _misfit("a model with averages (EMA)", "it has averages of the weights; give an EMA here as well")
    return _misfit("a model without averages (EMA)", "it has no averages of the weights; leave out the EMA here")


def _misfit(of: str, why: str) -> CheckpointError:
    return CheckpointError(f"is it of {of}? rank {place()[0]}: {why}")


def _target(entry: Any, value: Any) -> Any:
    """Value to read a setting into. It may be saved as a float and be a tensor now, or the other way round."""
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    return None if isinstance(value, Tensor) else value


def _agreed(settings: _Places, read: _Values) -> Iterator[tuple[_Place, Any]]:
    """One value for each setting of a parameter group, in the type that the group keeps."""
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    for name, group, key in ((name, *at) for name, held in settings.items() for at in held):
        value, kept = read[name], group[key]
        if isinstance(value, Tensor) and not isinstance(kept, Tensor):
            value = value.item()
        other, same = first.setdefault((id(group), key), (name, value))
        if other == name:
            yield (group, key), torch.as_tensor(value).to(kept) if isinstance(kept, Tensor) else value
        elif value != same:
            raise CheckpointError(
                f"the optimizer has one parameter group where two were saved: {other} is {same}, and {name} is "
                f"{value}; make the groups as they were when it was saved"
            )


def _check_finite(tensors: dict[str, Any]) -> None:
    finite = {
        name: is_finite(tensor)  # on a GPU all run before the first result is waited for
        for name, value in tensors.items()
        if isinstance(value, Tensor) and type(tensor := local(value).detach()) is Tensor
        if may_overflow(tensor.dtype) and not tensor.is_meta
    }
    if bad := [name for name, flag in finite.items() if not flag]:
        raise CheckpointError(
            f"rank {place()[0]}: {bad[0]} and {len(bad) - 1} other tensors have NaN or infinity and are not saved; go "
            "back to the newest checkpoint, with a lower learning rate or gradient clipping"
        )
