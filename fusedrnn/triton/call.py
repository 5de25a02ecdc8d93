"""A layer call as the ops got it: checked, with its sizes, and its products over all steps."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..cells import CELL_BY_ID, Cell, compute_dtype
from ..checks import check, inputs_of
from ..env import interpreted


@dataclass
class Call:
    """Dims as everywhere; ``P`` is H without a projection. Tensors of all steps are kept as rows.

    ``K`` inputs lie side by side in x, each for N / K recurrences in turn.
    """

    cell: Cell
    x: Tensor  # [T, B, K*I], packed: [rows, K*I]
    state: list[Tensor]
    weight_ih: list[Tensor]
    weight_hh: list[Tensor]
    bias_ih: list[Tensor]
    bias_hh: list[Tensor]
    weight_hr: list[Tensor]
    reverse: list[bool]
    batch_sizes: Tensor | None
    tf32: bool

    def __post_init__(self) -> None:
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr)
        self.K = inputs_of(self.x, self.weight_ih)
        check(self.cell, self.x, self.state, *weights, self.reverse, self.batch_sizes, inputs=self.K)
        device = self.x.device.type
        if device != "cuda" and not (device == "cpu" and interpreted()):
            raise RuntimeError(f"x must be on a CUDA device, is on {device}")
        functions = self.cell.triton_functions()
        if functions is None:
            raise RuntimeError(f"{self.cell.name} has no Triton functions")
        self.forward, self.backward = functions
        self.N, self.G, self.S = len(self.reverse), self.cell.gates, self.cell.states
        self.I, self.H = self.x.size(-1) // self.K, self.weight_hh[0].size(0) // self.G
        self.P, self.B = self.weight_hh[0].size(1), self.state[0].size(1)
        self.T = self.x.size(0) if self.batch_sizes is None else self.batch_sizes.numel()
        self.rows = self.x.shape[:-1].numel()
        self.dtype, self.compute = self.x.dtype, compute_dtype(self.x.dtype)

    @classmethod
    def of(cls, cell: int, *arguments: Any) -> Call:
        if cell not in CELL_BY_ID:
            raise RuntimeError(f"no cell has number {cell}")
        return cls(CELL_BY_ID[cell], *arguments)

    @property
    def projected(self) -> bool:
        return bool(self.weight_hr)

    @property
    def packed(self) -> bool:
        return self.batch_sizes is not None

    @cached_property
    def counts(self) -> list[int]:
        """How many sequences are alive at each step."""
        return [self.B] * self.T if self.batch_sizes is None else self.batch_sizes.tolist()

    @cached_property
    def steps(self) -> Tensor:
        """Of a packed batch, on the device: the first row of each step, their number, then each length."""
        return self.x.new_empty(0, dtype=torch.int64) if self.batch_sizes is None else _steps(self)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def shaped_as_x(self, rows: Tensor, *tail: int) -> Tensor:
        return rows.view(*self.x.shape[:-1], *tail)

    def input_rows(self) -> Tensor:
        return self.x.reshape(self.rows, self.K * self.I)

    def input_of(self, rows: Tensor, n: int) -> Tensor:
        """Of the rows of x, those features that are the input of recurrence n."""
        return rows if self.K == 1 else rows.narrow(1, n * self.K // self.N * self.I, self.I)

    def multiply_input(self, gates: Tensor) -> None:
        """W_ih x of all rows into ``[rows, N, G, H]``."""
        x = self.input_rows()
        for n, weight in enumerate(self.weight_ih):
            multiply(columns(gates, n), self.input_of(x, n), weight.t())

    def stacked(self, group: list[Tensor]) -> Tensor | None:
        """One tensor of N. Those of several recurrences are copied: a kernel takes one pointer, not N."""
        if not group:
            return None
        return group[0].contiguous().unsqueeze(0) if len(group) == 1 else torch.stack(group)


_MOST_KEPT = 64
_kept: OrderedDict[tuple[bytes, torch.device], Tensor] = OrderedDict()


def _steps(call: Call) -> Tensor:
    """Copied once for each batch, since a copy waits for the device."""
    sizes = call.batch_sizes
    assert sizes is not None
    key = (sizes.contiguous().numpy().tobytes(), call.x.device)
    if key in _kept and not capturing(call.x):
        _kept.move_to_end(key)
        return _kept[key]
    offsets = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    lengths = (sizes[:, None] > torch.arange(call.B)).sum(0)
    steps = torch.cat((offsets, lengths))
    if capturing(call.x):
        return _sent_with_kernels(steps, call.x.device)
    _kept[key] = steps.to(call.x.device)
    if len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return _kept[key]


def capturing(x: Tensor) -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _sent_with_kernels(values: Tensor, device: torch.device) -> Tensor:
    """A copy of host memory that a CUDA graph can hold: the numbers are parameters of its kernels.

    A plain copy would read the host memory again at every replay, when other things are there.
    """
    out = torch.zeros(values.numel(), dtype=values.dtype, device=device)
    torch._foreach_add_(out.split(1), values.tolist())
    return out


def columns(buffer: Tensor, n: int) -> Tensor:
    """Recurrence n of ``[rows, N, G, H]`` as a matrix ``[rows, G*H]``."""
    return buffer.select(1, n).flatten(1)


def multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a b``; sums of 16-bit products are rounded once, to out's dtype. ``out`` may be strided."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
