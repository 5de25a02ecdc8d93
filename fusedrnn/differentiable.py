"""Autograd rules for ops with lists of tensors.

What ``torch.library.register_autograd`` would make of the same functions, without its walks through nested
containers, which take longer than a short sequence does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function


class _Rule(NamedTuple):
    op: Any
    save: Callable[..., None]
    backward: Callable[..., tuple]


def register(
    library: torch.library.Library, op: Any, save: Callable[..., None], backward: Callable[..., tuple]
) -> None:
    """Gives an op the autograd rule that ``torch.library.register_autograd`` would give it.

    Args:
        library: where the rule is registered, for as long as it is alive.
        op: the overload.
        save: ``setup_context`` there, called with positions.
        backward: ``backward`` there.
    """
    name = op._schema.name
    node = type(name.replace("::", "_"), (_Function,), {})  # the name is that of the grad_fn
    _nodes[op] = node, _Rule(op, save, backward)

    def call(keys: Any, *args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below_autograd(op, args, keys)
        return apply(op, args, keys)

    library.impl(name.split("::")[1], call, "Autograd", with_keyset=True)


_nodes: dict[Any, tuple[Any, _Rule]] = {}


def apply(op: Any, args: tuple, keys: Any = None) -> tuple:
    """Calls an op that has a rule, of whose arguments one needs a gradient, and records it for backward.

    What calling the op comes to, without the dispatcher's way from Python and back to Python, which takes as
    long as a short sequence.
    """
    node, rule = _nodes[op]
    flat, lengths = _flatten(args)
    out: list[int] = []  # lengths in the result, known once it is there
    transformed = torch._C._are_functorch_transforms_active()
    record = partial(_apply_at_one_level, node) if transformed else node.apply
    return tuple(_regroup(record(rule, keys, lengths, out, *flat), out))


def below_autograd(op: Any, args: tuple, keys: Any = None) -> Any:
    """Calls an op without recording it; ``keys`` are those of the dispatcher if the call comes from there."""
    with torch._C._AutoDispatchBelowAutograd():
        if keys is None:
            return op(*args)
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _apply_at_one_level(node: Any, *args: Any) -> Any:
    """Applies a node where ``torch.func.grad`` has unwrapped the arguments for this call.

    ``node.apply`` is for functions that bring rules for every transform. Ours do not need them, because the
    op is known to the dispatcher: below the node, it goes on to the transforms further out by itself.
    """
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, node).apply(*args)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: _Rule, keys: Any, lengths: list[int], out: list[int], *flat: Any) -> Any:
        args = tuple(_regroup(flat, lengths))
        with torch.enable_grad():  # for transforms further out
            result = below_autograd(rule.op, args, keys)
        rule.save(ctx, args, result)
        ctx.rule, ctx.lengths_in, ctx.lengths_out = rule, lengths, out
        results, lengths_out = _flatten(result)
        out += lengths_out
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.needs_input_grad, flags = _regroup(ctx.needs_input_grad[4:], ctx.lengths_in), ctx.needs_input_grad
        try:
            groups = ctx.rule.backward(ctx, *_regroup(grads, ctx.lengths_out))
        finally:
            ctx.needs_input_grad = flags
        flat: list[Any] = []
        for grad, n in zip(groups, ctx.lengths_in, strict=True):
            flat += [grad] if n < 0 else [None] * n if grad is None else grad
        return None, None, None, None, *flat


def _flatten(args: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The arguments with the entries of lists in their places, and the lists' lengths (-1: not a list)."""
    flat: list[Any] = []
    lengths = []
    for arg in args:
        if isinstance(arg, list):
            flat += arg
            lengths.append(len(arg))
        else:
            flat.append(arg)
            lengths.append(-1)
    return flat, lengths


def _regroup(flat: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
    items = iter(flat)
    return [next(items) if n < 0 else [next(items) for _ in range(n)] for n in lengths]
