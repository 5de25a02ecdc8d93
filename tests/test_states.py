"""``return_all_states=True``: the states of every step, with gradients into each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

from . import loops

LAYERS = ("LSTM", "GRU", "RNN")
F64 = torch.float64
# The same sums of some ten terms, grouped otherwise: fp64 roundings of 1.1e-16 through some dozen steps.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
SERVED = ("reference", "cpu")  # gradients into c of every step


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def as_hx(state: list[Tensor]) -> Any:
    return tuple(state) if len(state) > 1 else state[0]


def random_state(name: str, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64) for _ in range(2 if name == "LSTM" else 1)]


def assert_equal(module: nn.Module, x: Tensor, hx: list[Tensor], **options: Any) -> None:
    """Outputs, states and gradients of all against the loop; ``x`` [T, B, I]."""
    lengths = options.get("lengths")

    def ours(x: Tensor, hx: list[Tensor]) -> list[Tensor]:
        given = {**options, "lengths": None if lengths is None else torch.tensor(lengths)}
        y, final, states = module(x, as_hx(hx), return_all_states=True, **given)
        assert type(states) is type(final)
        return [y, *as_tuple(final), *as_tuple(states)]

    def loop(x: Tensor, hx: list[Tensor]) -> list[Tensor]:
        y, final, states = loops.run(module, x, hx, **options)
        return [y, *final, *states]

    results = []
    for run in (ours, loop):
        leaves = [t.detach().requires_grad_() for t in (x, *hx)]
        out = run(leaves[0], leaves[1:])
        torch.manual_seed(3)
        seeds = [torch.randn(t.shape, dtype=F64) for t in out]
        inputs = [*leaves, *module.parameters()]
        grads = torch.autograd.grad(out, inputs, seeds, allow_unused=True, materialize_grads=True)
        results.append(out + list(grads))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.feature("all states")
@pytest.mark.parametrize("backend", SERVED, indirect=True)
@pytest.mark.parametrize("lengths", [None, [3, 5, 0]], ids=["whole", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_a_loop(backend: str, name: str, bidirectional: bool, lengths: list[int] | None) -> None:
    module = getattr(fusedrnn, name)(3, 4, 2, bidirectional=bidirectional, dtype=F64)
    hx = random_state(name, 4 if bidirectional else 2, 3, 4)
    x, reset = torch.randn(5, 3, 3, dtype=F64), torch.rand(5, 3) < 0.3
    assert_equal(module, x, hx, lengths=lengths)
    assert_equal(module, x, hx, lengths=lengths, reset=reset)
    if lengths is None:
        assert_equal(module, x[:1], hx, lengths=[1, 0, 1], reset=reset[:1])


@pytest.mark.parametrize("backend", SERVED, indirect=True)
def test_projection(backend: str) -> None:
    module = fusedrnn.LSTM(3, 5, 2, proj_size=2, bidirectional=True, dtype=F64)
    hx = [torch.randn(4, 3, 2, dtype=F64), torch.randn(4, 3, 5, dtype=F64)]
    assert_equal(module, torch.randn(4, 3, 3, dtype=F64), hx)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_h_alone_on_every_backend(backend: str, name: str) -> None:
    """h of every step is the output, which every backend returns and differentiates."""
    module = getattr(fusedrnn, name)(3, 4, 2, bidirectional=True, dtype=F64)
    assert_equal(module, torch.randn(5, 3, 3, dtype=F64), random_state(name, 4, 3, 4))


@pytest.mark.parametrize("backend", ["reference", "cpu", "emulator"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference(backend: str, dtype: torch.dtype) -> None:
    module = fusedrnn.LSTM(3, 4, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 3, 3, dtype=dtype)
    with torch.no_grad():
        y, (h, c), (all_h, all_c) = module(x, return_all_states=True)
        plain_y, plain = module(x)
    assert all(t.dtype == dtype for t in (y, h, c, all_h, all_c))
    assert torch.equal(y, plain_y)
    assert torch.equal(h, plain[0])
    assert torch.equal(c, plain[1])
    # Of the last layer h is the output; the final states are those of the last step of each direction.
    assert torch.equal(y, torch.cat((all_h[2], all_h[3]), -1))
    for final, states in ((h, all_h), (c, all_c)):
        assert torch.equal(final, torch.stack([states[0, -1], states[1, 0], states[2, -1], states[3, 0]]))


@pytest.mark.parametrize("backend", ["emulator", "torch"], indirect=True)
def test_a_backend_that_cannot_says_so(backend: str) -> None:
    module = fusedrnn.LSTM(3, 4)
    x = torch.randn(5, 3, 3)
    message = {
        "emulator": "its backward takes no gradients of the states of all steps",
        "torch": "the built-in keeps no states but h and the last",
    }[backend]
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot serve this call: {message}"):
        module(x, return_all_states=True)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()  # every backend has the states of all steps, not all have their gradients
def test_shapes(name: str) -> None:
    module = getattr(fusedrnn, name)(3, 4, 2, bidirectional=True, batch_first=True, dtype=F64)
    x = torch.randn(3, 5, 3, dtype=F64)
    _, _, states = module(x, return_all_states=True)
    assert all(s.shape == (4, 3, 5, 4) for s in as_tuple(states))
    _, _, one = module(x[1], return_all_states=True)
    for s, t in zip(as_tuple(states), as_tuple(one), strict=True):
        assert t.shape == (4, 5, 4)
        torch.testing.assert_close(s[:, 1], t, **TOLERANCE)
    lengths = [2, 5, 3]
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    _, _, rows = module(packed, return_all_states=True)
    _, _, padded = module(x, lengths=torch.tensor(lengths), return_all_states=True)
    for r, p in zip(as_tuple(rows), as_tuple(padded), strict=True):
        assert r.shape == (4, 10, 4)
        unpacked, _ = pad_packed_sequence(packed._replace(data=r.movedim(0, 1).flatten(1)), batch_first=True)
        torch.testing.assert_close(unpacked.unflatten(-1, (4, 4)).movedim(-2, 0), p, **TOLERANCE)


@pytest.mark.parametrize("backend", SERVED, indirect=True)
def test_derivatives(backend: str) -> None:
    module = fusedrnn.LSTM(2, 3, bidirectional=True, dtype=F64)
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip((n for n, _ in module.named_parameters()), parameters, strict=True))
        y, _, (_, c) = torch.func.functional_call(module, values, (x,), {"return_all_states": True})
        return y, c

    inputs = (x, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", SERVED, indirect=True)
def test_states_of_all_steps_alone(backend: str) -> None:
    """A loss of c only, one of h only, and one of a single step."""
    module = fusedrnn.LSTM(3, 4, dtype=F64)
    x, hx = torch.randn(5, 2, 3, dtype=F64), random_state("LSTM", 1, 2, 4)
    for pick in (
        lambda h, c: c.sum(),
        lambda h, c: h.sum(),
        lambda h, c: c[0, 2].sum(),
        lambda h, c: (h * c).sum(),
    ):
        ours, loop = module(x, tuple(hx), return_all_states=True)[2], loops.run(module, x, hx).states
        grads = [torch.autograd.grad(pick(*s), list(module.parameters())) for s in (ours, loop)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.feature("all states", nn="no", backends=[])
@pytest.mark.parametrize("name", LAYERS)
def test_the_builtin_has_none(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_all_states'"):
        getattr(nn, name)(3, 5)(torch.randn(4, 3, 3), return_all_states=True)
