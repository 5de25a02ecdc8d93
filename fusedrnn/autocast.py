"""What autocast asks of a layer call."""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import Cell
from .checks import given

DEVICES = ("cpu", "cuda")


def enabled(x: Tensor) -> bool:
    """Whether autocast is on for tensors where ``x`` is; False where torch knows no autocast."""
    if not torch._C._is_any_autocast_enabled():  # most often, and it takes a fraction of the time
        return False
    return x.device.type in DEVICES and torch.is_autocast_enabled(x.device.type)


def cast(cell: Cell, device: str, args: tuple, *, promote: bool) -> tuple:
    """Casts (x, state, *weights) as autocast asks, so that outputs have the built-in's dtypes.

    The built-in's RNN and LSTM run in the autocast dtype. On the CPU its GRU, and with ``promote`` (packed
    input, cells) its LSTM, mix dtypes and end in the wider of the state's and autocast's. fp64 is left alone.
    """
    x, state, *_ = args
    if x.dtype == torch.float64:
        return args
    dtype = torch.get_autocast_dtype(device)
    wide = promote or x.dtype not in (torch.float32, dtype)
    mixes = cell.name == "gru" or (cell.name == "lstm" and wide and not projected(args))
    if device == "cpu" and mixes:
        dtype = torch.promote_types(dtype, state[0].dtype)
    return tuple([t.to(dtype) for t in a] if isinstance(a, (list, tuple)) else a.to(dtype) for a in args)


def projected(args: tuple) -> bool:
    """Whether (x, state, *weights) has a projection."""
    return len(args) > 6 and bool(given(args[6]))


def widen(cell: Cell, device: str, args: tuple, final: list[Tensor]) -> None:
    """Gives the final states of a call with (x, state, *weights), in place, the dtypes of the built-in's.

    On the CPU its LSTM with a projection casts h alone at every step: c stays as wide as it came.
    """
    if device == "cpu" and cell.name == "lstm" and projected(args):
        final[1] = final[1].to(torch.promote_types(final[1].dtype, args[1][1].dtype))
