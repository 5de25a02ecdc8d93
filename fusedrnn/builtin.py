"""The built-in as a backend: one layer of the kernels behind ``torch.nn.LSTM``, ``GRU`` and ``RNN``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cells import Cell


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
    kernel = getattr(torch._VF, cell.builtin)
    groups = [g for g in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if g]
    parameters = [w for recurrence in zip(*groups, strict=True) for w in recurrence]
    hx = tuple(state) if cell.states > 1 else state[0]
    # Outside training mode the built-in keeps nothing for a backward pass; with it, backward in eval mode works.
    train = torch.is_grad_enabled()
    options = (parameters, bool(bias_ih), 1, 0.0, train, len(weight_hh) == 2)
    if batch_sizes is None:
        y, *final = kernel(x, hx, *options, False)
    else:
        y, *final = kernel(x, batch_sizes, hx, *options)
    return y, final
