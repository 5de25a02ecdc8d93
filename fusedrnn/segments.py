"""Sequences of different lengths, or cut by resets, as one packed batch.

A reset cuts a sequence in two. All pieces are independent of one another, so they are sorted by length and
run side by side, as a packed batch is: in fewer steps than the padded batch has, in one launch, by every
backend.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Segments(NamedTuple):
    """The pieces of a padded batch ``[T, B]``, longest first.

    A packed row is a step of a piece, in the order in which packed sequences have them. All tensors but
    ``batch_sizes`` are where the batch is.

    Attributes:
        source: for each packed row its row ``t*B + b`` in the padded batch.
        batch_sizes: pieces alive at each step, on the CPU; None where there are no rows.
        sample: for each piece its b.
        fresh: for each piece whether it starts from the reset state, not from ``hx``; None if none does.
        ends: the pieces that samples end with, in the order of the samples.
        ended: the samples that have a piece, in order.
        order: of a reverse direction, for each packed row its row in the forward direction's pieces.
        back: the inverse of ``order``.
        T: steps of the padded batch.
        B: samples of the padded batch.
    """

    source: Tensor
    batch_sizes: Tensor | None
    sample: Tensor
    fresh: Tensor | None
    ends: Tensor
    ended: Tensor
    order: Tensor | None
    back: Tensor | None
    T: int
    B: int

    def gather(self, x: Tensor) -> Tensor:
        """The packed rows ``[rows, F]`` of ``[T, B, F]``; if there are none, an empty batch ``[1, 0, F]``."""
        if self.batch_sizes is None:
            return x[:1, :0]
        if x.is_contiguous() or not x.transpose(0, 1).is_contiguous():
            return x.flatten(0, 1).index_select(0, self.source)
        return x.transpose(0, 1).flatten(0, 1).index_select(0, self._batch_first())

    def scatter(self, rows: Tensor, *, batch_first: bool) -> Tensor:
        """``[T, B, F]`` with the packed rows in their places and zeros elsewhere.

        ``batch_first``: whether the steps of a sample are to lie side by side in memory.
        """
        rows = rows.reshape(-1, rows.size(-1))
        padded = rows.new_zeros(self.T * self.B, rows.size(-1))
        if batch_first:
            filled = padded.index_copy(0, self._batch_first(), rows)
            return filled.view(self.B, self.T, -1).transpose(0, 1)
        return padded.index_copy(0, self.source, rows).view(self.T, self.B, -1)

    def initial(self, state: Tensor, reset_state: Tensor | None) -> Tensor:
        """What the pieces start from, of ``[N, B, F]``: the given state, or zeros or the reset state."""
        start = state.index_select(1, self.sample)
        if self.fresh is None:
            return start
        other = start.new_zeros(()) if reset_state is None else reset_state.index_select(1, self.sample)
        return torch.where(self.fresh[:, None], other, start)

    def final(self, end: Tensor, state: Tensor) -> Tensor:
        """The final states of the samples, from those of the pieces; ``state`` where there is no piece."""
        if self.batch_sizes is None:
            return state.to(end.dtype, copy=True)
        last = end.index_select(1, self.ends)
        return last if len(self.ended) == self.B else state.to(end.dtype).index_copy(1, self.ended, last)

    def samples(self) -> Tensor:
        """For each packed row its b."""
        return self.source % self.B

    def _batch_first(self) -> Tensor:
        return self.source % self.B * self.T + self.source // self.B


def cut(
    T: int,
    B: int,
    device: torch.device,
    lengths: Tensor | None,
    reset: Tensor | None,
    *,
    bidirectional: bool,
) -> tuple[Segments, ...]:
    """The pieces of a batch, with resets those of each direction in the order in which it runs.

    The sizes of what follows depend on the values, which are therefore waited for.

    Args:
        T: steps.
        B: samples.
        device: where the batch is.
        lengths: int64 ``[B]``, steps of each sample, or None: all of them.
        reset: bool ``[T, B]``: whether the state is set before a step, or None: nowhere.
        bidirectional: whether there is a reverse direction. Without resets it has the same pieces.

    Returns:
        The pieces of the forward direction, with resets and a reverse direction also those of that; nothing
        where there is nothing to cut.

    Raises:
        RuntimeError: a length is not in ``[0, T]``.
    """
    counts = torch.full((B,), T) if lengths is None else lengths.cpu()
    _check_range(counts, T)
    marks = reset.cpu().t() if reset is not None and reset.any() else None
    if marks is None and (counts == T).all():
        return ()
    forward = _pieces(T, B, counts, marks, None, device)
    if marks is None or not bidirectional:
        return (forward,)
    return forward, _pieces(T, B, counts, marks, forward.source.cpu(), device)


# The compiler leaves its graph here: no size of what comes back is known to it.
_cut: object = cut
_cut._torchdynamo_disable = True  # type: ignore[attr-defined]


def _pieces(
    T: int, B: int, lengths: Tensor, reset: Tensor | None, forward: Tensor | None, device: torch.device
) -> Segments:
    """``reset`` ``[B, T]``. ``forward``: for a reverse direction, the index of the forward one."""
    steps = torch.arange(T)
    if reset is not None:
        if forward is not None:  # in the order of the direction, which begins at the last step of a sample
            reset = reset.gather(1, (lengths[:, None] - 1 - steps).clamp(min=0))
        start = reset.clone()
    else:
        start = torch.zeros(B, T, dtype=torch.bool)
    start[:, 0] = True
    start &= steps < lengths[:, None]
    first = start.flatten().nonzero().squeeze(1)  # [pieces], each b*T + its first step
    sample = first // T
    limit = sample * T + lengths[sample]
    end = torch.minimum(torch.cat((first[1:], first.new_full((1,), B * T)))[: len(first)], limit)
    ends = (end == limit).nonzero().squeeze(1)  # in order of the samples
    length, order = (end - first).sort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    fresh = None if reset is None else reset.flatten()[first[order]]

    batch_sizes, index = None, first
    if len(first):
        longest = int(length[0])
        batch_sizes = len(first) - length.bincount(minlength=longest)[:longest].cumsum(0)
        step = torch.arange(longest).repeat_interleave(batch_sizes)  # of each row in its piece
        piece = torch.arange(len(step)) - (batch_sizes.cumsum(0) - batch_sizes)[step]
        at = first[order][piece] + step
        b, t = at // T, at % T
        index = (t if forward is None else lengths[b] - 1 - t) * B + b
    to_forward = back = None
    if forward is not None:
        row_of, own = torch.empty(T * B, dtype=torch.int64), torch.empty(T * B, dtype=torch.int64)
        row_of[forward], own[index] = torch.arange(len(forward)), torch.arange(len(index))
        to_forward, back = row_of[index].to(device), own[forward].to(device)
    return Segments(
        index.to(device),
        batch_sizes,
        sample[order].to(device),
        None if fresh is None else fresh.to(device),
        place[ends].to(device),
        sample[ends].to(device),
        to_forward,
        back,
        T,
        B,
    )


def packed_batch(packed: PackedSequence, state: list[Tensor] | None) -> int:
    """B: the sequences alive at the first step."""
    if (
        torch.compiler.is_compiling()
    ):  # a size that the tracer knows, where there is one; the op compares the two
        if packed.sorted_indices is not None:
            return packed.sorted_indices.size(0)
        if state:
            return state[0].size(1)
    return int(packed.batch_sizes[0])


def check_batch_sizes(batch_sizes: Any, rows: int) -> None:
    """Raises RuntimeError if these are no batch sizes of so many packed rows."""
    if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        got = type(batch_sizes).__name__
        if isinstance(batch_sizes, Tensor):
            got = f"a {batch_sizes.dim()}-D tensor of {batch_sizes.dtype}"
        raise RuntimeError(f"batch_sizes must be a 1-D tensor of torch.int64, got {got}")
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes should always be on CPU, got {batch_sizes.device}")
    if batch_sizes.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if torch.compiler.is_compiling():  # the values are not known while tracing
        return
    sizes = batch_sizes.tolist()
    if (total := sum(sizes)) != rows:
        raise RuntimeError(f"batch_sizes must add up to the rows of the input. Expected {rows}, got {total}")
    if sizes[-1] <= 0 or any(size < later for size, later in pairwise(sizes)):
        raise RuntimeError("batch_sizes must be positive and must not increase from step to step")


def check_lengths(lengths: object, T: int, B: int) -> None:
    """Raises RuntimeError if these are no lengths of a batch ``[T, B]``.

    Values are looked at where that takes no waiting for a device, and by :func:`cut`.
    """
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64 or lengths.dim() != 1:
        raise RuntimeError(f"lengths must be a 1-D tensor of torch.int64, got {_kind(lengths)}")
    if lengths.shape != (B,):
        raise RuntimeError(f"lengths must have one entry per sequence. Expected {B}, got {lengths.size(0)}")
    if torch.compiler.is_compiling():
        return
    if lengths.is_cpu:
        _check_range(lengths, T)


def check_reset(reset: object, shape: tuple[int, ...]) -> None:
    """Raises RuntimeError if ``reset`` is no bool tensor of this shape."""
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        raise RuntimeError(f"reset must be a tensor of torch.bool, got {_kind(reset)}")
    if reset.shape != shape:
        raise RuntimeError(f"reset must have one entry per step. Expected {shape}, got {tuple(reset.shape)}")


def _check_range(lengths: Tensor, T: int) -> None:
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
        raise RuntimeError(f"lengths must be in [0, {T}], got {lengths.tolist()}")


def _kind(value: object) -> str:
    return f"a {value.dim()}-D tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
