"""The functional interface: one layer's recurrences in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autocast, backend, builtin, env, onnx, ops, reference
from .cells import Cell, get_cell
from .checks import check
from .plan import KERNELS, Plan, Problem, make_plan
from .variation import PLAIN, Variation


class Weights(NamedTuple):
    """The parameters of one layer: in each field one tensor per recurrence, in torch's layout.

    Attributes:
        ih: input weights, each ``[G*H, I]``.
        hh: recurrent weights, each ``[G*H, H]``, or ``[G*H, P]`` with a projection.
        bias_ih: input biases, each ``[G*H]``; empty for no bias.
        bias_hh: recurrent biases, each ``[G*H]``; empty for no bias.
        hr: projections, each ``[P, H]``; empty for none.
    """

    ih: Sequence[Tensor]
    hh: Sequence[Tensor]
    bias_ih: Sequence[Tensor] = ()
    bias_hh: Sequence[Tensor] = ()
    hr: Sequence[Tensor] = ()


def sequence(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Weights,
    *,
    reverse: Sequence[bool] = (False,),
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Runs N independent recurrences over a sequence.

    Of float32 CUDA tensors, the products inside the recurrence take tf32 operands where cuDNN's do, as
    ``torch.backends.cudnn.rnn.fp32_precision`` says. The products over all steps (of the input, and of the
    gradients) follow ``torch.backends.cuda.matmul``, as any matrix product does, and so do those of a
    recurrence that has to go step by step.

    Args:
        cell: a registered cell: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        x: input ``[T, B, I]`` of any strides, or packed rows ``[sum(batch_sizes), I]``; float32, float64,
            bfloat16 or float16.
        state: the S initial states, ``h [N, B, H]`` (``[N, B, P]`` with a projection) and for LSTM
            ``c [N, B, H]``, of the dtype and device of ``x``.
        weights: the parameters, likewise.
        reverse: for each recurrence, whether it runs from the last step to the first.
        batch_sizes: for packed rows, how many sequences are alive at each step: int64 ``[T]`` on the CPU,
            positive and not increasing, as in :class:`torch.nn.utils.rnn.PackedSequence`.

    Returns:
        ``y``, the ``h`` of every step, ``[T, B, N*H]`` (packed: ``[rows, N*H]``), and the S final states,
        shaped as the initial ones. Row t of ``y`` has consumed row t of ``x``, whichever way the recurrence
        runs.

    Raises:
        ValueError: unknown cell.
        RuntimeError: shapes, dtypes or devices do not fit, or the forced backend cannot serve the call.
    """
    return layer(cell, x, state, weights, reverse=reverse, batch_sizes=batch_sizes)[:2]


def layer(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Weights,
    *,
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    variation: Variation = PLAIN,
    all_states: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Runs N recurrences as :func:`sequence` does, with what the modules have beyond it.

    Args as :func:`sequence`, and:
        variation: what the recurrences do beyond their cell.
        all_states: whether to return the states of all steps.

    Returns:
        What :func:`sequence` returns, and with ``all_states`` for every state but ``h`` its values after each
        step, ``[T, B, N, H]`` or ``[rows, N, H]``; else nothing that has a meaning.

    Raises:
        ValueError, RuntimeError: as :func:`sequence`.
    """
    spec = get_cell(cell)
    plan = plan_layer(spec, x, weights, reverse, batch_sizes, variation, all_states)
    extras = (variation, all_states)
    return _run(plan, spec, x, state, weights, reverse, batch_sizes, extras, promote=batch_sizes is not None)


def plain_layer(
    cell: str, x: Tensor, state: Sequence[Tensor], weights: Weights, reverse: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """Runs N recurrences as :func:`sequence` does, outside autocast and export, with no more work than that.

    Raises:
        ValueError, RuntimeError: as :func:`sequence`, though the words may be torch's.
    """
    spec = get_cell(cell)
    plan = plan_layer(spec, x, weights, reverse, None, PLAIN, False)
    if plan.backend in KERNELS:
        y, final, _ = ops.sequence(plan.backend, spec, x, state, *weights, reverse, None)
        return y, final
    if plan.backend != "torch":
        return reference.layer(spec, x, state, *weights, reverse, None, PLAIN, False)[:2]
    parameters = builtin.in_order(weights)
    if not left_to_builtin(cell, x, state, parameters):
        check(spec, x, state, *weights, reverse, None)
        _leave_to_builtin(cell, x, state, parameters)
    return builtin.layer(spec, x, state, parameters, biases=bool(weights.bias_ih), directions=len(reverse))


def step(cell: str, x: Tensor, state: Sequence[Tensor], weights: Weights) -> list[Tensor]:
    """Runs one step of one recurrence: what a cell module does.

    Args:
        cell: a registered cell.
        x: input ``[B, I]``.
        state: the S states, each ``[B, H]``, of the dtype and device of ``x``.
        weights: the parameters, one tensor in each field.

    Returns:
        The S next states, each ``[B, H]``.

    Raises:
        ValueError, RuntimeError: as :func:`sequence`.
    """
    spec = get_cell(cell)
    rows = x.unsqueeze(0)
    plan = plan_layer(spec, rows, weights, (False,), None, PLAIN, False, True)
    stacked = [s.unsqueeze(0) for s in state]
    if plan.backend == "torch":
        parameters = [t for group in weights for t in group]
        if not left_to_builtin(cell, x, state, parameters, one_step=True):
            check(spec, rows, stacked, *weights, (False,), None, mixed_dtypes=autocast.enabled(x))
            _leave_to_builtin(cell, x, state, parameters, one_step=True)
        new = builtin.step(spec, x, tuple(state) if spec.states > 1 else state[0], parameters)
        return list(new) if spec.states > 1 else [new]
    _, final, _ = _run(plan, spec, rows, stacked, weights, (False,), None, (PLAIN, False), promote=True)
    return [s.squeeze(0) for s in final]


def left_to_builtin(
    cell: str,
    x: Tensor,
    state: Iterable[Tensor],
    parameters: Iterable[Tensor],
    *,
    one_step: bool = False,
) -> bool:
    """Whether a call of one plain layer, or of one step, is known to be left to the built-in, and to fit it.

    The built-in reads past the end of weights that are too small and takes some tensors of another dtype or
    device; and where its kernel is the quickest, a plan and checks would take as long as the kernel.

    Args:
        cell, x, state: as in :func:`sequence`, or in :func:`step`.
        parameters: all that there are, in the order in which torch's modules have them.
        one_step: whether the call is one of :func:`step`.
    """
    return _kind(cell, x, state, parameters, one_step) in _left_to_builtin


def _leave_to_builtin(
    cell: str,
    x: Tensor,
    state: Iterable[Tensor],
    parameters: Iterable[Tensor],
    *,
    one_step: bool = False,
) -> None:
    """Remembers that the built-in serves such calls and that this one fits."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return  # sizes may be symbols
    if len(_left_to_builtin) >= _MANY:
        _left_to_builtin.clear()
    _left_to_builtin.add(_kind(cell, x, state, parameters, one_step))


def _kind(
    cell: str, x: Tensor, state: Iterable[Tensor], parameters: Iterable[Tensor], one_step: bool
) -> tuple:
    """All that the plan and the checks of such a call depend on; directions follow from the parameters."""
    return (
        cell,
        one_step,
        torch.is_grad_enabled(),
        autocast.enabled(x),
        _transforms(),
        backend.forced(),
        *map(_facts, (x, *state, *parameters)),
    )


_facts = attrgetter("__class__", "shape", "dtype", "device")
_left_to_builtin: set[tuple] = set()


def _run(
    plan: Plan,
    cell: Cell,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Weights,
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    extras: tuple[Variation, bool],
    *,
    promote: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    mixed = autocast.enabled(x)
    if plan.backend == "torch":
        check(cell, x, state, *weights, reverse, batch_sizes, mixed_dtypes=mixed)
        return *builtin.sequence(cell, x, state, *weights, batch_sizes), []
    if onnx.exporting():
        variation, all_states = extras
        if all_states or variation.names():
            raise RuntimeError("ONNX has no recurrent operator with options of fusedrnn")
        return *onnx.sequence(cell, x, state, *weights, reverse, batch_sizes), []
    if not mixed:
        return _serve(plan.backend, cell, x, state, *weights, reverse, batch_sizes, *extras)
    device, uncast = x.device.type, (x, state, *weights)
    args: Any = autocast.cast(cell, device, uncast, promote=promote)
    with torch.autocast(device, enabled=False):
        y, final, states = _serve(plan.backend, cell, *args, reverse, batch_sizes, *extras)
    autocast.widen(cell, device, uncast, final)
    return y, final, states


def _serve(backend: str, *call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return ops.sequence(backend, *call) if backend in KERNELS else reference.layer(*call)


def plan_layer(
    cell: Cell,
    x: Tensor,
    weights: Weights,
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    variation: Variation,
    all_states: bool,
    one_step: bool = False,
) -> Plan:
    """The plan of a call of :func:`layer`, or of :func:`step`, whose ``x`` is ``[1, B, I]`` here.

    Raises:
        RuntimeError: ranks do not fit, or no backend serves the call.
    """
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        raise RuntimeError(f"x must be {'2-D' if packed else '3-D'}, got {x.dim()}-D")
    if not weights.hh or weights.hh[0].dim() != 2:
        raise RuntimeError("weights must have one tensor per recurrence, weight_hh [G*H, H]")
    call = (cell, x, weights, reverse, batch_sizes, variation, all_states, one_step)
    if torch.compiler.is_compiling() or type(x) is not Tensor or variation is not PLAIN:
        return make_plan(_problem(*call), *_standing())  # sizes may be symbols
    # A short call is over before a plan is made: what a problem is made of is quicker to compare.
    key = (
        cell.name,
        x.shape,
        x.dtype,
        x.device,
        weights.hh[0].shape,
        weights.hr[0].shape if weights.hr else None,
        tuple(reverse),
        batch_sizes.shape if batch_sizes is not None else None,
        all_states,
        one_step,
        torch.is_grad_enabled(),
        autocast.enabled(x),
        _transforms(),
        backend.forced(),
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MANY:
            _plans.clear()
        plan = _plans[key] = make_plan(_problem(*call), *_standing())
    return plan


_plans: dict[tuple, Plan] = {}
_MANY = 4096


@contextmanager
def watched_plans(see: Callable[..., None]) -> Iterator[None]:
    """Inside the block every call is planned, and ``see`` is called with the plan and what it was made of."""
    make = plan_layer

    def planned(*call: Any) -> Plan:
        plan = make(*call)
        see(plan, *call)
        return plan

    with mock.patch.multiple(__name__, plan_layer=planned, left_to_builtin=lambda *_, **__: False):
        yield


def _problem(
    cell: Cell,
    x: Tensor,
    weights: Weights,
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    variation: Variation,
    all_states: bool,
    one_step: bool,
) -> Problem:
    transformed, mapped = _transforms()
    return Problem(
        cell=cell.name,
        device=x.device.type,
        dtype=x.dtype,
        T=batch_sizes.numel() if batch_sizes is not None else x.size(0),
        B=x.size(0) // max(batch_sizes.numel(), 1) if batch_sizes is not None else x.size(1),
        I=x.size(-1),
        H=weights.hh[0].size(0) // cell.gates,
        P=weights.hr[0].shape[0] if weights.hr and weights.hr[0].dim() else 0,
        reverse=tuple(reverse),
        training=torch.is_grad_enabled(),
        packed=batch_sizes is not None,
        autocast=autocast.enabled(x),
        transformed=transformed,
        mapped=mapped,
        compiling=torch.compiler.is_compiling(),
        capability=_capability(x) if x.is_cuda else None,
        interpreted=env.interpreted(),
        options=() if variation is PLAIN else variation.names(),
        all_states=all_states,
        one_step=one_step,
    )


def _standing() -> tuple[dict[str, str], str | None]:
    """What is available and what is forced."""
    return backend.reasons(), backend.forced()


def _capability(x: Tensor) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(x.device)
    return properties.major, properties.minor


def _transforms() -> tuple[bool, bool]:
    """Whether the call is inside transforms that only the reference can; or inside those that our ops can."""
    if forward_ad._current_level >= 0:
        return True, False
    if torch._C._functorch.maybe_current_level() is None:
        return False, False
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    kind = torch._C._functorch.TransformType
    others = set(kinds) - {kind.Vmap, kind.Grad}
    return (True, False) if others or kinds.count(kind.Grad) > 1 else (False, True)


# What torch.compiler.assume_constant_result does, which would import the compiler: a compiled call keeps the
# backends that could serve where it was compiled; the compiler itself compiles again for other transforms.
_constants: tuple[Any, ...] = (_standing, _transforms, env.interpreted)
for _constant in _constants:
    _constant._dynamo_marked_constant = True
