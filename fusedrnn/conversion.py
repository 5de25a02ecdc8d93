"""Puts our modules in the place of the built-in's inside a model, and back.

A module stays the object it is: only its class changes, because ours take everything but ``forward`` from
the built-in's. So parameters, hooks, parametrizations, names, flags, and whoever holds a reference to the
module or to a parameter (an optimizer, a second parent) keep what they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any, Literal, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from . import modules

_FUSED: dict[type, type] = {
    getattr(nn, name): getattr(modules, name)
    for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
}
_BUILTIN = {fused: builtin for builtin, fused in _FUSED.items()}
# What a subclass may define for itself: its forward pass remains the built-in's.
_FREE = {"__init__", "__setattr__", "__setstate__", "_apply", "extra_repr", "reset_parameters"}
_ORIGINAL = "_fusedrnn_original"

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Report:
    """What :func:`convert` or :func:`revert` did; printed, a line for each module.

    Attributes:
        replaced: by name in the model ("" is the model itself), what a module is now, as ``fusedrnn.LSTM``.
        left: by name, why a recurrent module was left as it is.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: now {kind}" for name, kind in self.replaced.items()]
        lines += [f"{name or '(model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no recurrent modules"


@overload
def convert(model: Model, *, report: Literal[False] = False) -> Model: ...
@overload
def convert(model: Model, *, report: Literal[True]) -> tuple[Model, Report]: ...
def convert(model: Model, *, report: bool = False) -> Model | tuple[Model, Report]:
    """Makes every ``torch.nn.LSTM``, ``GRU``, ``RNN`` and cell in a model one of ours, in place.

    Parameters, ``state_dict`` keys, device, dtype, training flag, hooks and parametrizations stay the very
    same; nothing is copied. A subclass is converted if it inherits all that its forward pass consists of, and
    keeps its name and methods. Left as they are: subclasses with a forward pass of their own, modules whose
    ``forward`` was replaced, quantized, scripted and sharded ones (convert before ``fully_shard``).

    Args:
        model: any module, also an ``nn.LSTM`` itself.
        report: whether to say what was done.

    Returns:
        ``model``; with ``report`` also a :class:`Report`.

    Raises:
        TypeError: ``model`` is not a module.
    """
    done = _replace(model, to_fused=True)
    return (model, done) if report else model


@overload
def revert(model: Model, *, report: Literal[False] = False) -> Model: ...
@overload
def revert(model: Model, *, report: Literal[True]) -> tuple[Model, Report]: ...
def revert(model: Model, *, report: bool = False) -> Model | tuple[Model, Report]:
    """Makes every module of ours in a model the built-in's, in place: undoes :func:`convert`.

    Also for models that were built with our modules, so that what only knows the built-in's can take them.
    Left as they are: subclasses of our modules.

    Args, returns and raises as :func:`convert`.
    """
    done = _replace(model, to_fused=False)
    return (model, done) if report else model


def _replace(model: nn.Module, *, to_fused: bool) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in _recurrent(model):
        target = _target(module, type(module), to_fused)
        if isinstance(target, str):
            report.left[name] = target
            continue
        module.__class__ = target
        report.replaced[name] = _public_name(target)
        if not to_fused and isinstance(module, RNNBase):
            module.flatten_parameters()  # cuDNN wants them in one block, which ours do without
    return report


def _recurrent(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    names = {kind.__name__ for kind in _FUSED}
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and module.original_name in names
        quantized = _is_quantized(type(module)) and type(module).__name__ in names
        if scripted or quantized or isinstance(module, (RNNBase, RNNCellBase)):
            yield name, module


def _public_name(kind: type) -> str:
    base = next(b for b in kind.__mro__ if b in _BUILTIN or b in _FUSED)
    return f"{'fusedrnn' if base in _BUILTIN else 'torch.nn'}.{base.__name__}"


def _is_quantized(kind: type) -> bool:
    return kind.__module__.startswith("torch.ao.")


def _target(module: nn.Module, kind: Any, to_fused: bool) -> type | str:
    """The class that takes the place of ``kind``, or why none does."""
    to = _FUSED if to_fused else _BUILTIN
    if "forward" in vars(module):
        return "its forward was replaced by another"
    if not to_fused and (options := str(getattr(module, "_options", ""))):
        return f"the built-in has no {options}"
    if kind in to:
        return to[kind]
    if kind in (_BUILTIN if to_fused else _FUSED):
        return f"it is {_public_name(kind)} already"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if _is_quantized(kind):
        return "it is quantized"
    if any(base.__module__.startswith("torch.distributed.") for base in kind.__mro__):
        return "it is sharded"
    if _is_parametrized(module, kind):
        (base,) = kind.__bases__
        target = _target(module, base, to_fused)
        return _like(kind, target) if isinstance(target, type) else target
    if not issubclass(kind, tuple(_BUILTIN)):
        return _fused_subclass(kind) if to_fused else "it is none of ours"
    original: type | None = vars(kind).get(_ORIGINAL)
    if original is None:
        return f"{kind.__qualname__} is a subclass of ours"
    return f"it is {_public_name(kind)} already" if to_fused else original


def _is_parametrized(module: nn.Module, kind: type) -> bool:
    """Whether torch.nn.utils.parametrize made the class, for this one module."""
    return "parametrizations" in module._modules and kind.__name__.startswith("Parametrized")


def _like(kind: type, base: type) -> type:
    """A class as ``kind`` over another base."""
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (base,), own)


@cache
def _fused_subclass(kind: Any) -> type | str:
    """A class that is ``kind`` in all but its forward pass, or why there is none."""
    base = next((b for b in kind.__mro__ if b in _FUSED), None)
    if base is None:
        return f"{kind.__qualname__} is none of the modules that ours replace"
    fixed = {"__call__", "_call_impl", "__getattr__", "__reduce__", "__reduce_ex__"} | {
        name
        for owner in (base, RNNBase, RNNCellBase)
        for name, value in vars(owner).items()
        if isinstance(value, (FunctionType, property)) and name not in _FREE
    }
    for owner in kind.__mro__[: kind.__mro__.index(base)]:
        if changed := sorted(fixed & vars(owner).keys()):
            return f"{owner.__qualname__} has its own {', '.join(changed)}"

    def reduce(self: Any, protocol: Any) -> tuple:
        reduced: Any = object.__reduce_ex__(self, protocol)
        return _new, (kind,), reduced[2]

    own = {_ORIGINAL: kind, "__reduce_ex__": reduce, "__doc__": kind.__doc__}
    own |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind, _FUSED[base]), own)


def _new(kind: Any) -> Any:
    """An empty module of the fused subclass, which has no name of its own to be pickled by."""
    return kind.__new__(_fused_subclass(kind))
