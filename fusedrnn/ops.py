"""The torch ops: one per layer forward, one backward, with their fake kernels, autograd and autocast rules.

The compiled library defines the schemas (``csrc/ops``); this module adds what torch asks of an op in
Python. ``fusedrnn::sequence`` is for inference and keeps nothing; ``fusedrnn::sequence_forward`` also
returns what ``fusedrnn::sequence_backward`` needs. The backward op is differentiable itself, through the
reference. ``fusedrnn_emulator`` has the same three ops, which run the CUDA kernels on CPU tensors, and so has
``fusedrnn_triton``, which is defined in Python (``triton/definition.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from . import autocast, batching, differentiable, libraries, reference
from .cells import CELL_BY_ID, PEEPHOLE, Cell, compute_dtype
from .checks import check, given, inputs_of
from .triton import definition
from .variation import PLAIN, Variation

_NAMESPACES = {"emulator": "fusedrnn_emulator", "triton": definition.NAMESPACE}


def sequence(
    backend: str,
    cell: Cell,
    x: Tensor,
    state: Sequence[Tensor],
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    variation: Variation = PLAIN,
    all_states: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Calls the op that fits: the one without autograd when no gradient can be asked for.

    Shapes as :func:`fusedrnn.functional.layer`.
    """
    if torch.compiler.is_exporting() and backend != "triton":
        # AOTInductor cannot pass an empty list to an op. Vectors of no elements stand for absent weights.
        absent = [x.new_empty(0)] * len(reverse)
        bias_ih, bias_hh, weight_hr = bias_ih or absent, bias_hh or absent, weight_hr or absent
    groups = (state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    if x.size(-1) != weight_ih[0].size(-1):  # the op would take several inputs in one
        check(cell, x, *groups, reverse, batch_sizes)
    tensors = [group if type(group) is list else list(group) for group in groups]
    args = (cell.id, x, *tensors, list(reverse), batch_sizes, backend != "cpu" and _tf32_allowed(x))
    if variation.peephole:
        args = (PEEPHOLE.id, *args[1:], [p.to(x.dtype) for p in variation.peephole])
    op = _ops_of(backend)
    # A batched tensor does not say what is in it.
    transformed = _transformed()
    wanted = torch.is_grad_enabled() and (
        transformed
        or x.requires_grad
        or any(t.requires_grad for g in (*tensors, variation.peephole) for t in g)
    )
    if not wanted and not (all_states and cell.states > 1):
        return *op.sequence.default(*args), []
    if not wanted or transformed or torch.compiler.is_compiling():
        y, final, saved = op.sequence_forward.default(*args)
    else:
        y, final, saved = differentiable.apply(op.sequence_forward.default, args)
    if not all_states:
        return y, final, []
    first = 1 if weight_hr and given(weight_hr) else 0  # before it, h as it was before its projection
    return y, final, [c.to(x.dtype) for c in saved[first : first + cell.states - 1]]


def plan(
    backend: str,
    cell: Cell,
    x: Tensor,
    state: Sequence[Tensor],
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    *,
    backward: bool,
) -> list[int]:
    """The plan of one pass of a call by a compiled backend, as ``plan_of`` (``csrc/ops``) gives it."""
    tensors = (state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    tf32 = backend != "cpu" and _tf32_allowed(x)
    return _ops_of(backend).plan(cell.id, x, *tensors, reverse, batch_sizes, tf32, backward)


def _ops_of(backend: str) -> Any:
    return getattr(torch.ops, _NAMESPACES.get(backend, "fusedrnn"))


def _transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


_marked: Any = _transformed
_marked._dynamo_marked_constant = True  # the compiler compiles again for other transforms


def _tf32_allowed(x: Tensor) -> bool:
    """Whether products of a recurrence may take tf32 operands: torch's switch for those of cuDNN."""
    rnn: Any = torch.backends.cudnn.rnn
    return x.dtype == torch.float32 and rnn.fp32_precision == "tf32"


def _register(namespace: str) -> None:
    library, ops = torch.library.Library(namespace, "FRAGMENT"), getattr(torch.ops, namespace)
    for name in ("sequence", "sequence_forward"):
        for device in autocast.DEVICES:
            library.impl(name, _autocast_rule(getattr(ops, name), device), f"Autocast{device.upper()}")
    keeps_gates = namespace == "fusedrnn"  # where it serves the CPU
    torch.library.register_fake(f"{namespace}::sequence", _fake_sequence)
    torch.library.register_fake(f"{namespace}::sequence_forward", partial(_fake_forward, keeps_gates))
    fake_backward = _fake_without_params if namespace == definition.NAMESPACE else _fake_backward
    torch.library.register_fake(f"{namespace}::sequence_backward", fake_backward)
    differentiable.register(library, ops.sequence_forward.default, _save, partial(_backward, ops))
    differentiable.register(library, ops.sequence_backward.default, _save_backward, _double_backward)
    batching.register(library, ops)
    _keep_alive.append(library)


_keep_alive: list[torch.library.Library] = []


def _autocast_rule(op: Any, device: str) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def rule(cell: int, *args: Any) -> Any:
        tensors, (reverse, batch_sizes, *rest) = args[:7], args[7:]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            packed = batch_sizes is not None
            cast = autocast.cast(CELL_BY_ID[cell], device, tensors, promote=packed)
            return op(cell, *cast, reverse, batch_sizes, *rest)

    return rule


def _fake_sequence(
    cell: int,
    x: Tensor,
    state: list[Tensor],
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    weight_hr: list[Tensor],
    reverse: list[bool],
    batch_sizes: Tensor | None,
    tf32: bool,
    param: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    check(
        CELL_BY_ID[cell],
        x,
        state,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        weight_hr,
        reverse,
        batch_sizes,
        inputs=inputs_of(x, weight_ih),
    )
    y = x.new_empty(*x.shape[:-1], len(reverse) * weight_hh[0].size(1))
    return y, [s.new_empty(s.shape) for s in state]


def _fake_forward(
    keeps_gates: bool,
    cell: int,
    x: Tensor,
    state: list[Tensor],
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    y, final = _fake_sequence(cell, x, state, weight_ih, weight_hh, *rest)
    spec, weight_hr = CELL_BY_ID[cell], given(rest[2])
    H = weight_hh[0].size(0) // spec.gates
    shape, dtype = (*x.shape[:-1], len(weight_hh)), compute_dtype(x.dtype)
    saved = [x.new_empty(*shape, H, dtype=dtype) for _ in range(spec.states - (0 if weight_hr else 1))]
    if spec.saved and x.device.type == "cpu" and keeps_gates:  # other kernels compute the gates again
        saved.append(x.new_empty(*shape, max(spec.gates, spec.saved), H, dtype=dtype))
    return y, final, saved


def _fake_backward(
    cell: int,
    x: Tensor,
    state: list[Tensor],
    weight_ih: list[Tensor],
    weight_hh: list[Tensor],
    bias_ih: list[Tensor],
    bias_hh: list[Tensor],
    weight_hr: list[Tensor],
    reverse: list[bool],
    batch_sizes: Tensor | None,
    tf32: bool,
    y: Tensor,
    saved: list[Tensor],
    dy: Tensor | None,
    dfinal: list[Tensor],
    need_dx: bool,
    need_dweights: bool,
    dkept: Sequence[Tensor] | None = None,
    param: Sequence[Tensor] | None = None,
) -> tuple[Any, ...]:
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    inputs = inputs_of(x, weight_ih)
    check(CELL_BY_ID[cell], x, state, *weights, reverse, batch_sizes, inputs=inputs)
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    groups = (*weights, param or ())
    dweights: Any = [[w.new_empty(w.shape) for w in group] if need_dweights else [] for group in groups]
    dstate: Any = [s.new_empty(s.shape) for s in state]
    return dx, dstate, *dweights


def _fake_without_params(*arguments: Any) -> tuple[Any, ...]:
    return _fake_backward(*arguments)[:-1]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    cell, x, *groups = inputs[:8]
    reverse, batch_sizes, tf32, *rest = inputs[8:]  # the dispatcher leaves out what is at its default
    y, _, saved = output
    ctx.rest = [None if group is None else [] for group in rest]  # param: given, None or left out
    groups += [group or [] for group in rest] or [[]]
    ctx.arguments = [len(group) for group in groups]
    groups = [given(group) for group in groups]
    ctx.cell, ctx.reverse, ctx.tf32 = cell, reverse, tf32
    ctx.lengths = [len(group) for group in (*groups, saved)]
    ctx.save_for_backward(x, batch_sizes, y, *(t for group in (*groups, saved) for t in group))
    ctx.set_materialize_grads(False)


def _backward(
    ops: Any, ctx: Any, dy: Tensor | None, dfinal: list[Tensor | None], dsaved: list[Tensor | None]
) -> tuple:
    x, batch_sizes, y, *flat = ctx.saved_tensors
    *groups, param, saved = _unflatten(flat, ctx.lengths)
    state, projected = groups[0], bool(groups[5])
    need_dx, need_dstate = ctx.needs_input_grad[1:3]
    need_weights = [*ctx.needs_input_grad[3:8], *(ctx.needs_input_grad[11:] if param else ())]
    # The states of all steps but h. Of other kernels nobody gets them where they have gradients (plan.py).
    n_kept = len(state) - 1 if ops is torch.ops.fusedrnn and x.is_cpu else 0
    kept = slice(int(projected), int(projected) + n_kept)
    dkept: list[Tensor] = []
    if any(d is not None for d in dsaved[kept]):
        pairs = zip(saved[kept], dsaved[kept], strict=True)
        dkept = [torch.zeros_like(s) if d is None else d for s, d in pairs]
    if dy is None and all(d is None for d in dfinal) and not dkept:
        nothing = [[None] * n if n else [] for n in ctx.arguments]
        return (None, None, *nothing[:6], None, None, None, *_optional(ctx.rest, nothing[6:]))
    args = (
        ctx.cell,
        x,
        *groups,
        ctx.reverse,
        batch_sizes,
        ctx.tf32,
        y,
        saved,
        dy,
        [torch.zeros_like(s) if d is None else d for s, d in zip(state, dfinal, strict=True)],
        need_dx,
        any(any(need) for need in need_weights),
        *((dkept, param) if dkept or param else ()),
    )
    op = ops.sequence_backward.default
    dx, dstate, *dweights = op(*args) if torch.is_grad_enabled() else differentiable.below_autograd(op, args)
    lists = [_needed(dstate, need_dstate)]
    lists += [_needed(group, need) for group, need in zip(dweights, need_weights, strict=False)]
    return (
        None,
        dx if need_dx else None,
        *lists[:6],
        None,
        None,
        None,
        *_optional(ctx.rest, [*lists[6:], []]),
    )


def _optional(given: list[Any], grads: list[Any]) -> list[Any]:
    """The gradients of those optional lists that were given, None where None was."""
    return [None if group is None else grad for group, grad in zip(given, grads, strict=False)]


def _needed(grads: list[Tensor], need: list[bool]) -> list[Tensor | None]:
    return [g if n else None for g, n in zip(grads, need, strict=True)] if grads else [None] * len(need)


def _unflatten(flat: Sequence[Any], lengths: list[int]) -> list[Any]:
    tensors = iter(flat)
    return [[next(tensors) for _ in range(n)] for n in lengths]


def _save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    cell, x, *groups, reverse, batch_sizes, _ = inputs[:11]
    _, saved, dy, dfinal, _, _, *rest = inputs[11:]
    dkept, param = ([*(group or [] for group in rest), [], []])[:2]
    ctx.rest = [None if group is None else [] for group in rest]
    ctx.cell, ctx.reverse, ctx.n_saved = cell, reverse, len(saved)
    groups = [*groups, param, dfinal, dkept]
    ctx.lengths = [len(group) for group in groups]
    ctx.save_for_backward(x, batch_sizes, dy, *(t for group in groups for t in group))
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, ddx: Tensor | None, *ddgroups: list[Tensor | None]) -> tuple:
    """Differentiates the reference's backward.

    Everything the backward op reads (also ``y`` and what the forward saved) is a function of the forward's
    inputs, so the gradients with respect to those and to the incoming gradients are the whole of it.
    """
    x, batch_sizes, dy, *flat = ctx.saved_tensors
    has_dy, create_graph = dy is not None, torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # Aliases: one tensor may stand in two places, and one input may have been computed from another.
        x = _alias(x)
        *groups, dfinal, dkept = _unflatten([_alias(t) for t in flat], ctx.lengths)
        y, final, kept = _reference(CELL_BY_ID[ctx.cell], x, *groups, ctx.reverse, batch_sizes, bool(dkept))
        dy = _alias(torch.zeros_like(y) if dy is None else dy)
        inputs = [x, *(t for group in groups for t in group)]
        incoming = [dy, *dfinal, *(d.to(x.dtype) for d in dkept)]
        outputs = [y, *final, *kept]
        grads = torch.autograd.grad(outputs, inputs, incoming, create_graph=True, allow_unused=True)
        seeds = [ddx, *(t for group in ddgroups for t in (group or []))]
        if len(seeds) != len(inputs):  # the op was told that no weight gradients are needed
            seeds += [None] * (len(inputs) - len(seeds))
        pairs = [
            (g, s) for g, s in zip(grads, seeds, strict=True) if s is not None and g is not None and s.numel()
        ]
        wanted = [*inputs, dy, *dfinal, *dkept]
        result = (
            torch.autograd.grad(
                [g for g, _ in pairs],
                wanted,
                [s for _, s in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            if pairs
            else [None] * len(wanted)
        )
    dx, *flat = result
    *lengths, n_final, n_kept = ctx.lengths
    *dgroups, dparam, (ddy,), ddfinal, ddkept = _unflatten(flat, [*lengths, 1, n_final, n_kept])
    return (
        None,
        dx,
        *dgroups,
        None,
        None,
        None,
        None,
        [None] * ctx.n_saved,
        ddy if has_dy else None,
        ddfinal,
        None,
        None,
        *_optional(ctx.rest, [ddkept, dparam]),
    )


def _reference(
    cell: Cell, x: Tensor, state: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What the op computes, by the reference: input after input, if several lie side by side in x."""
    *weights, param, reverse, batch_sizes, all_states = rest
    K = inputs_of(x, weights[0])
    each = len(reverse) // K
    results = []
    for k, x_k in enumerate(x.chunk(K, -1)):
        own = slice(k * each, (k + 1) * each)
        groups = [group[own] for group in map(given, weights)]
        variation = Variation(peephole=param[own]) if param else PLAIN
        arguments: Any = (cell, x_k, [s[own] for s in state], *groups, reverse[own], batch_sizes)
        results.append(reference.layer(*(*arguments, variation, all_states)))
    ys, finals, kept = zip(*results, strict=True)
    return (
        torch.cat(ys, -1),
        [torch.cat(s) for s in zip(*finals, strict=True)],
        [torch.cat(s, -2) for s in zip(*kept, strict=True)],
    )


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _foreign(namespace: str) -> bool:
    """Whether the library that was loaded is of another version of this package."""
    ops = getattr(torch.ops, namespace)
    if not all(hasattr(ops, name) for name in ("sequence", "sequence_forward", "sequence_backward", "plan")):
        return True
    expected: dict[str, Any] = {"sequence": _fake_sequence, "sequence_backward": _fake_backward}
    return any(
        [argument.name for argument in getattr(ops, name).default._schema.arguments]
        != list(signature(function).parameters)
        for name, function in expected.items()
    )


for _name, _namespace, _reason in (
    (libraries.CPU, "fusedrnn", libraries.cpu_reason),
    (libraries.EMULATOR, "fusedrnn_emulator", libraries.emulator_reason),
):
    if not _reason() and _foreign(_namespace):
        libraries.set_aside(_name, "is of another version of this package; build it again")
    if not _reason():
        _register(_namespace)
_keep_alive.append(definition.define())
_register(definition.NAMESPACE)
