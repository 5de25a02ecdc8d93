"""The persistent forward pass: one launch runs whole sequences, with the state in registers.

Dims: T time, B batch, H hidden, N recurrences, G gates, S states. In comments, E is the dtype of the caller's
tensors and A the one that is accumulated in.
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
def persistent_forward(
    gx,  # [rows, N, G, H] A: W_ih x
    weight_hh,  # [N, G, H, H] E
    bias_ih,  # [N, G, H] E
    bias_hh,  # [N, G, H] E
    h0,  # [N, B, H] E: the state before the first of all steps
    carried_in,  # S of [N, B, H]: the state before first_step
    carried_out,  # S of [N, B, H]: the state after the last step
    kept,  # S of [rows, N, H] A: the states of all steps; [0] is not used
    y,  # [rows, N, H] E
    steps,  # int64, of a packed batch: first row of each step [T+1], then lengths [B]
    counters,  # int32, one for each group, zero
    status,  # [1] int32
    first_step,
    end_step,
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
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    ALONE: tl.constexpr,  # one slice
    IN_BLOCK: tl.constexpr,  # h stays in registers: one slice, of BLOCK_U = BLOCK_K units
    CHUNKS: tl.constexpr,  # of BLOCK_K units, whose weights stay on chip; 0: weights are read at every step
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
    state = load_states(carried_in, initial, exists, S, A)
    bias_x = load_biases(bias_ih, n, u, H, G, BIAS, A)
    bias_h = load_biases(bias_hh, n, u, H, G, BIAS, A)
    k = tl.arange(0, BLOCK_K)
    held = ()
    for i in tl.static_range(CHUNKS * G):
        held += (_weights(weight_hh, n, i % G, i // G * BLOCK_K + k, u, H, G),)

    patience = PATIENCE
    for s in tl.range(first_step, tl.minimum(end_step, longest), num_stages=1):
        t = tl.where(backwards, longest - 1 - s, s)
        alive = (t < length)[:, None] & real
        row = first_row(steps, t, T, B, PACKED) * N
        x = ()
        for g in tl.static_range(G):
            x += (tl.load(gx + (row * G + g) * H + at_gates, alive, 0.0) + bias_x[g],)

        sums = zeros(G, BLOCK_B, BLOCK_U, A)
        if IN_BLOCK:
            h = as_operand(narrow(state[0], E))
            sums = _multiply(h, held, 0, sums, G, PRECISION)
        else:
            before = tl.where(backwards, t + 1, t - 1)
            started = alive_at(before, length, T)
            y_before = y + first_row(steps, before, T, B, PACKED) * N * H
            h_before = tl.where(started, y_before + (b * N + n) * H, h0 + (n * B + b) * H)[:, None]
            if ALONE:
                tl.debug_barrier()
            elif not ONE_STEP:
                patience = wait(counters + counter, (s - first_step) * slices, patience, status)
            for c in tl.static_range(CHUNKS):
                h = _units(h_before, c * BLOCK_K + k, b, B, H)
                sums = _multiply(h, held, c, sums, G, PRECISION)
            if CHUNKS == 0:
                for first in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                    h = _units(h_before, first + k, b, B, H)
                    read = ()
                    for g in tl.static_range(G):
                        read += (_weights(weight_hh, n, g, first + k, u, H, G),)
                    sums = _multiply(h, read, 0, sums, G, PRECISION)
        gh = ()
        for g in tl.static_range(G):
            gh += (sums[g] + bias_h[g],)

        after = CELL(x, gh, state)
        h_next = narrow(after[0], E)
        tl.store(y + row * H + at, h_next, alive)
        if not ALONE and not ONE_STEP:
            arrive(counters + counter)
        new = (tl.where(alive, h_next.to(A), state[0]),)
        for j in tl.static_range(1, S):
            if KEEP:
                tl.store(kept[j] + row * H + at, after[j], alive)
            new += (tl.where(alive, after[j], state[j]),)
        state = new
    for j in tl.static_range(S):
        tl.store(carried_out[j] + initial, narrow(state[j], carried_out[j].dtype.element_ty), exists)


@inline
def _weights(weight_hh, n, g, k, u, H, G: tl.constexpr):
    """Those by which units k of h reach units u."""
    return load_weights(weight_hh, n, g, u[None, :] * H + k[:, None], k, u, H, G)


@inline
def _units(h, k, b, B, H):
    """Units k of each sequence's h: [BLOCK_B, BLOCK_K]. From L2, where other programs have put them."""
    return as_operand(tl.load(h + k[None, :], (b < B)[:, None] & (k < H)[None, :], 0.0, cache_modifier=".cg"))


@inline
def _multiply(h, weights, chunk: tl.constexpr, sums, G: tl.constexpr, PRECISION: tl.constexpr):
    out = ()
    for g in tl.static_range(G):
        w = weights[chunk * G + g]
        out += (tl.dot(h, w, sums[g], input_precision=PRECISION, out_dtype=sums[g].dtype),)
    return out
