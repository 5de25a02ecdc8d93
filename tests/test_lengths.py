"""``lengths=``: equals packing, in values, states and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

from .problems import served

LAYERS = ("LSTM", "GRU", "RNN")
F64 = torch.float64
# The same sums of some ten terms, grouped otherwise: fp64 roundings of 1.1e-16 through some dozen steps.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


def random_state(name: str, *shape: int) -> Any:
    h = torch.randn(shape, dtype=F64)
    return (h, torch.randn(shape, dtype=F64)) if name == "LSTM" else h


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    ours = getattr(fusedrnn, name)(*args, **kwargs, dtype=F64)
    theirs = getattr(nn, name)(*args, **kwargs, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def packed(module: nn.Module, x: Tensor, lengths: Tensor, hx: Any) -> list[Tensor]:
    """What torch makes of the samples that have a length, with zeros and the given state for the others."""
    T, some = x.size(1 if module.batch_first else 0), lengths.nonzero().squeeze(1)
    batch = 0 if module.batch_first else 1
    state = tuple(h[:, some] for h in as_tuple(hx))
    sequences = pack_padded_sequence(
        x.index_select(batch, some), lengths[some], module.batch_first, enforce_sorted=False
    )
    output, final = module(sequences, state if isinstance(hx, tuple) else state[0])
    rows, _ = pad_packed_sequence(output, module.batch_first, total_length=T)
    shape = (*x.shape[:2], rows.size(-1))
    y = rows.new_zeros(shape).index_copy(batch, some, rows)
    return [y, *(h.index_copy(1, some, f) for h, f in zip(as_tuple(hx), as_tuple(final), strict=True))]


def assert_equal(ours: nn.Module, theirs: nn.Module, x: Tensor, lengths: Tensor, hx: Any) -> None:
    results = []
    for module, run in ((ours, lambda m, x, n, s: m(x, s, lengths=n)), (theirs, packed)):
        leaf = x.detach().requires_grad_()
        state = tuple(h.detach().requires_grad_() for h in as_tuple(hx))
        out = run(module, leaf, lengths, state if isinstance(hx, tuple) else state[0])
        if isinstance(out, tuple):
            out = [out[0], *as_tuple(out[1])]
        torch.manual_seed(3)
        seeds = [torch.randn(t.shape, dtype=F64) for t in out]
        inputs = [leaf, *state, *module.parameters()]
        results.append(out + list(torch.autograd.grad(out, inputs, seeds)))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.feature("lengths")
@pytest.mark.parametrize("lengths", [[3, 6, 0, 1], [6, 6, 6, 6], [4, 4, 2, 2], [0, 1, 0, 0]], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_packing(
    backend: str, name: str, batch_first: bool, bidirectional: bool, lengths: list[int]
) -> None:
    ours, theirs = twins(name, 3, 5, 2, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn((4, 6, 3) if batch_first else (6, 4, 3), dtype=F64)
    hx = random_state(name, 4 if bidirectional else 2, 4, 5)
    assert_equal(ours, theirs, x, torch.tensor(lengths), hx)


@pytest.mark.feature("lengths")
@pytest.mark.parametrize(("name", "backend"), served([], LAYERS), indirect=["backend"])
def test_equals_packing_by_triton(backend: str, name: str) -> None:
    ours, theirs = twins(name, 3, 5, bidirectional=name == "RNN")
    hx = random_state(name, 2 if name == "RNN" else 1, 3, 5)
    assert_equal(ours, theirs, torch.randn(3, 3, 3, dtype=F64), torch.tensor([2, 0, 3]), hx)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), data=st.data())
def test_equals_packing_for_drawn_lengths(lengths: list[int], data: st.DataObject) -> None:
    torch.manual_seed(0)
    name, bidirectional = data.draw(st.sampled_from(LAYERS)), data.draw(st.booleans())
    I, H = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    ours, theirs = twins(name, I, H, 2, bidirectional=bidirectional)
    x = torch.randn(max(lengths) + data.draw(st.integers(0, 2)), len(lengths), I, dtype=F64)
    hx = random_state(name, 4 if bidirectional else 2, len(lengths), H)
    assert_equal(ours, theirs, x, torch.tensor(lengths), hx)


def test_projection(backend: str) -> None:
    ours, theirs = twins("LSTM", 3, 5, 2, proj_size=2, bidirectional=True)
    hx = (torch.randn(4, 3, 2, dtype=F64), torch.randn(4, 3, 5, dtype=F64))
    assert_equal(ours, theirs, torch.randn(4, 3, 3, dtype=F64), torch.tensor([2, 0, 4]), hx)


@pytest.mark.parametrize("name", LAYERS)
def test_no_steps_at_all(backend: str, name: str) -> None:
    """Zero outputs, the initial state, and gradients that are zero rather than missing."""
    module = getattr(fusedrnn, name)(3, 5, 2, bidirectional=True, dtype=F64)
    hx = random_state(name, 4, 3, 5)
    for T, lengths in ((4, [0, 0, 0]), (1, [0, 0, 0])):
        x = torch.full((T, 3, 3), float("nan"), dtype=F64, requires_grad=True)
        y, final = module(x, hx, lengths=torch.tensor(lengths))
        assert y.shape == (T, 3, 10)
        assert not y.any()
        assert all(torch.equal(f, h) for f, h in zip(as_tuple(final), as_tuple(hx), strict=True))
        assert all(f.data_ptr() != h.data_ptr() for f, h in zip(as_tuple(final), as_tuple(hx), strict=True))
        module.zero_grad()
        (y.sum() + sum(f.sum() for f in as_tuple(final))).backward()
        assert not x.grad.any()
        assert not any(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_zeros_are_the_default_state(name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5, 2, dtype=F64)
    x, lengths = torch.randn(4, 3, 3, dtype=F64), torch.tensor([2, 0, 4])
    zeros = torch.zeros(2, 3, 5, dtype=F64)
    y, final = module(x, lengths=lengths)
    expected, state = module(x, (zeros, zeros) if name == "LSTM" else zeros, lengths=lengths)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(final), as_tuple(state), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_not_read(backend: str, name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5, 2, bidirectional=True, dtype=F64)
    for T, lengths in ((5, [5, 2, 3]), (1, [1, 0, 1])):
        clean = torch.randn(T, 3, 3, dtype=F64)
        dirty = clean.clone()
        dirty[lengths[1] :, 1] = float("nan")
        results = []
        for x in (clean, dirty):
            leaf = x.requires_grad_()
            module.zero_grad()
            y, final = module(leaf, lengths=torch.tensor(lengths))
            (y.square().sum() + sum(f.square().sum() for f in as_tuple(final))).backward()
            results.append([y, *as_tuple(final), leaf.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_empty_batch(backend: str) -> None:
    y, h = fusedrnn.GRU(3, 5)(torch.randn(4, 0, 3), lengths=torch.empty(0, dtype=torch.int64))
    assert y.shape == (4, 0, 5)
    assert h.shape == (1, 0, 5)


def test_dropout_between_layers() -> None:
    """The rows of a batch with lengths are those of the packed batch, so one seed drops the same units."""
    ours, theirs = twins("GRU", 3, 5, 3, dropout=0.5)
    x, lengths = torch.randn(5, 3, 3, dtype=F64), torch.tensor([5, 4, 2])
    torch.manual_seed(1)
    y, _ = ours(x, lengths=lengths)
    torch.manual_seed(1)
    expected, _ = pad_packed_sequence(theirs(pack_padded_sequence(x, lengths))[0])
    torch.testing.assert_close(y, expected, **TOLERANCE)


def test_autocast(backend: str) -> None:
    module = fusedrnn.LSTM(3, 5)
    x, lengths = torch.randn(4, 3, 3), torch.tensor([2, 0, 4])
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = module(x, lengths=lengths)
        packed_y, (packed_h, _) = module(pack_padded_sequence(x[:, [2, 0]], [4, 2]))
    assert (y.dtype, h.dtype, c.dtype) == (packed_y.data.dtype, packed_h.dtype, packed_h.dtype)
    padded, _ = pad_packed_sequence(packed_y)
    assert torch.equal(y[:, [2, 0]], padded)
    assert torch.equal(h[:, [2, 0]], packed_h)


BAD = {
    "a list": ([1, 2, 3], "lengths must be a 1-D tensor of torch.int64, got list"),
    "int32": (torch.tensor([1, 2, 3], dtype=torch.int32), "got a 1-D tensor of torch.int32"),
    "2-D": (torch.tensor([[1, 2, 3]]), "got a 2-D tensor of torch.int64"),
    "too few": (torch.tensor([1, 2]), "Expected 3, got 2"),
    "too long": (torch.tensor([1, 5, 2]), r"lengths must be in \[0, 4\], got \[1, 5, 2\]"),
    "negative": (torch.tensor([1, -1, 2]), r"lengths must be in \[0, 4\]"),
}


@pytest.mark.feature("lengths", nn="no", backends=[])
@pytest.mark.parametrize("name", LAYERS)
def test_the_builtin_has_none(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lengths'"):
        getattr(nn, name)(3, 5)(torch.randn(4, 3, 3), lengths=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("bad", BAD)
def test_bad_lengths(bad: str) -> None:
    lengths, message = BAD[bad]
    with pytest.raises(RuntimeError, match=message):
        fusedrnn.LSTM(3, 5)(torch.randn(4, 3, 3), lengths=lengths)


def test_where_lengths_have_no_meaning() -> None:
    lengths = torch.tensor([2, 1])
    with pytest.raises(RuntimeError, match="the input is one sequence"):
        fusedrnn.GRU(3, 5)(torch.randn(4, 3), lengths=lengths)
    packed_input = pack_padded_sequence(torch.randn(4, 2, 3), [4, 2])
    with pytest.raises(ValueError, match="packed input has lengths of its own"):
        fusedrnn.GRU(3, 5)(packed_input, lengths=lengths)
    with pytest.raises(TypeError, match="positional"):
        fusedrnn.GRU(3, 5)(torch.randn(4, 2, 3), None, lengths)


def test_compiled() -> None:
    """Without fullgraph: the compiler leaves its graph where lengths become sizes, and enters it again."""
    module = fusedrnn.GRU(3, 5)
    fast = torch.compile(module, backend="eager")
    for lengths in ([4, 2, 0], [1, 3, 3]):
        x = torch.randn(4, 3, 3)
        a, b = module(x, lengths=torch.tensor(lengths)), fast(x, lengths=torch.tensor(lengths))
        torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(y.square().sum(), list(module.parameters())) for y, _ in (a, b)]
        torch.testing.assert_close(*grads)
