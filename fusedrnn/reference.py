"""The recurrence as a plain loop of torch operations.

Any device, any floating dtype, differentiable any number of times: what every kernel is held against, and
what differentiates a kernel's backward. It rounds where the kernels round: ``h`` to the dtype of ``x`` at
every step, everything else in :func:`fusedrnn.cells.compute_dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .cells import Cell, State, compute_dtype, lstm_step
from .checks import check
from .variation import PLAIN, Variation


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
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    return layer(cell, x, state, *weights, reverse, batch_sizes)[:2]


def layer(
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
    variation: Variation = PLAIN,
    all_states: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Runs N recurrences; shapes and errors as in :func:`fusedrnn.functional.layer`."""
    check(cell, x, state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse, batch_sizes)
    outputs: list[Tensor] = []
    finals: list[list[Tensor]] = []
    kept: list[list[Tensor]] = []
    for n, backwards in enumerate(reverse):
        recurrence = _Recurrence(
            cell,
            weight_ih[n],
            weight_hh[n],
            bias_ih[n] if bias_ih else None,
            bias_hh[n] if bias_hh else None,
            weight_hr[n] if weight_hr else None,
            variation,
            n,
            compute_dtype(x.dtype),
        )
        steps, final = recurrence.run(x, [s[n] for s in state], backwards, batch_sizes)
        join = torch.stack if batch_sizes is None else torch.cat
        wanted = cell.states if all_states else 1
        y, *others = (join([s[i] for s in steps]) for i in range(wanted))
        outputs.append(y)
        finals.append(final)
        kept.append([s.to(x.dtype) for s in others])
    return (
        torch.cat(outputs, -1),
        [torch.stack(states) for states in zip(*finals, strict=True)],
        [torch.stack(states, -2) for states in zip(*kept, strict=True)],
    )


@dataclass
class _Recurrence:
    """One of the N. What it computes in, ``compute``, is at least fp32."""

    cell: Cell
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    variation: Variation
    n: int
    compute: torch.dtype

    def run(
        self, x: Tensor, state: list[Tensor], backwards: bool, batch_sizes: Tensor | None
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The states after each step, in the order of time, and the final ones."""
        dtype, G = x.dtype, self.cell.gates
        gx = self._gates(x, self.weight_ih, self.bias_ih, self.variation.norm_ih, slice(0, G))
        sizes = None if batch_sizes is None else batch_sizes.tolist()
        steps = gx.split(sizes) if sizes is not None else gx.unbind(0)
        zoneout = [self._zoneout(z, sizes, len(steps)) for z in self.variation.zoneout]
        carried = [state[0], *(s.to(self.compute) for s in state[1:])]
        results: list[list[Tensor]] = []
        for t in range(len(steps))[:: -1 if backwards else 1]:
            # With batch_sizes only the longest sequences, which come first, take part in every step.
            active = [s[: steps[t].size(0)] for s in carried]
            new = list(self._step(steps[t], active))
            if self.weight_hr is not None:
                new[0] = self._product(new[0], self.weight_hr)
            for i, stays in enumerate(zoneout):
                old = active[i].to(self.compute)
                if isinstance(stays, tuple):
                    new[i] = torch.where(stays[t], old, new[i])
                else:
                    new[i] = new[i].lerp(old, stays)
            new[0] = new[0].to(dtype)
            results.append(new)
            carried = [torch.cat((a, s[a.size(0) :])) for a, s in zip(new, carried, strict=True)]
        if backwards:
            results.reverse()
        return results, [s.to(dtype) for s in carried]

    def _step(self, gx: Tensor, state: list[Tensor]) -> State:
        h, G, v, n = state[0], self.cell.gates, self.variation, self.n
        h, others = h.to(self.compute), state[1:]
        if not v.reset_after:  # r goes before the product: h' = n + z (h - n), n = tanh(W_in x + W_hn (r h))
            r, z = (gx[..., :2, :] + self._recurrent(h, slice(0, 2))).sigmoid().unbind(-2)
            new = (gx[..., 2, :] + self._recurrent(r * h, slice(2, 3)).squeeze(-2)).tanh()
            return (new + z * (h - new),)
        gh = self._recurrent(h, slice(0, G))
        if not (v.peephole or v.norm_c):
            return self.cell.step(gx, gh, (h, *others))
        return lstm_step(
            gx,
            gh,
            (h, *others),
            v.peephole[n].to(self.compute) if v.peephole else None,
            self._norm_c if v.norm_c else None,
        )

    def _recurrent(self, h: Tensor, gates: slice) -> Tensor:
        """The recurrent contribution to some of the gates, ``[B, gates, H]``."""
        if self.variation.mask is not None:
            h = h * self.variation.mask[self.n, : h.size(0)].to(self.compute)
        return self._gates(h, self.weight_hh, self.bias_hh, self.variation.norm_hh, gates)

    def _gates(
        self, a: Tensor, weight: Tensor, bias: Tensor | None, gains: Sequence[Tensor], gates: slice
    ) -> Tensor:
        """``norm(W a) + b`` for some of the gates, ``[*, gates, H]``."""
        H, G = weight.size(0) // self.cell.gates, gates.stop - gates.start
        rows = slice(gates.start * H, gates.stop * H) if self.cell.gates > G else slice(None)
        if not gains:
            return self._product(a, weight[rows], None if bias is None else bias[rows]).unflatten(-1, (G, H))
        product = self._product(a, weight[rows])
        # A GRU's n is normalised apart from r and z, as in the paper.
        parts = product.split((2 * H, H), -1) if self.cell.gates == 3 and G == 3 else (product,)
        product = torch.cat([layer_norm(part, part.shape[-1:]) for part in parts], -1)
        product = product * gains[self.n][rows].to(self.compute)
        return (product if bias is None else product + bias[rows].to(self.compute)).unflatten(-1, (G, H))

    def _norm_c(self, c: Tensor) -> Tensor:
        gain, bias = self.variation.norm_c[self.n].to(self.compute)
        return layer_norm(c, c.shape[-1:], gain, bias)

    def _product(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        to = self.compute
        return linear(a.to(to), weight.to(to), None if bias is None else bias.to(to))

    def _zoneout(
        self, zoneout: float | Tensor, sizes: list[int] | None, T: int
    ) -> float | tuple[Tensor, ...]:
        """What stays of a state: the expectation, or for each step where all of it does."""
        if not isinstance(zoneout, Tensor):
            return zoneout
        own = zoneout[..., self.n, :]
        return own.split(sizes) if sizes is not None else own.unbind(0)
