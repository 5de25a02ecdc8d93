"""What vmap does with the backward op: gradients for many seeds at once, one after the other.

A layer call inside ``torch.func.vmap`` never gets here, the reference serves it. A backward pass does whose
forward pass ran outside: that of ``torch.autograd.functional.jacobian(vectorize=True)``, or of ``vmap`` over
``torch.autograd.grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def register(library: torch.library.Library, name: str, op: Any) -> None:
    """Adds the rules of ``op``, which returns tensors and lists of tensors and is called ``name``."""
    torch.library.register_vmap(f"{library.ns}::{name}", partial(_rule, op), lib=library)
    # torch.autograd vectorizes with an older vmap, whose tensors and dispatch key are others.
    library.impl(name, partial(_older_rule, op), "Batched")


def _rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    outputs = _one_by_one(op, info.batch_size, args, in_dims)
    return outputs, _map(lambda _: 0, outputs)


def _older_rule(op: Any, *args: Any) -> Any:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()

    def is_batched(value: Any) -> bool:
        return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)

    def unwrap(value: Any) -> Any:
        return torch._remove_batch_dim(value, level, 1, 0) if is_batched(value) else value

    in_dims, physical = _map(lambda v: 0 if is_batched(v) else None, args), _map(unwrap, args)
    size = next(v.size(0) for v, dim in zip(_leaves(physical), _leaves(in_dims), strict=True) if dim == 0)
    return _map(lambda t: torch._add_batch_dim(t, 0, level), _one_by_one(op, size, physical, in_dims))


def _one_by_one(op: Any, size: int, args: Any, in_dims: Any) -> Any:
    def select(index: int, value: Any, dim: Any) -> Any:
        return value.select(dim, index) if isinstance(dim, int) else value

    results = [op(*_map(partial(select, i), args, in_dims)) for i in range(size)]
    return _map(lambda *tensors: torch.stack(tensors), *results)


def _map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Applies ``function`` to the leaves of nested lists and tuples.

    Of ``others``, None may stand where ``tree`` has a list.
    """
    if not isinstance(tree, (list, tuple)):
        return function(tree, *others)
    others = tuple([None] * len(tree) if other is None else other for other in others)
    return type(tree)(_map(function, *items) for items in zip(tree, *others, strict=True))


def _leaves(tree: Any) -> list[Any]:
    return [leaf for item in tree for leaf in _leaves(item)] if isinstance(tree, (list, tuple)) else [tree]
