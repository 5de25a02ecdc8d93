"""LSTM, GRU and RNN with all options as plain loops over steps: one sample, layer and direction at a time.

Written from the equations of docs/options.md, apart from the package: it uses nothing of it but a module's
parameters and attributes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Draws(NamedTuple):
    """What is random: of each layer factors of its input ``[B, F]`` or ``[T, B, F]``, factors of h
    ``[D, B, P]``, and for each state where it stays, ``[T, B, D, *]``; empty for nothing drawn.
    """

    inputs: list[Tensor] = []  # noqa: RUF012 - nobody writes to it
    recurrent: list[Tensor] = []  # noqa: RUF012
    zoneout: list[list[Tensor]] = []  # noqa: RUF012


class Result(NamedTuple):
    y: Tensor  # [T, B, D*P]
    final: list[Tensor]  # [L*D, B, *]
    states: list[Tensor]  # [L*D, T, B, *]


def run(
    module: nn.Module,
    x: Tensor,
    hx: list[Tensor],
    *,
    lengths: list[int] | None = None,
    reset: Tensor | None = None,
    reset_state: list[Tensor] | None = None,
    options: dict[str, Any] | None = None,
    draws: Draws | None = None,
) -> Result:
    """``x`` [T, B, I], whatever batch_first says; ``reset`` [T, B]; ``options``: those of the constructor."""
    T, B, _ = x.shape
    options, draws = options or {}, draws or Draws()
    D = 2 if module.bidirectional else 1
    finals: list[list[Tensor]] = [[] for _ in hx]
    kept: list[list[Tensor]] = [[] for _ in hx]
    for k in range(module.num_layers):
        below = x
        if draws.inputs and k:
            x = x * draws.inputs[k - 1]
        outputs = []
        for d in range(D):
            samples = []
            for b in range(B):
                n = T if lengths is None else lengths[b]
                samples.append(_sample(module, x, hx, k, d, b, n, reset, reset_state, options, draws))
            steps = [torch.stack([s[0][i] for s in samples], 1) for i in range(len(hx))]  # [T, B, *]
            outputs.append(steps[0])
            for i in range(len(hx)):
                kept[i].append(steps[i])
                finals[i].append(torch.stack([s[1][i] for s in samples]))
        x = torch.cat(outputs, -1)
        if options.get("residual") and k:
            x = x + below
    return Result(x, [torch.stack(f) for f in finals], [torch.stack(s) for s in kept])


def _sample(module, x, hx, k, d, b, n, reset, reset_state, options, draws):
    """The states after every step [T, *], zeros past the end, and the final ones."""
    row = k * (2 if module.bidirectional else 1) + d
    state = [s[row, b] for s in hx]
    results: list[list[Tensor]] = [[torch.zeros_like(s)] * x.size(0) for s in state]
    for t in range(n) if d == 0 else reversed(range(n)):
        if reset is not None and reset[t, b]:
            state = [
                torch.zeros_like(s) if reset_state is None else reset_state[i][row, b]
                for i, s in enumerate(state)
            ]
        mask = draws.recurrent[k][d, b] if draws.recurrent else 1
        new = _step(module, k, d, x[t, b], state, mask, options)
        rates = options.get("zoneout", 0.0)
        rates = rates if isinstance(rates, tuple) else (rates,) * len(state)
        for i, p in enumerate(rates):
            if draws.zoneout:
                keep = draws.zoneout[k][i][t, b, d]
                new[i] = keep * state[i] + (1 - keep) * new[i]
            else:
                new[i] = p * state[i] + (1 - p) * new[i]
        state = new
        for i, s in enumerate(state):
            results[i][t] = s
    return [torch.stack(r) for r in results], state


def _step(module, k, d, x, state, mask, options):
    def read(name: str) -> Tensor | None:
        return getattr(module, f"{name}_l{k}{'_reverse' if d else ''}", None)

    H, heads = module.hidden_size, options.get("num_heads", 1)
    sigmoid, tanh = torch.sigmoid, torch.tanh
    w_ih, w_hh, peephole = read("weight_ih"), read("weight_hh"), read("peephole")
    G = w_ih.size(0) // H
    b_ih, b_hh = (
        b if b is not None else torch.zeros(G * H, dtype=x.dtype) for b in (read("bias_ih"), read("bias_hh"))
    )
    if heads > 1:  # the block-diagonal matrix in full
        w_hh = torch.stack([torch.block_diag(*gate.chunk(heads)) for gate in w_hh.chunk(G)]).flatten(0, 1)

    def norm(a: Tensor) -> Tensor:
        return (a - a.mean()) / (a.var(correction=0) + 1e-5).sqrt()

    def normed(a: Tensor, gains: Tensor | None, rows: slice) -> Tensor:
        """Of the gates in these rows, each head by itself."""
        if gains is None:
            return a
        by_head = a.view(-1, heads, H // heads)
        out = torch.stack([norm(by_head[:, i]) for i in range(heads)], 1)
        return out.flatten() * gains[rows]

    def contribution(w: Tensor, v: Tensor, b: Tensor, gains: Tensor | None, rows: slice) -> Tensor:
        return normed(w[rows] @ v, gains, rows) + b[rows]

    def from_x(rows: slice) -> Tensor:
        return contribution(w_ih, x, b_ih, read("norm_ih"), rows)

    def from_h(v: Tensor, rows: slice) -> Tensor:
        return contribution(w_hh, v * mask, b_hh, read("norm_hh"), rows)

    h = state[0]
    if module.mode == "LSTM":
        c, every = state[1], slice(0, 4 * H)
        i, f, g, o = (from_x(every) + from_h(h, every)).chunk(4)
        if peephole is not None:
            i, f = i + peephole[0] * c, f + peephole[1] * c
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        if peephole is not None:
            o = o + peephole[2] * c
        seen, norm_c = c, read("norm_c")
        if norm_c is not None:
            seen = torch.cat([norm(part) for part in c.chunk(heads)]) * norm_c[0] + norm_c[1]
        h = sigmoid(o) * tanh(seen)
        if module.proj_size:
            h = read("weight_hr") @ h
        return [h, c]
    if module.mode == "GRU":
        rz, last = slice(0, 2 * H), slice(2 * H, 3 * H)
        r, z = sigmoid(from_x(rz) + from_h(h, rz)).chunk(2)
        if options.get("reset_after", True):
            n = tanh(from_x(last) + r * from_h(h, last))
        else:
            n = tanh(from_x(last) + from_h(r * h, last))
        return [(1 - z) * n + z * h]
    every = slice(0, H)
    a = from_x(every) + from_h(h, every)
    return [torch.relu(a) if module.mode == "RNN_RELU" else tanh(a)]
