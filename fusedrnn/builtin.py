"""The built-in as a backend: one layer of the kernels behind ``torch.nn.LSTM``, ``GRU`` and ``RNN``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import CELLS, Cell


def sequence(
    cell: Cell,
    x: Tensor,
    state: Sequence[Tensor],
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Runs one layer; shapes as in :func:`fusedrnn.functional.sequence`."""
    parameters = in_order((weight_ih, weight_hh, bias_ih, bias_hh, weight_hr))
    return layer(cell, x, state, parameters, batch_sizes, biases=bool(bias_ih), directions=len(weight_hh))


def in_order(weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The parameters of a layer in the order in which torch's modules have them."""
    groups = [group for group in weights if group]
    return [group[n] for n in range(len(groups[0])) for group in groups]


def layer(
    cell: Cell,
    x: Tensor,
    state: Sequence[Tensor],
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    *,
    biases: bool,
    directions: int,
) -> tuple[Tensor, list[Tensor]]:
    """As :func:`sequence`, with the parameters :func:`in_order`, of which nothing is checked."""
    kernel = getattr(torch, cell.builtin)
    hx = tuple(state) if cell.states > 1 else state[0]
    # Outside training mode the built-in keeps nothing for a backward pass; with it, backward in eval mode
    # works.
    options = (parameters, biases, 1, 0.0, torch.is_grad_enabled(), directions == 2)
    if batch_sizes is None:
        y, *final = kernel(x, hx, *options, False)
    else:
        y, *final = kernel(x, batch_sizes, hx, *options)
    return y, final


def step(cell: Cell, x: Tensor, hx: Any, parameters: Sequence[Tensor | None]) -> Any:
    """Runs one step as torch's cells do: x ``[B, I]``, ``hx`` and what is returned in their form.

    Nothing is checked: the kernel may read past the end of weights that are too small.
    """
    return _STEPS[cell.builtin](x, hx, *parameters)


_STEPS = {cell.builtin: getattr(torch, f"{cell.builtin}_cell") for cell in CELLS.values() if cell.builtin}
