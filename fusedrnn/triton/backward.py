"""The persistent backward pass: steps in the reverse of the forward's order, gradients in registers.

The gates of a step are computed again from gx and gh, which two products of the whole sequence gave. A
program's product is of the dgh of all units, which are handed over through the tensor that is an output
anyway. Dims as in forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sequence import (
    ONE_STEP,
    PATIENCE,
    alive_at,
    arrive,
    as_operand,
    first_row,
    inline,
    load_biases,
    load_states,
    load_weights,
    narrow,
    place,
    wait,
    zeros,
)


@triton.jit(do_not_specialize=["first_step", "end_step", "first_group", "first_n", "reverse", "T"])
def persistent_backward(
    gx,  # [rows, N, G, H] A: W_ih x; with W_hh h added if gates share their gradient
    gh,  # [rows, N, G, H] A: W_hh h, if they do not
    weight_hh,  # [N, G, H, H] E
    bias_ih,  # [N, G, H] E
    bias_hh,  # [N, G, H] E
    state0,  # S of [N, B, H] E: the initial states; [0] is not used
    h_previous,  # [rows, N, H] E: the h that each row's step started from
    y,  # [rows, N, H] E
    kept,  # S of [rows, N, H] A; [0] is not used
    dy,  # [rows, N, H] E
    carried_in,  # S of [N, B, H]: gradients of the state that first_step finds
    carried_out,  # S of [N, B, H]: of the state that the last step leaves
    dgx,  # [rows, N, G, H] E
    dgh,  # [rows, N, G, H] E; dgx if gates share their gradient
    steps,  # int64, of a packed batch: first row of each step [T+1], then lengths [B]
    counters,  # int32, one for each group, zero
    status,  # [1] int32
    first_step,
    end_step,  # at most T + 1: in step T remains the product of the step before it
    first_group,
    first_n,
    reverse,  # bit i: recurrence first_n + i
    T,
    slices,
    B,
    H,
    N,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    BIAS: tl.constexpr,
    SHARED: tl.constexpr,  # gates share their gradient
    RECOMPUTE: tl.constexpr,  # the cell's backward asks for gx and gh
    HAS_DY: tl.constexpr,
    PACKED: tl.constexpr,
    ALONE: tl.constexpr,  # one slice
    IN_BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    E: tl.constexpr = y.dtype.element_ty
    counter, n, b, u, length, longest, backwards = place(
        steps, first_group, first_n, reverse, T, B, slices, PACKED, BLOCK_B, BLOCK_U
    )
    real = (u < H)[None, :]
    exists = (b < B)[:, None] & real
    initial = (n * B + b)[:, None] * H + u[None, :]  # in [N, B, H]
    at = (b * N + n)[:, None] * H + u[None, :]  # in a step's [count, N, H]
    at_gates = (b * N + n)[:, None] * (G * H) + u[None, :]
    dstate = load_states(carried_in, initial, exists, S, A)
    bias_x = load_biases(bias_ih, n, u, H, G, BIAS and RECOMPUTE, A)
    bias_h = load_biases(bias_hh, n, u, H, G, BIAS and RECOMPUTE, A)
    k = tl.arange(0, BLOCK_K)
    held = ()
    for i in tl.static_range(CHUNKS * G):
        held += (_weights(weight_hh, n, i % G, i // G * BLOCK_K + k, u, H, G),)
    handed = zeros(G if IN_BLOCK else 0, BLOCK_B, BLOCK_U, E)

    patience = PATIENCE
    for s in tl.range(first_step, tl.minimum(end_step, longest + 1), num_stages=1):
        t = tl.where(backwards, s, longest - 1 - s)
        before = tl.where(backwards, t + 1, t - 1)
        alive = alive_at(t, length, T)[:, None] & real
        started = alive_at(before, length, T)[:, None]
        row = first_row(steps, t, T, B, PACKED) * N
        row_before = first_row(steps, before, T, B, PACKED) * N
        x, x_h = (), ()
        for g in tl.static_range(G):
            x_g, h_g = bias_x[g], bias_h[g]
            if RECOMPUTE:
                x_g = tl.load(gx + (row * G + g) * H + at_gates, alive, 0.0) + bias_x[g]
                if SHARED:
                    x_g, h_g = x_g + bias_h[g], tl.full(x_g.shape, 0, A)
                else:
                    h_g = tl.load(gh + (row * G + g) * H + at_gates, alive, 0.0) + bias_h[g]
            x += (x_g,)
            x_h += (h_g,)
        state = (tl.load(h_previous + row * H + at, alive, 0.0).to(A),)
        after = (tl.load(y + row * H + at, alive, 0.0).to(A),)
        for j in tl.static_range(1, S):
            earlier = tl.load(kept[j] + row_before * H + at, alive & started, 0.0)
            first = tl.load(state0[j] + initial, alive & ~started, 0.0).to(A)
            state += (tl.where(started, earlier, first),)
            after += (tl.load(kept[j] + row * H + at, alive, 0.0),)

        sums = zeros(G, BLOCK_B, BLOCK_U, A)
        if IN_BLOCK:
            for g in tl.static_range(G):
                sums = _multiply(as_operand(handed[g]), held[g], sums, g, G, PRECISION)
        else:
            later = tl.where(backwards, t - 1, t + 1)
            done = alive_at(later, length, T)[:, None]
            dgh_later = dgh + first_row(steps, later, T, B, PACKED) * N * G * H
            dgh_later += (b * N + n)[:, None] * (G * H)
            if ALONE:
                tl.debug_barrier()
            elif not ONE_STEP:
                patience = wait(counters + counter, (s - first_step) * slices, patience, status)
            for i in tl.static_range(CHUNKS * G):
                d = _units(dgh_later + i % G * H, i // G * BLOCK_K + k, done, H)
                sums = _multiply(d, held[i], sums, i % G, G, PRECISION)
            if CHUNKS == 0:
                for first_k in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                    for g in tl.static_range(G):
                        d = _units(dgh_later + g * H, first_k + k, done, H)
                        w = _weights(weight_hh, n, g, first_k + k, u, H, G)
                        sums = _multiply(d, w, sums, g, G, PRECISION)
        dh = dstate[0]
        for g in tl.static_range(G):
            dh += sums[g]

        dnext = (dh,)
        if HAS_DY:
            dnext = (dh + tl.load(dy + row * H + at, alive, 0.0).to(A),)
        for j in tl.static_range(1, S):
            dnext += (dstate[j],)
        d_x, d_h, dbefore = CELL(x, x_h, state, after, dnext)
        handed = ()
        for g in tl.static_range(G):
            d_g = narrow(d_h[g], E)
            tl.store(dgh + (row * G + g) * H + at_gates, d_g, alive)
            if IN_BLOCK:
                handed += (tl.where(alive, d_g, 0.0).to(E),)
        if not ALONE and not ONE_STEP:
            arrive(counters + counter)
        if not SHARED:
            for g in tl.static_range(G):
                tl.store(dgx + (row * G + g) * H + at_gates, narrow(d_x[g], E), alive)
        new = (tl.where(alive, dbefore[0], dh),)
        for j in tl.static_range(1, S):
            new += (tl.where(alive, dbefore[j], dstate[j]),)
        dstate = new
    for j in tl.static_range(S):
        tl.store(carried_out[j] + initial, narrow(dstate[j], carried_out[j].dtype.element_ty), exists)


@inline
def _weights(weight_hh, n, g, k, u, H, G: tl.constexpr):
    """Those by which gradients of units k reach units u."""
    return load_weights(weight_hh, n, g, k[:, None] * H + u[None, :], k, u, H, G)


@inline
def _units(d, k, done, H):
    """Units k of one gate of each sequence's dgh: [BLOCK_B, BLOCK_K]. From L2, where others have put them."""
    return as_operand(tl.load(d + k[None, :], done & (k < H)[None, :], 0.0, cache_modifier=".cg"))


@inline
def _multiply(d, w, sums, gate: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr):
    """Each gate has sums of its own: products that add to the same ones wait for one another."""
    out = ()
    for g in tl.static_range(G):
        if g == gate:
            out += (tl.dot(d, w, sums[g], input_precision=PRECISION, out_dtype=sums[g].dtype),)
        else:
            out += (sums[g],)
    return out
