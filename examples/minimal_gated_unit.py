"""A cell of one's own: the minimal gated unit (Zhou et al., 2016), which this package does not have.

    f  = sigmoid(W_f x + U_f h)
    n  = tanh(W_n x + f * (U_n h))
    h' = h + f * (n - h)

Registered with its Triton functions, it has every schedule, packed input and both directions on a GPU; with
its torch form alone it would run through the reference. Try it without a GPU:

    TRITON_INTERPRET=1 python examples/minimal_gated_unit.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import fusedrnn


def step(gx, gh, state):
    """The unit in torch: gx and gh are ``[..., 2, H]``, state is ``(h,)``."""
    (fx, nx), (fh, nh), (h,) = gx.unbind(-2), gh.unbind(-2), state
    f = (fx + fh).sigmoid()
    return (h + f * ((nx + f * nh).tanh() - h),)


@triton.jit
def gates(gx, gh):
    f = 1 / (1 + tl.exp(-(gx[0] + gh[0])))
    n = 1 - 2 / (1 + tl.exp(2 * (gx[1] + f * gh[1])))  # tanh
    return f, n


@triton.jit
def forward(gx, gh, state):
    f, n = gates(gx, gh)
    return (state[0] + f * (n - state[0]),)


@triton.jit
def backward(gx, gh, state, after, dafter):
    f, n = gates(gx, gh)
    dn = dafter[0] * f * (1 - n * n)
    df = (dafter[0] * (n - state[0]) + dn * gh[1]) * f * (1 - f)
    return (df, dn), (df, dn * f), (dafter[0] * (1 - f),)


fusedrnn.register_cell("mgu", step, gates=2, triton=(forward, backward))


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = fusedrnn.Layer("mgu", 4, 16, bidirectional=True, device=device)
    x = torch.randn(5, 3, 4, device=device)
    results = {}
    for backend in ("triton", "reference"):
        with fusedrnn.use_backend(backend):
            y, _ = layer(x)
        grads = torch.autograd.grad(y.pow(2).sum(), list(layer.parameters()))
        results[backend] = (y, *grads)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(*results.values(), strict=True))
    print(f"{layer}\noutput and gradients differ from the reference by {error:.1e}")


if __name__ == "__main__":
    main()
