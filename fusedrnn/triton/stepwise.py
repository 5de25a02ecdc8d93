"""The stepwise schedule's own part of a step: everything pointwise, in one kernel each way.

The products between the steps are the caller's. Any size, any dtype, any cell. Dims and dtypes as in
forward.py. At every step a recurrence is at one of two places, by its direction: the caller says at which
row of the tensors each begins, and how many sequences are alive there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sequence import inline, narrow


@inline
def _element(count, first_n, reverse, B, H, N, row_forward, row_reverse, BLOCK: tl.constexpr):
    """This program's elements of [count, H] of one recurrence, and their places in the tensors."""
    local = tl.program_id(1)
    n = (first_n + local).to(tl.int64)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, u = element // H, element % H
    row = tl.where(((reverse >> local) & 1) != 0, row_reverse, row_forward)
    return (row + b) * N + n, n * B + b, n, b, u


@inline
def _bias(bias, n, g, u, valid, H, G: tl.constexpr, BIAS: tl.constexpr, A: tl.constexpr):
    if BIAS:
        return tl.load(bias + (n * G + g) * H + u, valid, 0.0).to(A)
    return tl.full(u.shape, 0, A)


@triton.jit(
    do_not_specialize=["first_n", "reverse", "row_forward", "row_reverse", "count_forward", "count_reverse"]
)
def step_forward(
    gx,  # [rows, N, G, H] A: W_ih x
    gh,  # [N, B, G, H] A: W_hh h of the sequences alive
    bias_ih,  # [N, G, H] E
    bias_hh,  # [N, G, H] E
    state,  # S of [N, B, H]: h in E, the others in A; updated
    y,  # [rows, N, H] E
    kept,  # S of [rows, N, H] A: [0] is h before its projection, the others are the states of all steps
    first_n,
    reverse,  # bit i: recurrence first_n + i
    row_forward,
    row_reverse,
    count_forward,
    count_reverse,
    B,
    H,
    N,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PROJECTED: tl.constexpr,  # h goes to kept[0] instead of y and state[0]
    BLOCK: tl.constexpr,
):
    backwards = ((reverse >> tl.program_id(1)) & 1) != 0
    count = tl.where(backwards, count_reverse, count_forward)
    row, place, n, b, u = _element(count, first_n, reverse, B, H, N, row_forward, row_reverse, BLOCK)
    alive = b < count
    x, h = (), ()
    for g in tl.static_range(G):
        x_g = tl.load(gx + (row * G + g) * H + u, alive, 0.0)
        h_g = tl.load(gh + (place * G + g) * H + u, alive, 0.0)
        x += (x_g + _bias(bias_ih, n, g, u, alive, H, G, BIAS, A),)
        h += (h_g + _bias(bias_hh, n, g, u, alive, H, G, BIAS, A),)
    old = ()
    for j in tl.static_range(S):
        if PROJECTED and j == 0:
            old += (tl.full(u.shape, 0, A),)
        else:
            old += (tl.load(state[j] + place * H + u, alive, 0.0).to(A),)
    new = CELL(x, h, old)
    if PROJECTED:
        tl.store(kept[0] + row * H + u, new[0], alive)
    else:
        rounded = narrow(new[0], y.dtype.element_ty)
        tl.store(y + row * H + u, rounded, alive)
        tl.store(state[0] + place * H + u, rounded, alive)
    for j in tl.static_range(1, S):
        tl.store(state[j] + place * H + u, new[j], alive)
        if KEEP:
            tl.store(kept[j] + row * H + u, new[j], alive)


@triton.jit(
    do_not_specialize=[
        "first_n",
        "reverse",
        "row_forward",
        "row_reverse",
        "count_forward",
        "count_reverse",
        "before_forward",
        "before_reverse",
        "started_forward",
        "started_reverse",
    ]
)
def step_backward(
    gx,  # [rows, N, G, H] A: W_ih x; with W_hh h added if gates share their gradient
    gh,  # [rows, N, G, H] A: W_hh h, if they do not
    dh,  # [N, B, H] A: W_hh^T dgh of the step before this one, or what replaces it
    bias_ih,  # [N, G, H] E
    bias_hh,  # [N, G, H] E
    state0,  # S of [N, B, H] E: the initial states; [0] is not used
    h_previous,  # [rows, N, H] E: the h that each row's step started from
    y,  # [rows, N, H] E
    kept,  # as the forward left them
    dy,  # [rows, N, H] E
    dstate,  # S of [N, B, H] A: [0] is the part of dh that does not pass through gh; updated
    dgx,  # [rows, N, G, H] E
    dgh,  # [rows, N, G, H] E; dgx if gates share their gradient
    first_n,
    reverse,
    row_forward,
    row_reverse,
    count_forward,
    count_reverse,
    before_forward,  # the row of the step that this one started from
    before_reverse,
    started_forward,  # how many sequences that step had; 0: this one starts from the initial state
    started_reverse,
    B,
    H,
    N,
    CELL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    HAS_DY: tl.constexpr,
    PROJECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    E: tl.constexpr = dgx.dtype.element_ty
    backwards = ((reverse >> tl.program_id(1)) & 1) != 0
    count = tl.where(backwards, count_reverse, count_forward)
    row, place, n, b, u = _element(count, first_n, reverse, B, H, N, row_forward, row_reverse, BLOCK)
    alive = b < count
    started = alive & (b < tl.where(backwards, started_reverse, started_forward))
    before = (tl.where(backwards, before_reverse, before_forward) + b) * N + n
    x, h = (), ()
    for g in tl.static_range(G):
        x_g, h_g = tl.full(u.shape, 0, A), tl.full(u.shape, 0, A)
        if RECOMPUTE:
            x_g = tl.load(gx + (row * G + g) * H + u, alive, 0.0)
            x_g += _bias(bias_ih, n, g, u, alive, H, G, BIAS, A)
            if SHARED:
                x_g += _bias(bias_hh, n, g, u, alive, H, G, BIAS, A)
            else:
                h_g = tl.load(gh + (row * G + g) * H + u, alive, 0.0)
                h_g += _bias(bias_hh, n, g, u, alive, H, G, BIAS, A)
        x += (x_g,)
        h += (h_g,)
    if PROJECTED:
        state = (tl.full(u.shape, 0, A),)
        after = (tl.load(kept[0] + row * H + u, alive, 0.0),)
    else:
        state = (tl.load(h_previous + row * H + u, alive, 0.0).to(A),)
        after = (tl.load(y + row * H + u, alive, 0.0).to(A),)
    for j in tl.static_range(1, S):
        earlier = tl.load(kept[j] + before * H + u, started, 0.0)
        first = tl.load(state0[j] + place * H + u, alive, 0.0).to(A)
        state += (tl.where(started, earlier, first),)
        after += (tl.load(kept[j] + row * H + u, alive, 0.0),)
    d = tl.load(dh + place * H + u, alive, 0.0) + tl.load(dstate[0] + place * H + u, alive, 0.0)
    if HAS_DY:
        d += tl.load(dy + row * H + u, alive, 0.0).to(A)
    dnext = (d,)
    for j in tl.static_range(1, S):
        dnext += (tl.load(dstate[j] + place * H + u, alive, 0.0),)
    d_x, d_h, d_state = CELL(x, h, state, after, dnext)
    for g in tl.static_range(G):
        tl.store(dgx + (row * G + g) * H + u, narrow(d_x[g], E), alive)
        if not SHARED:
            tl.store(dgh + (row * G + g) * H + u, narrow(d_h[g], E), alive)
    for j in tl.static_range(S):
        tl.store(dstate[j] + place * H + u, d_state[j], alive)


@triton.jit(do_not_specialize=["first_n", "reverse", "T", "B", "P", "N"])
def previous_rows(
    h0,  # [N, B, P]
    y,  # [rows, N, P]
    out,  # [rows, N, P]: y of the step before, or h0
    steps,  # int64, of a packed batch: first row of each step [T+1]
    first_n,
    reverse,
    T,
    B,
    P,
    N,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (B.to(tl.int64) * P + BLOCK - 1) // BLOCK
    t = (tl.program_id(0) // blocks).to(tl.int64)
    local = tl.program_id(1)
    n = (first_n + local).to(tl.int64)
    element = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b, u = element // P, element % P
    before = tl.where(((reverse >> local) & 1) != 0, t + 1, t - 1)
    exists = (before >= 0) & (before < T)
    row, row_before = t * B, before * B
    count, count_before = B.to(tl.int64), B.to(tl.int64)
    if PACKED:
        row = tl.load(steps + t)
        count = tl.load(steps + t + 1) - row
        inside = tl.minimum(tl.maximum(before, 0), T - 1)
        row_before = tl.load(steps + inside)
        count_before = tl.load(steps + inside + 1) - row_before
    alive = b < count
    started = b < tl.where(exists, tl.minimum(count_before, count), 0)
    value = tl.load(h0 + (n * B + b) * P + u, alive, 0.0)
    earlier = tl.load(y + ((row_before + b) * N + n) * P + u, started, 0.0)
    tl.store(out + ((row + b) * N + n) * P + u, tl.where(started, earlier, value), alive)
