"""What ``torch.onnx.export`` makes of a layer call: one standard operator, ``LSTM``, ``GRU`` or ``RNN``.

The exporter is given a module. A program that ``torch.export`` made before holds our ops, which it
does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import Cell
from .checks import check


class _Operator(NamedTuple):
    """How ONNX has a cell: operator, its order of our gates, attributes; activations for each recurrence."""

    name: str
    gates: tuple[int, ...]
    activations: tuple[str, ...] = ()
    attributes: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it


_OPERATORS = {
    "lstm": _Operator("LSTM", (0, 3, 1, 2)),  # i o f g
    "gru": _Operator("GRU", (1, 0, 2), attributes={"linear_before_reset": 1}),  # z r n
    "rnn_tanh": _Operator("RNN", (0,), ("Tanh",)),
    "rnn_relu": _Operator("RNN", (0,), ("Relu",)),
}
_DIRECTIONS = {(False,): "forward", (True,): "reverse", (False, True): "bidirectional"}


def exporting() -> bool:
    """Whether ``torch.onnx.export`` is tracing."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


_marked: Any = exporting
_marked._dynamo_marked_constant = True


def sequence(
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
) -> tuple[Tensor, list[Tensor]]:
    """Puts the operator in the place of a layer call; shapes as in :func:`fusedrnn.functional.sequence`.

    Raises:
        RuntimeError: there is no operator for the cell, directions, projection or packed input.
    """
    check(cell, x, state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse, batch_sizes)
    operator, direction = _OPERATORS.get(cell.name), _DIRECTIONS.get(tuple(reverse))
    for refused, what in (
        (operator is None, f"for the cell {cell.name!r}"),
        (direction is None, f"for recurrences of directions {list(reverse)}"),
        (bool(weight_hr), "with a projection"),
        (batch_sizes is not None, "for packed input; export a model that takes padded input"),
    ):
        if refused:
            raise RuntimeError(f"ONNX has no recurrent operator {what}")
    assert operator is not None
    T, B, _ = x.shape
    N, H = len(reverse), weight_hh[0].size(1)

    def stacked(weights: Sequence[Tensor]) -> Tensor:  # [N, G*H, ...], gates in the operator's order
        by_gate = torch.stack(list(weights)).unflatten(1, (cell.gates, H))
        return torch.cat([by_gate[:, g] for g in operator.gates], 1)

    bias = torch.cat((stacked(bias_ih), stacked(bias_hh)), 1) if bias_ih else None
    attributes = {"hidden_size": H, "direction": direction, **operator.attributes}
    if operator.activations:
        attributes["activations"] = operator.activations * N
    y, *final = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        # The fifth is for the lengths of sequences.
        [x, stacked(weight_ih), stacked(weight_hh), bias, None, *state],
        attributes,
        dtypes=[x.dtype] * (1 + cell.states),
        shapes=[[T, N, B, H]] + [[N, B, H]] * cell.states,
    )
    return y.transpose(1, 2).flatten(2), final  # [T, N, B, H] -> [T, B, N*H]
