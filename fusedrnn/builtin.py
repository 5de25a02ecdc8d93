"""The built-in as a backend: one layer of the kernels behind ``torch.nn.LSTM``, ``GRU`` and ``RNN``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autocast
from .cells import Cell
from .checks import check_once


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
    kernel = getattr(torch, cell.builtin)
    groups = [g for g in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if g]
    parameters = [g[n] for n in range(len(weight_hh)) for g in groups]
    hx = tuple(state) if cell.states > 1 else state[0]
    # Outside training mode the built-in keeps nothing for a backward pass; with it, backward in eval mode
    # works.
    train = torch.is_grad_enabled()
    options = (parameters, bool(bias_ih), 1, 0.0, train, len(weight_hh) == 2)
    if batch_sizes is None:
        y, *final = kernel(x, hx, *options, False)
    else:
        y, *final = kernel(x, batch_sizes, hx, *options)
    return y, final


def step(cell: Cell, x: Tensor, state: Sequence[Tensor], weights: Any) -> list[Tensor]:
    """Runs one step by the kernel behind the built-in's cell: x ``[B, I]``, states ``[B, H]``."""
    check_once(cell, x, state, weights, mixed_dtypes=autocast.enabled(x))
    kernel = getattr(torch, f"{cell.builtin}_cell")
    parameters = [group[0] for group in weights[:4] if group]
    new = kernel(x, tuple(state) if cell.states > 1 else state[0], *parameters)
    return list(new) if cell.states > 1 else [new]
