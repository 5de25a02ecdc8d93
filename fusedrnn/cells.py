"""The cell registry: what every backend and every test enumerates.

A cell is the maths of one step. ``step`` is its differentiable torch form, used by the reference backend; the
C++ form of the same cell is in ``csrc/cells``. Gate order and equations are those of ``torch.nn``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        builtin: the name of torch's own kernel, ``torch._VF.<builtin>``.
    """

    name: str
    id: int
    gates: int
    states: int
    saved: int
    step: Callable[[Tensor, Tensor, State], State]
    reads_h: bool
    builtin: str


def _lstm(gx: Tensor, gh: Tensor, state: State) -> State:
    i, f, g, o = (gx + gh).unbind(-2)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gx: Tensor, gh: Tensor, state: State) -> State:
    (rx, zx, nx), (rh, zh, nh) = gx.unbind(-2), gh.unbind(-2)
    z = (zx + zh).sigmoid()
    n = (nx + (rx + rh).sigmoid() * nh).tanh()
    return (n + z * (state[0] - n),)


def _rnn_tanh(gx: Tensor, gh: Tensor, state: State) -> State:
    return ((gx + gh).squeeze(-2).tanh(),)


def _rnn_relu(gx: Tensor, gh: Tensor, state: State) -> State:
    return ((gx + gh).squeeze(-2).relu(),)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("lstm", 0, gates=4, states=2, saved=4, step=_lstm, reads_h=False, builtin="lstm"),
        Cell("gru", 1, gates=3, states=1, saved=4, step=_gru, reads_h=True, builtin="gru"),
        Cell("rnn_tanh", 2, gates=1, states=1, saved=0, step=_rnn_tanh, reads_h=False, builtin="rnn_tanh"),
        Cell("rnn_relu", 3, gates=1, states=1, saved=0, step=_rnn_relu, reads_h=False, builtin="rnn_relu"),
    )
}
CELL_BY_ID: dict[int, Cell] = {cell.id: cell for cell in CELLS.values()}


def get_cell(name: str) -> Cell:
    """Returns the registered cell.

    Raises:
        ValueError: no cell of that name is registered.
    """
    try:
        return CELLS[name]
    except KeyError:
        raise ValueError(f"unknown cell {name!r}; registered: {', '.join(CELLS)}") from None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gates, the cell state and gradients are carried in: fp32 for 16-bit inputs."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
