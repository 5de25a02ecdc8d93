"""The functional interface: one layer's recurrences in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, builtin, ops, reference
from .cells import Cell, get_cell
from .plan import Plan, Problem, make_plan


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

    Args:
        cell: a registered cell: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        x: input ``[T, B, I]`` of any strides, or packed rows ``[sum(batch_sizes), I]``; float32, float64,
            bfloat16 or float16.
        state: the S initial states, ``h [N, B, H]`` (``[N, B, P]`` with a projection) and for LSTM
            ``c [N, B, H]``, of the dtype and device of ``x``.
        weights: the parameters, likewise.
        reverse: for each recurrence, whether it runs from the last step to the first.
        batch_sizes: for packed rows, how many sequences are alive at each step: int64 ``[T]`` on the CPU, positive
            and not increasing, as in :class:`torch.nn.utils.rnn.PackedSequence`.

    Returns:
        ``y``, the ``h`` of every step, ``[T, B, N*H]`` (packed: ``[rows, N*H]``), and the S final states, shaped
        as the initial ones. Row t of ``y`` has consumed row t of ``x``, whichever way the recurrence runs.

    Raises:
        ValueError: unknown cell.
        RuntimeError: shapes, dtypes or devices do not fit, or the forced backend cannot serve the call.
    """
    spec = get_cell(cell)
    device = x.device.type
    plan = _plan(spec, x, weights, reverse, batch_sizes)
    if plan.backend == "torch":
        return builtin.sequence(spec, x, state, *weights, batch_sizes)
    args = (x, state, *weights)
    if device in ops.AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        args = ops.autocast_arguments(spec, device, args)
        with torch.autocast(device, enabled=False):
            return _run(plan, spec, args, reverse, batch_sizes)
    return _run(plan, spec, args, reverse, batch_sizes)


def _run(
    plan: Plan, cell: Cell, args: tuple, reverse: Sequence[bool], batch_sizes: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    if plan.backend == "reference":
        ops.check(cell, *args, reverse, batch_sizes)
        return reference.sequence(cell.name, *args, reverse, batch_sizes)
    return ops.sequence(cell, *args, reverse, batch_sizes)


def _plan(
    cell: Cell, x: Tensor, weights: Weights, reverse: Sequence[bool], batch_sizes: Tensor | None
) -> Plan:
    packed = batch_sizes is not None
    problem = Problem(
        cell=cell.name,
        device=x.device.type,
        dtype=x.dtype,
        T=batch_sizes.numel() if batch_sizes is not None else x.size(0),
        B=x.size(0) // max(batch_sizes.numel(), 1) if batch_sizes is not None else x.size(1),
        I=x.size(-1),
        H=weights.hh[0].size(0) // cell.gates,
        P=weights.hr[0].size(0) if weights.hr else 0,
        reverse=tuple(reverse),
        training=torch.is_grad_enabled(),
        packed=packed,
    )
    return make_plan(problem, backend.reasons(), backend.forced())
