"""The recurrence as a plain loop of torch operations.

Any device, any floating dtype, differentiable any number of times: what every kernel is held against, and
what differentiates a kernel's backward. It rounds where the kernels round: ``h`` to the dtype of ``x`` at
every step, everything else in :func:`fusedrnn.cells.compute_dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .cells import Cell, compute_dtype
from .checks import check


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
    """Runs N recurrences; shapes and errors as in :func:`fusedrnn.functional.sequence`."""
    check(cell, x, state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse, batch_sizes)
    outputs: list[Tensor] = []
    finals: list[list[Tensor]] = []
    for n, backwards in enumerate(reverse):
        y, final = _recurrence(
            cell,
            x,
            [s[n] for s in state],
            weight_ih[n],
            weight_hh[n],
            bias_ih[n] if bias_ih else None,
            bias_hh[n] if bias_hh else None,
            weight_hr[n] if weight_hr else None,
            backwards,
            batch_sizes,
        )
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs, -1), [torch.stack(states) for states in zip(*finals, strict=True)]


def _recurrence(
    cell: Cell,
    x: Tensor,
    state: list[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    backwards: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    dtype, compute = x.dtype, compute_dtype(x.dtype)

    def product(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(a.to(compute), weight.to(compute), None if bias is None else bias.to(compute))

    hidden = weight_hh.size(0) // cell.gates
    gx = product(x, weight_ih, bias_ih).unflatten(-1, (cell.gates, hidden))  # [T, B, G, H] or [rows, G, H]
    steps = gx.split(batch_sizes.tolist()) if batch_sizes is not None else gx.unbind(0)
    carried = [state[0], *(s.to(compute) for s in state[1:])]
    outputs: list[Tensor] = []
    for gx_t in reversed(steps) if backwards else steps:
        # With batch_sizes only the longest sequences, which come first, take part in every step.
        active = [s[: gx_t.size(0)] for s in carried]
        gh = product(active[0], weight_hh, bias_hh).unflatten(-1, (cell.gates, hidden))
        new = list(cell.step(gx_t, gh, (active[0].to(compute), *active[1:])))
        if weight_hr is not None:
            new[0] = product(new[0], weight_hr)
        new[0] = new[0].to(dtype)
        outputs.append(new[0])
        carried = [torch.cat((a, s[a.size(0) :])) for a, s in zip(new, carried, strict=True)]
    if backwards:
        outputs.reverse()
    y = torch.cat(outputs) if batch_sizes is not None else torch.stack(outputs)
    return y, [s.to(dtype) for s in carried]
