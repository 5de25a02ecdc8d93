"""``reset=``: equals a loop over steps that sets the state before them; values, states and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusedrnn
from fusedrnn import functional

from . import loops
from .problems import served

LAYERS = ("LSTM", "GRU", "RNN")
F64 = torch.float64
# The same sums of some ten terms, grouped otherwise: fp64 roundings of 1.1e-16 through some dozen steps.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def as_hx(state: list[Tensor]) -> Any:
    return tuple(state) if len(state) > 1 else state[0]


def random_state(name: str, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64) for _ in range(2 if name == "LSTM" else 1)]


def assert_equal(
    module: nn.Module,
    x: Tensor,
    hx: list[Tensor],
    reset: Tensor,
    reset_state: list[Tensor] | None,
    lengths: list[int] | None = None,
) -> None:
    """``x`` [T, B, I] and ``reset`` [T, B]: the module gets them as its batch_first asks."""

    def ours(x: Tensor, hx: list[Tensor], other: list[Tensor] | None) -> list[Tensor]:
        first = module.batch_first
        y, final = module(
            x.transpose(0, 1) if first else x,
            as_hx(hx),
            reset=reset.t() if first else reset,
            reset_state=None if other is None else as_hx(other),
            lengths=None if lengths is None else torch.tensor(lengths),
        )
        return [y.transpose(0, 1) if first else y, *as_tuple(final)]

    def loop(x: Tensor, hx: list[Tensor], other: list[Tensor] | None) -> list[Tensor]:
        y, final, _ = loops.run(module, x, hx, reset=reset, reset_state=other, lengths=lengths)
        return [y, *final]

    results = []
    for run in (ours, loop):
        leaves = [t.detach().requires_grad_() for t in (x, *hx, *(reset_state or []))]
        other = leaves[1 + len(hx) :] if reset_state is not None else None
        out = run(leaves[0], leaves[1 : 1 + len(hx)], other)
        torch.manual_seed(3)
        seeds = [torch.randn(t.shape, dtype=F64) for t in out]
        inputs = [*leaves, *module.parameters()]
        # A reset may cut the last link from hx to any output; in a loop it may also go unused.
        grads = torch.autograd.grad(out, inputs, seeds, allow_unused=True, materialize_grads=True)
        results.append(out + list(grads))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, i=i: f"result {i}: {m}")


RESETS = {
    "some": [[0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1]],
    "all": [[1, 1, 1]] * 5,
    "first step": [[1, 0, 1]] + [[0, 0, 0]] * 4,
    "last step": [[0, 0, 0]] * 4 + [[0, 1, 1]],
    "none": [[0, 0, 0]] * 5,
}


@pytest.mark.parametrize("given_state", [False, True], ids=["zeros", "reset_state"])
@pytest.mark.parametrize("lengths", [None, [3, 5, 0]], ids=["whole", "lengths"])
@pytest.mark.parametrize("which", RESETS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_a_loop(
    name: str, bidirectional: bool, which: str, lengths: list[int] | None, given_state: bool
) -> None:
    module = getattr(fusedrnn, name)(
        3, 4, 2, bidirectional=bidirectional, batch_first=bidirectional, dtype=F64
    )
    rows = 4 if bidirectional else 2
    reset = torch.tensor(RESETS[which]).bool()
    other = random_state(name, rows, 3, 4) if given_state else None
    x = torch.randn(5, 3, 3, dtype=F64)
    assert_equal(module, x, random_state(name, rows, 3, 4), reset, other, lengths)


@pytest.mark.feature("reset")
@pytest.mark.parametrize(("name", "backend"), served(LAYERS, LAYERS), indirect=["backend"])
def test_on_every_backend(backend: str, name: str) -> None:
    module = getattr(fusedrnn, name)(3, 4, bidirectional=True, dtype=F64)
    reset, x = torch.tensor(RESETS["some"]).bool(), torch.randn(5, 3, 3, dtype=F64)
    assert_equal(module, x, random_state(name, 2, 3, 4), reset, random_state(name, 2, 3, 4), [4, 5, 2])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data())
def test_equals_a_loop_for_drawn_resets(data: st.DataObject) -> None:
    torch.manual_seed(0)
    T, B = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    name, bidirectional = data.draw(st.sampled_from(LAYERS)), data.draw(st.booleans())
    marks = data.draw(st.lists(st.booleans(), min_size=T * B, max_size=T * B))
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    module = getattr(fusedrnn, name)(2, 3, bidirectional=bidirectional, dtype=F64)
    rows = 2 if bidirectional else 1
    other = random_state(name, rows, B, 3) if data.draw(st.booleans()) else None
    x, hx = torch.randn(T, B, 2, dtype=F64), random_state(name, rows, B, 3)
    assert_equal(module, x, hx, torch.tensor(marks).view(T, B), other, lengths)


@pytest.mark.parametrize("name", LAYERS)
def test_one_launch_for_each_layer_and_direction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, layer = [], functional.layer

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["batch_sizes"])
        return layer(*args, **kwargs)

    monkeypatch.setattr(functional, "layer", counting)
    x, reset = torch.randn(9, 4, 3), torch.rand(9, 4) < 0.3
    getattr(fusedrnn, name)(3, 5, 3)(x, reset=reset)
    assert len(calls) == 3
    # Independent pieces run side by side: as many steps as the longest has.
    assert all(sizes.numel() < 9 and int(sizes.sum()) == 36 for sizes in calls)
    calls.clear()
    getattr(fusedrnn, name)(3, 5, 3, bidirectional=True)(x, reset=reset)
    assert len(calls) == 6


@pytest.mark.parametrize("name", LAYERS)
def test_one_step(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of acting: no gathering, and the same numbers."""
    module = getattr(fusedrnn, name)(3, 4, 2, dtype=F64)
    x, hx = torch.randn(1, 4, 3, dtype=F64), random_state(name, 2, 4, 4)
    reset = torch.tensor([[True, False, True, False]])
    monkeypatch.delattr(fusedrnn.segments, "cut")
    for other in (None, random_state(name, 2, 4, 4)):
        for lengths in (None, [1, 1, 0, 0]):
            assert_equal(module, x, hx, reset, other, lengths)
    fresh, state = module(x, reset=reset)  # from zeros to zeros
    expected, unset = module(x)
    assert torch.equal(fresh, expected)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(state), as_tuple(unset), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_acting_equals_training(name: str) -> None:
    """One step at a time with the state handed on gives what the whole sequence gives."""
    module = getattr(fusedrnn, name)(3, 4, 2, dtype=F64)
    x, reset = torch.randn(6, 4, 3, dtype=F64), torch.rand(6, 4) < 0.4
    y, final = module(x, reset=reset)
    hx, steps = None, []
    for t in range(6):
        step, hx = module(x[t : t + 1], hx, reset=reset[t : t + 1])
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps), y, **TOLERANCE)
    for a, b in zip(as_tuple(hx), as_tuple(final), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_what_was_before_a_reset_is_forgotten(backend: str) -> None:
    """NaN included; and no gradient flows back over the reset."""
    module = fusedrnn.LSTM(3, 4, dtype=F64)
    clean = torch.randn(4, 2, 3, dtype=F64)
    dirty = clean.clone()
    dirty[0, 0] = float("nan")
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[2, 0] = True
    y, (h, _) = module(dirty, reset=reset)
    assert y[:2, 0].isnan().all()
    assert y[2:].isfinite().all()
    assert h.isfinite().all()
    leaf = clean.requires_grad_()
    (grad,) = torch.autograd.grad(module(leaf, reset=reset)[0][3].sum(), leaf)
    assert not grad[:2, 0].any()
    assert grad[2:, 0].all()
    assert grad[:, 1].all()


def test_unbatched(backend: str) -> None:
    module = fusedrnn.LSTM(3, 4, 2, bidirectional=True, dtype=F64)
    x, reset = torch.randn(5, 3, dtype=F64), torch.tensor([False, False, True, False, True])
    hx, other = random_state("LSTM", 4, 4), random_state("LSTM", 4, 4)
    y, final = module(x, tuple(hx), reset=reset, reset_state=tuple(other))
    whole = [s[:, None] for s in hx], [s[:, None] for s in other]
    expected = loops.run(module, x[:, None], whole[0], reset=reset[:, None], reset_state=whole[1])
    torch.testing.assert_close(y, expected.y[:, 0], **TOLERANCE)
    for a, b in zip(final, expected.final, strict=True):
        torch.testing.assert_close(a, b[:, 0], **TOLERANCE)


def test_projection(backend: str) -> None:
    module = fusedrnn.LSTM(3, 5, 2, proj_size=2, dtype=F64)
    x, reset = torch.randn(5, 3, 3, dtype=F64), torch.tensor(RESETS["some"]).bool()
    hx, other = ([torch.randn(2, 3, 2, dtype=F64), torch.randn(2, 3, 5, dtype=F64)] for _ in range(2))
    assert_equal(module, x, hx, reset, other)


BAD: dict[str, tuple[dict[str, Any], type, str]] = {
    "int": (
        {"reset": torch.zeros(4, 3)},
        RuntimeError,
        "must be a tensor of torch.bool, got a 2-D tensor of",
    ),
    "list": ({"reset": [True]}, RuntimeError, "got list"),
    "transposed": (
        {"reset": torch.zeros(3, 4, dtype=torch.bool)},
        RuntimeError,
        r"Expected \(4, 3\), got \(3, 4\)",
    ),
    "no reset": ({"reset_state": torch.zeros(1, 3, 5)}, ValueError, "it needs reset"),
    "form": (
        {"reset": torch.zeros(4, 3, dtype=torch.bool), "reset_state": (torch.zeros(1, 3, 5),)},
        RuntimeError,
        "must be of the form of hx",
    ),
    "size": (
        {"reset": torch.zeros(4, 3, dtype=torch.bool), "reset_state": torch.zeros(1, 2, 5)},
        RuntimeError,
        r"Expected reset_state size \(1, 3, 5\), got \[1, 2, 5\]",
    ),
    "dtype": (
        {"reset": torch.zeros(4, 3, dtype=torch.bool), "reset_state": torch.zeros(1, 3, 5, dtype=F64)},
        RuntimeError,
        "reset_state must have the dtype and device of the input",
    ),
}


@pytest.mark.feature("reset", nn="no", backends=[])
@pytest.mark.parametrize("name", LAYERS)
def test_the_builtin_has_none(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'reset'"):
        getattr(nn, name)(3, 5)(torch.randn(4, 3, 3), reset=torch.zeros(4, 3, dtype=torch.bool))


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad: str) -> None:
    arguments, kind, message = BAD[bad]
    with pytest.raises(kind, match=message):
        fusedrnn.GRU(3, 5)(torch.randn(4, 3, 3), **arguments)


def test_compiled() -> None:
    """Without fullgraph, as lengths; a single step has nothing to leave the graph for."""
    module = fusedrnn.GRU(3, 5)
    x, hx = torch.randn(4, 3, 3), torch.randn(1, 3, 5)
    fast, one_graph = (torch.compile(module, backend="eager", fullgraph=f) for f in (False, True))
    for reset in (torch.rand(4, 3) < 0.4, torch.ones(4, 3).bool()):
        torch.testing.assert_close(fast(x, hx, reset=reset), module(x, hx, reset=reset))
        step = x[:1], hx
        torch.testing.assert_close(one_graph(*step, reset=reset[:1]), module(*step, reset=reset[:1]))
