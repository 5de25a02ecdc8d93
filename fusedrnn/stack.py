"""Layers on one another: what LSTM, GRU and RNN run once their input has been checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import functional
from .functional import Weights
from .options import Options
from .segments import Segments
from .variation import PLAIN, Variation


class Stack(NamedTuple):
    """L layers of D directions.

    Attributes:
        cell: a registered cell.
        states: S.
        layers: the parameters of each layer.
        reverse: for each direction whether it runs from the last step to the first.
        hidden: H.
        projection: P, or 0.
        dropout: probability of dropout between layers; 0 outside training.
        options: what else the layers do.
        variations: for each layer the parameters of its options; empty for none.
        training: whether what is random is drawn.
    """

    cell: str
    states: int
    layers: list[Weights]
    reverse: list[bool]
    hidden: int
    projection: int
    dropout: float
    options: Options
    variations: Sequence[Variation]
    training: bool

    def widths(self) -> list[int]:
        """Of each state, units of one direction."""
        return [self.projection or self.hidden] + [self.hidden] * (self.states - 1)


class Batch(NamedTuple):
    """What the rows of the input are.

    Attributes:
        B: samples.
        batch_sizes: of packed rows, the samples alive at each step.
        cuts: the pieces of a padded batch, for each direction or one for all; empty for whole samples.
        reset_state: what pieces start from that begin with a reset, as the state; empty for zeros.
    """

    B: int
    batch_sizes: Tensor | None = None
    cuts: tuple[Segments, ...] = ()
    reset_state: Sequence[Tensor] = ()


class Outcome(NamedTuple):
    """``y`` ``[T, B, D*P]`` or packed rows; final states ``[L*D, B, *]``; all states ``[L*D, T, B, *]``."""

    y: Tensor
    final: list[Tensor]
    states: list[Tensor]


def zeros(x: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Initial states of these shapes; nothing writes to them, so those of one shape are one tensor."""
    first = x.new_zeros(shapes[0])
    return [first if shape == shapes[0] else x.new_zeros(shape) for shape in shapes]


def run(
    stack: Stack, x: Tensor, state: Sequence[Tensor], batch: Batch, *, all_states: bool = False
) -> Outcome:
    """Runs all layers.

    Args:
        stack: the layers.
        x: ``[T, B, I]``, or packed rows ``[rows, I]``.
        state: the initial states, ``[L*D, B, P]`` and, of more than one, ``[L*D, B, H]``; empty for zeros.
        batch: what the rows of ``x`` are.
        all_states: whether to return the states of all steps, those of LSTM, or h alone; else none.
    """
    layers, D = len(stack.layers), len(stack.reverse)
    if state:
        initial = _by_layer(state, layers, D)
    else:
        initial = [zeros(x, [(D, batch.B, width) for width in stack.widths()])] * layers
    if layers == 1 and stack.options.plain and not (batch.cuts or all_states):
        run = functional.layer
        weights, sizes = stack.layers[0], batch.batch_sizes
        y, final, _ = run(stack.cell, x, initial[0], weights, reverse=stack.reverse, batch_sizes=sizes)
        return Outcome(y, final, [])
    resets = _by_layer(batch.reset_state, layers, D) if batch.reset_state else [[]] * layers
    batch_first = not x.is_contiguous()
    if batch.cuts:
        x = batch.cuts[0].gather(x)
    finals, kept = [], []
    for k in range(layers):
        below = x
        if stack.dropout and k:
            x = _dropout(stack, x, batch)
        x, final, states = _layer(stack, k, x, initial[k], resets[k], batch, all_states)
        if stack.options.residual and k:
            x = x + below
        finals.append(final)
        kept.append(states)
    final = finals[0] if layers == 1 else [torch.cat(s) for s in zip(*finals, strict=True)]
    all_kept = [torch.cat(s) for s in zip(*kept, strict=True)]
    if batch.cuts:
        place = batch.cuts[0].scatter
        x = place(x, batch_first=batch_first)
        all_kept = [torch.stack([place(n, batch_first=batch_first) for n in s]) for s in all_kept]
    return Outcome(x, final, all_kept)


def run_one_step(
    stack: Stack,
    x: Tensor,
    state: Sequence[Tensor],
    batch: Batch,
    lengths: Tensor | None,
    reset: Tensor | None,
    *,
    all_states: bool = False,
) -> Outcome:
    """Runs all layers on a batch of one step, without gathering rows or waiting for a device.

    Args as :func:`run`, and:
        lengths: int64 ``[B]``, zeros and ones, where ``x`` is; None: ones.
        reset: bool ``[1, B]``, where ``x`` is; None: no resets.
    """
    nothing: list[Tensor | float] = [0.0] * stack.states
    start = state
    if reset is not None and (state or batch.reset_state):
        begins, others = reset[0][:, None], list(batch.reset_state) or nothing
        start = [_where(begins, o, s) for s, o in zip(list(state) or nothing, others, strict=True)]
    if lengths is None:
        return run(stack, x, start, batch, all_states=all_states)
    alive = (lengths > 0)[:, None]
    # What stands in the place of no step may be NaN.
    y, final, states = run(stack, _where(alive, x, 0.0), start, batch, all_states=all_states)
    final = [_where(alive, f, s) for f, s in zip(final, list(state) or nothing, strict=True)]
    return Outcome(_where(alive, y, 0.0), final, [_where(alive, s, 0.0) for s in states])


def _where(condition: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    return torch.where(condition, a, b).to(like.dtype)


def _by_layer(state: Sequence[Tensor], layers: int, D: int) -> list[list[Tensor]]:
    return [list(state)] if layers == 1 else [list(s) for s in zip(*[s.split(D) for s in state], strict=True)]


def _dropout(stack: Stack, x: Tensor, batch: Batch) -> Tensor:
    if not stack.options.variational_dropout:
        return torch.dropout(x, stack.dropout, True)
    # Of each sample, for all steps.
    mask = torch.dropout(x.new_ones(batch.B, x.size(-1)), stack.dropout, True)
    if batch.cuts:
        return x * (mask[batch.cuts[0].samples()] if x.dim() == 2 else mask[:0])
    return x * (mask if batch.batch_sizes is None else mask[_samples(batch.batch_sizes, x)])


def _samples(batch_sizes: Tensor, rows: Tensor) -> Tensor:
    """For each packed row the place of its sequence in the batch."""
    first = (batch_sizes.cumsum(0) - batch_sizes).repeat_interleave(batch_sizes)
    return (torch.arange(rows.size(0)) - first).to(rows.device)


def _layer(
    stack: Stack,
    k: int,
    x: Tensor,
    state: list[Tensor],
    reset_state: list[Tensor],
    batch: Batch,
    all_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One layer; all states are those of its directions, ``[D, T, B, *]`` or ``[D, rows, *]``."""
    mask, D = None, len(stack.reverse)
    if stack.training and stack.options.recurrent_dropout:
        p = stack.options.recurrent_dropout
        mask = torch.dropout(x.new_ones(D, batch.B, stack.widths()[0]), p, True)
    if not batch.cuts:
        return _directions(stack, k, range(D), x, state, batch.batch_sizes, mask, all_states)
    outcomes = []
    for i, piece in enumerate(batch.cuts):
        # Without resets the pieces are the same for both directions.
        directions = range(D) if len(batch.cuts) == 1 else range(i, i + 1)
        own = slice(directions.start, directions.stop)
        starts = [
            piece.initial(s[own], reset_state[j][own] if reset_state else None) for j, s in enumerate(state)
        ]
        own_mask = None if mask is None else mask[own].index_select(1, piece.sample)
        order, back = (None, None) if piece.batch_sizes is None else (piece.order, piece.back)
        rows = x if order is None else x.index_select(0, order)
        y, end, states = _directions(
            stack, k, directions, rows, starts, piece.batch_sizes, own_mask, all_states, as_cut=bool(i)
        )
        if back is not None:
            y = y.index_select(0, back)
            states = [s.index_select(1, back) for s in states]
        outcomes.append((y, [piece.final(e, s[own]) for e, s in zip(end, state, strict=True)], states))
    if len(outcomes) == 1:
        return outcomes[0]
    ys, finals, kept = zip(*outcomes, strict=True)
    return (
        torch.cat(ys, -1),
        [torch.cat(s) for s in zip(*finals, strict=True)],
        [torch.cat(s) for s in zip(*kept, strict=True)],
    )


def _directions(
    stack: Stack,
    k: int,
    directions: range,
    x: Tensor,
    state: list[Tensor],
    batch_sizes: Tensor | None,
    mask: Tensor | None,
    all_states: bool,
    *,
    as_cut: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Some directions of one layer in one call. ``as_cut``: the rows are in the order of the direction."""
    options, weights = stack.options, stack.layers[k]
    reverse = [stack.reverse[d] and not as_cut for d in directions]
    if options.plain and not all_states:
        if len(directions) < len(stack.reverse):
            weights = Weights(*([group[d] for d in directions] if group else group for group in weights))
        run = functional.layer
        y, final, _ = run(stack.cell, x, state, weights, reverse=reverse, batch_sizes=batch_sizes)
        return y, final, []
    variation = _chosen(stack.variations[k], directions) if stack.variations else PLAIN
    weights = Weights(*([group[d] for d in directions] if group else group for group in weights))
    heads, D = options.num_heads, len(directions)
    if options.zoneout:
        variation = variation._replace(zoneout=_zoneout(stack, x, D))
    variation = variation._replace(mask=mask)
    if heads > 1:
        weights, variation, state, reverse = _split(heads, weights, variation, state, reverse)
    y, final, kept = functional.layer(
        stack.cell,
        x,
        state,
        weights,
        reverse=reverse,
        batch_sizes=batch_sizes,
        variation=variation,
        all_states=all_states,
    )
    if heads > 1:
        final = [s.unflatten(0, (D, heads)).transpose(1, 2).flatten(2) for s in final]
        kept = [s.unflatten(-2, (D, heads)).flatten(-2) for s in kept]
    if not all_states:
        return y, final, []
    return y, final, [s.movedim(-2, 0) for s in (y.unflatten(-1, (D, -1)), *kept)]


def _chosen(variation: Variation, directions: range) -> Variation:
    def of(group: Sequence[Tensor]) -> list[Tensor]:
        return [group[d] for d in directions] if group else []

    return variation._replace(
        peephole=of(variation.peephole),
        norm_ih=of(variation.norm_ih),
        norm_hh=of(variation.norm_hh),
        norm_c=of(variation.norm_c),
    )


def _zoneout(stack: Stack, x: Tensor, D: int) -> list[float | Tensor]:
    """What stays of each state: in training drawn for each step and unit, else as much as is expected."""
    rates = stack.options.zoneout_of(stack.states)
    if not stack.training:
        return list(rates)
    shapes = [(*x.shape[:-1], D, width) for width in stack.widths()]
    return [x.new_empty(shape).bernoulli_(p).bool() for p, shape in zip(rates, shapes, strict=True)]


def _split(
    heads: int, weights: Weights, variation: Variation, state: list[Tensor], reverse: list[bool]
) -> tuple[Weights, Variation, list[Tensor], list[bool]]:
    """D recurrences as D*heads: a head has its units of every gate."""

    def rows(group: Sequence[Tensor], units: int) -> list[Tensor]:  # [R*H, ...] -> heads of [R*H/heads, ...]
        parts = []
        for w in group:
            by_head = w.unflatten(0, (-1, heads, units // heads))
            parts += [by_head[:, n].flatten(0, 1) for n in range(heads)]
        return parts

    def columns(group: Sequence[Tensor]) -> list[Tensor]:  # [R, H] -> heads of [R, H/heads]
        return [part for w in group for part in w.chunk(heads, -1)]

    def of_state(s: Tensor) -> Tensor:  # [D, B, H] -> [D*heads, B, H/heads]
        return s.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)

    H = state[0].size(-1)
    groups = (weights.ih, weights.hh, weights.bias_ih, weights.bias_hh)
    zoneout = [
        z.unflatten(-1, (heads, -1)).flatten(-3, -2) if isinstance(z, Tensor) else z
        for z in variation.zoneout
    ]
    return (
        Weights(*(rows(group, H) for group in groups)),
        variation._replace(
            peephole=columns(variation.peephole),
            norm_ih=rows(variation.norm_ih, H),
            norm_hh=rows(variation.norm_hh, H),
            norm_c=columns(variation.norm_c),
            mask=None if variation.mask is None else of_state(variation.mask),
            zoneout=zoneout,
        ),
        [of_state(s) for s in state],
        [r for r in reverse for _ in range(heads)],
    )
