"""The cell registry: what every backend and every test enumerates.

A cell is the maths of one step. ``step`` is its differentiable torch form, used by the reference backend; the
C++ form of the same cell is in ``csrc/cells``, its Triton form in ``triton/cells.py``. Gate order and
equations are those of ``torch.nn``. :func:`register_cell` adds a cell that has no C++ form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One recurrent cell.

    Attributes:
        name: the registry key.
        id: the number that stands for the cell in the ops' schemas (``CellId`` in ``csrc/sequence.h``).
        gates: G, rows of gates in the weights, in units of H.
        states: S, tensors carried from step to step; the first is ``h``.
        saved: values per unit and step that the C++ forward keeps for its backward.
        step: ``(gx [..., G, H], gh [..., G, H], state) -> state``.
        reads_h: whether ``step`` reads ``h`` itself, not only through gh; such a cell cannot project it.
        shares_gates: whether the gradients of ``gx`` and ``gh`` are the same: a cell of ``gx + gh`` alone.
        builtin: the name of torch's own kernel, ``torch.<builtin>``; empty if it has none.
        compiled: whether it has a C++ form.
        triton: its Triton functions ``(forward, backward)``, if they are not in ``triton/cells.py``.
    """

    name: str
    id: int
    gates: int
    states: int
    saved: int
    step: Callable[[Tensor, Tensor, State], State]
    reads_h: bool
    shares_gates: bool
    builtin: str = ""
    compiled: bool = False
    triton: tuple[Any, Any] | None = None

    def triton_functions(self) -> tuple[Any, Any] | None:
        """The Triton functions ``(forward, backward)``, or None if there are none."""
        if self.triton is None and self.compiled:
            from .triton import cells

            return getattr(cells, f"{self.name}_forward"), getattr(cells, f"{self.name}_backward")
        return self.triton


def lstm_step(
    gx: Tensor,
    gh: Tensor,
    state: State,
    peephole: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> State:
    """One LSTM step: ``peephole`` ``[3, H]`` lets i, f and o see c, ``norm`` is what h sees of c."""
    i, f, g, o = (gx + gh).unbind(-2)
    c = state[1]
    if peephole is not None:
        i, f = i + peephole[0] * c, f + peephole[1] * c
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    if peephole is not None:
        o = o + peephole[2] * c
    return o.sigmoid() * (c if norm is None else norm(c)).tanh(), c


def _lstm(gx: Tensor, gh: Tensor, state: State) -> State:
    return lstm_step(gx, gh, state)


def _gru(gx: Tensor, gh: Tensor, state: State) -> State:
    (rx, zx, nx), (rh, zh, nh) = gx.unbind(-2), gh.unbind(-2)
    z = (zx + zh).sigmoid()
    n = (nx + (rx + rh).sigmoid() * nh).tanh()
    return (n + z * (state[0] - n),)


def _rnn_tanh(gx: Tensor, gh: Tensor, state: State) -> State:
    return ((gx + gh).squeeze(-2).tanh(),)


def _rnn_relu(gx: Tensor, gh: Tensor, state: State) -> State:
    return ((gx + gh).squeeze(-2).relu(),)


def _builtin(name: str, number: int, **fields: Any) -> Cell:
    return Cell(name, number, builtin=name, compiled=True, **fields)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        _builtin("lstm", 0, gates=4, states=2, saved=4, step=_lstm, reads_h=False, shares_gates=True),
        _builtin("gru", 1, gates=3, states=1, saved=4, step=_gru, reads_h=True, shares_gates=False),
        _builtin("rnn_tanh", 2, gates=1, states=1, saved=0, step=_rnn_tanh, reads_h=False, shares_gates=True),
        _builtin("rnn_relu", 3, gates=1, states=1, saved=0, step=_rnn_relu, reads_h=False, shares_gates=True),
    )
}
# An LSTM with parameters, which only the option of that name asks for: kernels have it as a cell of its own.
PEEPHOLE = Cell("lstm_peephole", 4, 4, 2, 4, _lstm, reads_h=False, shares_gates=True, compiled=True)
CELL_BY_ID: dict[int, Cell] = {cell.id: cell for cell in (*CELLS.values(), PEEPHOLE)}


def get_cell(name: str) -> Cell:
    """Returns the registered cell.

    Raises:
        ValueError: no cell of that name is registered.
    """
    try:
        return CELLS[name]
    except KeyError:
        raise ValueError(f"unknown cell {name!r}; registered: {', '.join(CELLS)}") from None


def register_cell(
    name: str,
    step: Callable[[Tensor, Tensor, State], State],
    *,
    gates: int,
    states: int = 1,
    reads_h: bool = True,
    shares_gates: bool = False,
    triton: tuple[Any, Any] | None = None,
) -> Cell:
    """Adds a cell, for :func:`fusedrnn.functional.sequence` and :class:`fusedrnn.Layer`.

    Args:
        name: what the cell is called by.
        step: one step in differentiable torch operations, ``(gx [..., G, H], gh [..., G, H], state) ->
            state``: the reference backend, on any device and differentiable any number of times.
        gates: G, rows of gates in the weights, in units of H.
        states: S, tensors carried from step to step; the first is ``h``.
        reads_h: whether ``step`` reads ``state[0]`` itself, not only through ``gh``.
        shares_gates: whether ``step`` reads nothing but the sum ``gx + gh``.
        triton: the functions ``(forward, backward)`` of the same step for the triton backend: see
            docs/writing_a_cell.md. None: only the reference backend has the cell.

    Raises:
        ValueError: the name is taken, or there are no gates or states.
    """
    if name in CELLS:
        raise ValueError(f"a cell {name!r} is registered already")
    if gates < 1 or states < 1:
        raise ValueError(f"a cell needs at least one gate and one state, got {gates} and {states}")
    cell = Cell(name, len(CELL_BY_ID), gates, states, gates, step, reads_h, shares_gates, triton=triton)
    CELLS[name] = CELL_BY_ID[cell.id] = cell
    return cell


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gates, the cell state and gradients are carried in: fp32 for 16-bit inputs."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
