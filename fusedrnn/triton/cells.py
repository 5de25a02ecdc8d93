"""The cells as Triton function pairs.

Each pair is the maths of one step on blocks of any shape, in the dtype that is accumulated in. It knows no
pointer, stride, mask or time; every schedule takes it as a ``tl.constexpr``.

``forward(gx, gh, state) -> state`` has tuples of G, G and S blocks, biases included, and returns S.
``backward(gx, gh, state, after, dnext) -> (dgx, dgh, dstate)`` also has the state after the step and its
gradients; what of ``dstate[0]`` passes through ``gh`` is left to the schedule. Where a cell's gates share
their gradient (:attr:`fusedrnn.cells.Cell.shares_gates`), ``dgh`` must be ``dgx``, and ``backward`` is given
``gx + gh`` as ``gx``, and zeros as ``gh``.
"""

from __future__ import annotations

import triton.language as tl

from .sequence import inline


@inline
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@inline
def tanh(x):
    # Near zero the exponential form cancels; there, a Padé approximant whose error is below 4e-16.
    s = x * x
    near = x * (10395 + s * (1260 + s * 21)) / (10395 + s * (4725 + s * (210 + s)))
    return tl.where(tl.abs(x) < 0.3, near, 1 - 2 / (1 + tl.exp(2 * x)))


@inline
def lstm_forward(gx, gh, state):
    i, f = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
    g, o = tanh(gx[2] + gh[2]), sigmoid(gx[3] + gh[3])
    c = f * state[1] + i * g
    return o * tanh(c), c


@inline
def lstm_backward(gx, gh, state, after, dnext):
    i, f = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
    g, o = tanh(gx[2] + gh[2]), sigmoid(gx[3] + gh[3])
    tc = tanh(after[1])
    dc = dnext[1] + dnext[0] * o * (1 - tc * tc)
    di, df = dc * g * i * (1 - i), dc * state[1] * f * (1 - f)
    dg, do = dc * i * (1 - g * g), dnext[0] * tc * o * (1 - o)
    return (di, df, dg, do), (di, df, dg, do), (tl.full(dc.shape, 0, dc.dtype), dc * f)


@inline
def gru_forward(gx, gh, state):
    r, z = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
    n = tanh(gx[2] + r * gh[2])
    return (n + z * (state[0] - n),)


@inline
def gru_backward(gx, gh, state, after, dnext):
    r, z = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
    n = tanh(gx[2] + r * gh[2])
    dn = dnext[0] * (1 - z) * (1 - n * n)
    dz = dnext[0] * (state[0] - n) * z * (1 - z)
    dr = dn * gh[2] * r * (1 - r)
    return (dr, dz, dn), (dr, dz, dn * r), (dnext[0] * z,)


@inline
def rnn_tanh_forward(gx, gh, state):
    return (tanh(gx[0] + gh[0]),)


@inline
def rnn_tanh_backward(gx, gh, state, after, dnext):
    d = dnext[0] * (1 - after[0] * after[0])
    return (d,), (d,), (tl.full(d.shape, 0, d.dtype),)


@inline
def rnn_relu_forward(gx, gh, state):
    a = gx[0] + gh[0]
    return (tl.where(a < 0, 0.0, a),)  # NaN stays NaN


@inline
def rnn_relu_backward(gx, gh, state, after, dnext):
    d = tl.where(after[0] > 0, dnext[0], 0.0)
    return (d,), (d,), (tl.full(d.shape, 0, d.dtype),)
