"""What vmap makes of the ops: one call of the same op for all examples.

Where the weights are the same for all, the examples of vmap are more sequences of the batch. Where each has
weights of its own (an ensemble; or the backward of per-sample gradients, whose gradients of weights must stay
apart), they are more recurrences, with their inputs side by side in the features of x. Either way it is one
launch. The rules serve ``torch.func`` and, for the backward op, ``torch.autograd``'s older vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checks import given

_LAYER = 11  # arguments of all three ops; the backward op has more, up to _INCOMING; optional ones follow
_INCOMING = 17
_WEIGHTS = slice(3, 8)
_BATCH_SIZES = 9


def register(library: torch.library.Library, ops: Any) -> None:
    """Adds the rules for the three ops of a namespace."""
    for name in ("sequence", "sequence_forward", "sequence_backward"):
        rule = partial(_rule, getattr(ops, name))
        torch.library.register_vmap(f"{library.ns}::{name}", rule, lib=library)
    # torch.autograd vectorizes with an older vmap, whose tensors and dispatch key are others.
    library.impl("sequence_backward", partial(_older_rule, ops.sequence_backward), "Batched")


@dataclass(frozen=True)
class _Examples:
    """How the E examples lie in the tensors of one call. ``dim`` is where vmap has them, None: all share it.

    ``b`` is the dimension of B (packed: of the rows) in x, y and what is saved.
    """

    E: int
    b: int

    def put(self, t: Tensor, dim: int | None, at: int) -> Tensor:
        """The examples as dimension ``at``."""
        if dim is None:
            t = t.unsqueeze(at)
            return t.expand(*t.shape[:at], self.E, *t.shape[at + 1 :])
        return t.movedim(dim, at)


class _Sequences(_Examples):
    """Each sequence of the batch E times, so that those alive still come first: ``[T, B*E, *]``."""

    def as_x(self, t: Tensor, dim: int | None) -> Tensor:
        return self.put(t, dim, self.b + 1).flatten(self.b, self.b + 1)

    saved = given_x = as_x

    def state(self, t: Tensor, dim: int | None) -> Tensor:
        return self.put(t, dim, 2).flatten(1, 2)

    def weights(self, group: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
        return list(group)

    def reverse(self, reverse: Sequence[bool]) -> list[bool]:
        return list(reverse)

    def batch_sizes(self, sizes: Tensor | None) -> Tensor | None:
        return None if sizes is None else sizes * self.E

    def of_x(self, t: Tensor) -> tuple[Tensor, int]:
        return t.unflatten(self.b, (t.size(self.b) // self.E, self.E)), self.b + 1

    of_saved = of_x

    def of_state(self, t: Tensor) -> tuple[Tensor, int]:
        return t.unflatten(1, (t.size(1) // self.E, self.E)), 2

    def of_weights(self, group: list[Tensor]) -> list[tuple[Tensor, int]]:
        assert not group  # their gradients would be sums over the examples
        return []


class _Recurrences(_Examples):
    """N recurrences for every example: ``[T, B, E*N*H]``, and of the input ``[T, B, E*I]``."""

    def given_x(self, t: Tensor, dim: int | None) -> Tensor:
        return self.put(t, dim, self.b + 1).flatten(self.b + 1, self.b + 2)

    as_x = saved = given_x

    def state(self, t: Tensor, dim: int | None) -> Tensor:
        return self.put(t, dim, 0).flatten(0, 1)

    def weights(self, group: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
        pairs = zip(group, dims, strict=True)
        each = [[w] * self.E if dim is None else w.unbind(dim) for w, dim in pairs]
        return [w for example in zip(*each, strict=True) for w in example]

    def reverse(self, reverse: Sequence[bool]) -> list[bool]:
        return list(reverse) * self.E

    def batch_sizes(self, sizes: Tensor | None) -> Tensor | None:
        return sizes

    def of_x(self, t: Tensor) -> tuple[Tensor, int]:
        return t.unflatten(self.b + 1, (self.E, t.size(self.b + 1) // self.E)), self.b + 1

    of_saved = of_x

    def of_state(self, t: Tensor) -> tuple[Tensor, int]:
        return t.unflatten(0, (self.E, t.size(0) // self.E)), 0

    def of_weights(self, group: list[Tensor]) -> list[tuple[Tensor, int]]:
        N = len(group) // self.E
        return [(torch.stack(group[n::N]), 0) for n in range(N)]


def _rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    results = _run(op, info.batch_size, args, in_dims)
    return _map(lambda pair: pair[0], results), _map(lambda pair: pair[1], results)


def _run(op: Any, E: int, args: tuple[Any, ...], in_dims: tuple[Any, ...]) -> Any:
    """The op's results, in the place of each tensor a pair of it and where the examples are in it."""
    dims = [
        [None] * len(arg) if isinstance(arg, (list, tuple)) and dim is None else dim
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    layer, incoming, others = args[:_LAYER], args[_LAYER:_INCOMING], args[_INCOMING:]
    if any(others) or (len(incoming) == 1 and incoming[0]):
        raise RuntimeError(
            "vmap has no rule for the backward of options and of the states of all steps: force the backend "
            "'reference' around the forward"
        )
    cell, x, state, *weights, reverse, batch_sizes, tf32 = layer
    weights = [list(given(group)) for group in weights]
    if dims[_BATCH_SIZES] is not None:
        raise RuntimeError("batch_sizes must be the same for all examples of vmap")
    backward = bool(incoming)
    need_dx, need_dweights = incoming[-2:] if backward else (False, False)
    own_weights = any(dim is not None for group in dims[_WEIGHTS] for dim in group)
    kind = _Recurrences if own_weights or need_dweights else _Sequences
    examples: Any = kind(E, (x.dim() - (dims[1] is not None)) - 2)

    def states(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
        return [examples.state(t, dim) for t, dim in zip(tensors, dims, strict=True)]

    one_input = x.size(-1) == weights[0][0].size(-1) if dims[1] is None else False
    shared = kind is _Recurrences and one_input and not need_dx  # the op takes one input for all
    call = [
        cell,
        x if shared else examples.given_x(x, dims[1]),
        states(state, dims[2]),
        *(
            examples.weights(group, ds) if group else []
            for group, ds in zip(weights, dims[_WEIGHTS], strict=True)
        ),
        examples.reverse(reverse),
        examples.batch_sizes(batch_sizes),
        tf32,
    ]
    if not backward:
        y, final, *saved = op(*call)
        results: list[Any] = [examples.of_x(y), [examples.of_state(s) for s in final]]
        return (*results, *([examples.of_saved(s) for s in kept] for kept in saved))
    y, kept, dy, dfinal, *_ = incoming
    y_dim, kept_dims, dy_dim, dfinal_dims = dims[_LAYER : _LAYER + 4]
    dx, dstate, *dweights = op(
        *call,
        examples.as_x(y, y_dim),
        [examples.saved(s, dim) for s, dim in zip(kept, kept_dims, strict=True)],
        None if dy is None else examples.as_x(dy, dy_dim),
        states(dfinal, dfinal_dims),
        need_dx,
        need_dweights,
    )
    return (
        examples.of_x(dx) if need_dx else (dx, None),
        [examples.of_state(d) for d in dstate],
        *(examples.of_weights(group) for group in dweights),
    )


def _older_rule(op: Any, *args: Any) -> Any:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()

    def is_batched(value: Any) -> bool:
        return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)

    def unwrap(value: Any) -> Any:
        return torch._remove_batch_dim(value, level, 1, 0) if is_batched(value) else value

    def wrap(result: Any) -> Any:
        t, dim = result
        return t if dim is None else torch._add_batch_dim(t.movedim(dim, 0), 0, level)

    in_dims, physical = _map(lambda v: 0 if is_batched(v) else None, args), _map(unwrap, args)
    E = next(v.size(0) for v, dim in zip(_leaves(physical), _leaves(in_dims), strict=True) if dim == 0)
    return _map(wrap, _run(op, E, physical, in_dims))


def _map(function: Callable[..., Any], tree: Any) -> Any:
    """Applies ``function`` to the leaves of nested lists and tuples; a pair (tensor, dimension) is a leaf."""
    pair = isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[1], (int, type(None)))
    if (pair and isinstance(tree[0], Tensor)) or not isinstance(tree, (list, tuple)):
        return function(tree)
    return type(tree)(_map(function, item) for item in tree)


def _leaves(tree: Any) -> list[Any]:
    return [leaf for item in tree for leaf in _leaves(item)] if isinstance(tree, (list, tuple)) else [tree]
