"""Packed sequences: each sequence must come out as if it had been run alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fusedrnn

LAYERS = ("LSTM", "GRU", "RNN")
F64 = torch.float64
# The same sums of some ten terms, grouped otherwise: fp64 roundings of 1.1e-16 through some dozen steps.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


def random_state(name: str, *shape: int) -> Any:
    h = torch.randn(shape, dtype=F64)
    return (h, torch.randn(shape, dtype=F64)) if name == "LSTM" else h


def select(hx: Any, sample: int) -> Any:
    """The state of one sample, for an unbatched call."""
    return tuple(h[:, sample] for h in hx) if isinstance(hx, tuple) else hx[:, sample]


@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [1, 3, 5, 3], [4, 4, 4, 4], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("name", LAYERS)
def test_as_if_alone(backend: str, name: str, bidirectional: bool, lengths: list[int]) -> None:
    module = getattr(fusedrnn, name)(3, 5, 2, bidirectional=bidirectional, dtype=F64)
    sequences = [torch.randn(n, 3, dtype=F64, requires_grad=True) for n in lengths]
    hx = random_state(name, 4 if bidirectional else 2, len(lengths), 5)
    leaves = [h.requires_grad_() for h in as_tuple(hx)]
    parameters = list(module.parameters())

    packed = pack_sequence(sequences, enforce_sorted=lengths == sorted(lengths, reverse=True))
    output, final = module(packed, hx)
    padded, _ = pad_packed_sequence(output)
    together = [padded[:n, i] for i, n in enumerate(lengths)]
    alone = [module(x, select(hx, i)) for i, x in enumerate(sequences)]
    results = [
        ([*together, *as_tuple(final)]),
        (
            [y for y, _ in alone]
            + [torch.stack(s, 1) for s in zip(*(as_tuple(f) for _, f in alone), strict=True)]
        ),
    ]
    weights = [torch.randn_like(t) for t in results[0]]
    gradients = [torch.autograd.grad(r, [*sequences, *leaves, *parameters], weights) for r in results]
    for a, b in zip(results[0] + list(gradients[0]), results[1] + list(gradients[1]), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), data=st.data())
def test_parity_of_drawn_lengths(
    twins: Callable, assert_same: Callable, lengths: list[int], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(LAYERS))
    bidirectional, given_state = data.draw(st.booleans()), data.draw(st.booleans())
    I, H = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    ours, theirs = twins(name, I, H, 2, bidirectional=bidirectional, dtype=F64)
    x = torch.randn(max(lengths), len(lengths), I, dtype=F64)
    hx = random_state(name, 4 if bidirectional else 2, len(lengths), H) if given_state else None
    assert_same(ours, theirs, pack_padded_sequence(x, lengths, enforce_sorted=False), hx)


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_is_packed_like_the_input(backend: str, name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5, batch_first=True, dtype=F64)  # batch_first is for padded tensors
    x = torch.randn(4, 3, 3, dtype=F64)
    for enforce_sorted, lengths in ((True, [4, 2, 2]), (False, [2, 4, 2])):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        output, _ = module(packed)
        assert type(output) is PackedSequence
        assert all(a is b for a, b in zip(output[1:], packed[1:], strict=True))
        assert output.data.shape == (8, 5)
        assert output.data.is_contiguous()


@pytest.mark.parametrize("name", LAYERS)
def test_equal_lengths_are_a_padded_batch(backend: str, name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5, 2, bidirectional=True, dtype=F64)
    x, hx = torch.randn(4, 3, 3, dtype=F64), random_state(name, 4, 3, 5)
    output, final = module(pack_padded_sequence(x, [4, 4, 4]), hx)
    y, expected = module(x, hx)
    torch.testing.assert_close(output.data.view(4, 3, 10), y, **TOLERANCE)
    torch.testing.assert_close(as_tuple(final), as_tuple(expected), **TOLERANCE)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_by_hand(backend: str, twins: Callable, assert_same: Callable, name: str) -> None:
    """What the constructor of PackedSequence allows: strided rows, and one permutation without the other."""
    sizes = torch.tensor([3, 2, 1])
    rows = torch.randn(3, 12, dtype=F64).t()[::2]
    hx = random_state(name, 1, 3, 5)
    ours, theirs = twins(name, 3, 5, dtype=F64)
    for sorted_indices, unsorted_indices in (
        (None, None),
        (torch.tensor([2, 0, 1]), None),
        (None, torch.tensor([1, 2, 0])),
        (torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])),
    ):
        assert_same(ours, theirs, PackedSequence(rows, sizes, sorted_indices, unsorted_indices), hx)


@pytest.mark.parametrize("name", LAYERS)
def test_strided_batch_sizes(backend: str, name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5, dtype=F64)
    rows, sizes = torch.randn(6, 3, dtype=F64), torch.tensor([3, 2, 1])
    spread = torch.tensor([3, 9, 2, 9, 1, 9])[::2]
    y, _ = module(PackedSequence(rows, sizes))
    torch.testing.assert_close(module(PackedSequence(rows, spread))[0].data, y.data, **TOLERANCE)


@pytest.mark.parametrize("name", LAYERS)
def test_nan_stays_in_its_sequence(backend: str, name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5, 2, dtype=F64)
    lengths, dirty_sample = [5, 2, 4, 3], 2
    clean = torch.randn(5, 4, 3, dtype=F64)
    dirty = clean.clone()
    dirty[1, dirty_sample, 0] = float("nan")
    others = [0, 1, 3]
    outputs, grads = [], []
    for x in (clean, dirty):
        leaf = x.clone().requires_grad_()
        output, final = module(pack_padded_sequence(leaf, lengths, enforce_sorted=False))
        y, _ = pad_packed_sequence(output)
        y[:, others].sum().backward()
        outputs.append((y.detach(), *(s.detach().clone() for s in as_tuple(final))))
        grads.append(leaf.grad)
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a[:, others], b[:, others])
    assert torch.equal(grads[0][:, others], grads[1][:, others])
    y = outputs[1][0]
    assert y[:1, dirty_sample].isfinite().all()
    assert y[1:4, dirty_sample].isnan().all()


@pytest.mark.parametrize("name", LAYERS)
def test_a_long_sequence_among_short_ones(name: str) -> None:
    module = getattr(fusedrnn, name)(1, 2, dtype=F64)
    lengths = [3, 100_000, 70_000, 1]  # past 65,535 with more than one left
    sequences = [torch.randn(n, 1, dtype=F64) for n in lengths]
    with torch.no_grad():
        output, final = module(pack_sequence(sequences, enforce_sorted=False))
        y, _ = pad_packed_sequence(output)
        for i, x in enumerate(sequences):
            expected, state = module(x)
            torch.testing.assert_close(y[: len(x), i], expected, **TOLERANCE)
            for a, b in zip(as_tuple(final), as_tuple(state), strict=True):
                torch.testing.assert_close(a[:, i], b, **TOLERANCE)
