"""What the ops of ``definition.py`` do: what ``csrc/ops`` is to the compiled libraries.

As there, no gates are kept: h of every step is known once the forward has ended, so the backward computes all
gates again in one product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import launch, schedule
from .call import Call, columns, multiply


def sequence(*layer: Any) -> tuple[Tensor, list[Tensor]]:
    y, final, _ = _forward(Call.of(*layer), False)
    return y, final


def sequence_forward(*layer: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return _forward(Call.of(*layer), True)


@torch.no_grad()
def _forward(call: Call, training: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    rows, N, H = call.rows, call.N, call.H
    with launch.device_of(call.x):
        schedule.check_earlier_launches(call.x)
        gx = call.empty(rows, N, call.G, H, dtype=call.compute)
        y = call.empty(rows, N, call.P, dtype=call.dtype)
        kept: list[Tensor | None] = [None] * call.S
        if call.projected:
            kept[0] = call.empty(rows, N, H, dtype=call.compute)
        for j in range(1, call.S if training else 1):
            kept[j] = call.empty(rows, N, H, dtype=call.compute)
        if rows:
            call.multiply_input(gx)
            f = launch.Forward(gx, y, kept)
            final = schedule.run(call, False, partial(launch.forward, call, f))
        else:
            final = [s.clone() for s in call.state]
    saved = [call.shaped_as_x(k, N, H) for k in kept if k is not None]
    return call.shaped_as_x(y, N * call.P), final, saved if training else []


@torch.no_grad()
def sequence_backward(*arguments: Any) -> tuple[Any, ...]:
    *layer, y, saved, dy, dfinal, need_dx, need_dweights = arguments
    call = Call.of(*layer)
    _check(call, y, saved, dy, dfinal)
    rows, N, G, H, P = call.rows, call.N, call.G, call.H, call.P
    recomputes, apart = call.cell.saved > 0, not call.cell.shares_gates
    with launch.device_of(call.x):
        schedule.check_earlier_launches(call.x)
        dgx = call.empty(rows, N, G, H, dtype=call.dtype)
        kept = [s.contiguous().view(rows, N, H) for s in saved]
        p = launch.Backward(
            gx=call.empty(rows, N, G, H, dtype=call.compute) if recomputes else None,
            gh=call.empty(rows, N, G, H, dtype=call.compute) if recomputes and apart else None,
            h_previous=call.empty(rows, N, P, dtype=call.dtype),
            y=y.contiguous().view(rows, N, P),
            kept=kept if call.projected else [None, *kept],
            dy=None if dy is None else dy.contiguous().view(rows, N, P),
            dfinal=dfinal,
            dgx=dgx,
            dgh=torch.empty_like(dgx) if apart else dgx,
            dprojected=call.empty(rows, N, P, dtype=call.compute) if call.projected else None,
        )
        dstate = [d.clone() for d in dfinal]
        if rows:
            launch.fill_previous(call, p.y, p.h_previous)
            _multiply_gates(call, p)
            dstate = schedule.run(call, True, partial(launch.backward, call, p))
        return _gradients(call, p, dstate, need_dx, need_dweights)


def _multiply_gates(call: Call, p: launch.Backward) -> None:
    """Computes the gates again: W_ih x + W_hh h into gx, or W_hh h apart into gh."""
    if p.gx is None:
        return
    if p.gh is None:
        x = call.input_rows()
        for n, weights in enumerate(zip(call.weight_ih, call.weight_hh, strict=True)):
            both = torch.cat((call.input_of(x, n), p.h_previous[:, n]), 1)
            multiply(columns(p.gx, n), both, torch.cat(weights, 1).t())
        return
    call.multiply_input(p.gx)
    for n, weight in enumerate(call.weight_hh):
        multiply(columns(p.gh, n), p.h_previous[:, n], weight.t())


def _gradients(
    call: Call, p: launch.Backward, dstate: list[Tensor], need_dx: bool, need_dweights: bool
) -> tuple[Any, ...]:
    def product(a: Tensor, b: Tensor) -> Tensor:  # rounded once, to the dtype of the weights
        out = call.empty(a.size(1), b.size(1), dtype=call.compute)
        multiply(out, a.t(), b)
        return out.to(call.dtype)

    def sums(a: Tensor) -> Tensor:
        return a.sum(0, dtype=call.compute).to(call.dtype)

    dweights: list[list[Tensor]] = [[], [], [], [], []]
    x = call.input_rows()
    for n in range(call.N if need_dweights else 0):
        dgx, dgh = columns(p.dgx, n), columns(p.dgh, n)
        dweights[0].append(product(dgx, call.input_of(x, n)))
        dweights[1].append(product(dgh, p.h_previous[:, n]))
        if call.bias_ih:
            dweights[2].append(sums(dgx))
            dweights[3].append(dweights[2][n].clone() if p.dgh is p.dgx else sums(dgh))
        if p.dprojected is not None:
            dweights[4].append(product(p.dprojected[:, n], p.kept[0][:, n]))  # type: ignore[index]
    dx = call.empty(0, dtype=call.dtype)
    if need_dx:
        each = call.N // call.K  # recurrences of an input
        parts = []
        for n in range(0, call.N, each):
            dgx = p.dgx[:, n : n + each].flatten(1)
            if not dgx.is_cuda:
                dgx = dgx.to(call.compute)
            parts.append((dgx @ torch.cat(call.weight_ih[n : n + each]).to(dgx.dtype)).to(call.dtype))
        dx = (parts[0] if call.K == 1 else torch.cat(parts, 1)).view(call.x.shape)
    return dx, dstate, *dweights


def _check(call: Call, y: Tensor, saved: list[Tensor], dy: Tensor | None, dfinal: list[Tensor]) -> None:
    def fits(t: Tensor, dtype: torch.dtype, *tail: int) -> bool:
        return t.device == call.x.device and t.dtype == dtype and t.shape == (*call.x.shape[:-1], *tail)

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(message)

    require(fits(y, call.dtype, call.N * call.P), "y does not fit x")
    require(dy is None or fits(dy, call.dtype, call.N * call.P), "dy does not fit x")
    kept = call.S - (0 if call.projected else 1)
    require(
        len(saved) == kept and all(fits(s, call.compute, call.N, call.H) for s in saved),
        "saved must be what sequence_forward returned",
    )
    require(len(dfinal) == call.S, "one gradient per state is needed")
    for d, s in zip(dfinal, call.state, strict=True):
        same = d.shape == s.shape and d.dtype == s.dtype and d.device == s.device
        require(same, "dfinal does not fit the state")
