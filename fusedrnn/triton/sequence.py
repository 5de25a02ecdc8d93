"""What the persistent kernels share: where a program stands in a sequence, and how programs hand over.

A *group* runs one recurrence for BLOCK_B sequences; it is ``slices`` programs, each of which owns BLOCK_U
units.
Slices hand over through what they write anyway: ``y`` forward, ``dgh`` backward. Each step writes rows of its
own, so that nothing is overwritten and one counter per group is all that is needed: slice i reads the rows of
step s - 1 once the counter has reached slices * s.

Addresses are a 64-bit scalar, that of a step, and 32-bit offsets within the step that do not change over
time: the registers are needed for other things. The planner sees to it that they fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(not isinstance(tl.cdiv, triton.runtime.JITFunction))
# The interpreter runs programs one after the other: none may wait for one that comes later. There a launch
# of several slices is of one step, and the host stands in for the counter.
ONE_STEP = INTERPRETED
PATIENCE = tl.constexpr(1 << 23)  # polls of a counter, each through L2 and back: several seconds


def inline(function):
    """For functions that kernels call. In the interpreter they stay plain: calls of others are slow there."""
    return function if INTERPRETED.value else triton.jit(function)


@inline
def place(
    steps,
    first_group,
    first_n,
    reverse,
    T,
    B,
    slices,
    PACKED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """This program's counter, recurrence, sequences, units, their lengths, the longest, and its direction."""
    group = first_group + tl.program_id(0) // slices
    tiles = (B + BLOCK_B - 1) // BLOCK_B
    n = first_n + group // tiles
    b = group % tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.program_id(0) % slices * BLOCK_U + tl.arange(0, BLOCK_U)
    longest = T
    length = tl.where(b < B, T, 0)
    if PACKED:
        length = tl.load(steps + T + 1 + b, b < B, 0).to(tl.int32)
        longest = tl.load(steps + T + 1 + group % tiles * BLOCK_B).to(tl.int32)  # they do not increase
    backwards = ((reverse >> (group // tiles)) & 1) != 0
    return first_n * tiles + group, n, b, u, length, longest, backwards


@inline
def first_row(steps, t, T, B, PACKED: tl.constexpr):
    """The first row of step t; anything if there is no such step."""
    if PACKED:
        return tl.load(steps + tl.minimum(tl.maximum(t, 0), T))
    return t.to(tl.int64) * B


@inline
def alive_at(t, length, T):
    """Which sequences have a step t; none, if it is before the first."""
    return tl.where(t >= 0, t, T) < length


@inline
def narrow(x, E: tl.constexpr):
    """Rounds to E, to nearest even: the interpreter's own cast to bf16 truncates."""
    if E == tl.bfloat16 and INTERPRETED:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(E)


@inline
def as_operand(x):
    """x as an operand of a product: the interpreter cannot multiply bf16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x


@inline
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out += (tl.full([ROWS, COLUMNS], 0, dtype),)
    return out


@inline
def load_states(states, at, mask, S: tl.constexpr, A: tl.constexpr):
    out = ()
    for j in tl.static_range(S):
        out += (tl.load(states[j] + at, mask, 0.0).to(A),)
    return out


@inline
def load_biases(bias, n, u, H, G: tl.constexpr, BIAS: tl.constexpr, A: tl.constexpr):
    """G of [1, BLOCK_U]; zeros without biases."""
    out = ()
    for g in tl.static_range(G):
        if BIAS:
            out += (tl.load(bias + (n * G + g) * H + u, u < H, 0.0).to(A)[None, :],)
        else:
            out += (tl.full([1, u.shape[0]], 0, A),)
    return out


@inline
def load_weights(weight_hh, n, g, at, k, u, H, G: tl.constexpr):
    """W_hh of gate g at offsets ``at``, [BLOCK_K, BLOCK_U], for units k and u."""
    gate = weight_hh + (n * G + g).to(tl.int64) * H * H
    return as_operand(tl.load(gate + at, (k < H)[:, None] & (u < H)[None, :], 0.0))


@inline
def wait(counter, count, patience, status):
    """Returns once ``count`` slices have arrived or patience has ended, with what is left of it."""
    while (tl.atomic_add(counter, 0, sem="acquire") < count) & (patience > 0):
        patience -= 1
        if patience == 0:
            tl.store(status, 1)
    tl.debug_barrier()
    return patience


@inline
def arrive(counter):
    """Hands over all that this program has stored."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")
