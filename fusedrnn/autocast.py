"""What autocast asks of a layer call."""

from __future__ import annotations

import torch

from .cells import Cell

DEVICES = ("cpu", "cuda")


def enabled(device: str) -> bool:
    """Whether autocast is on for a type of device; False where torch knows no autocast."""
    return device in DEVICES and torch.is_autocast_enabled(device)


def cast(cell: Cell, device: str, args: tuple, *, promote: bool) -> tuple:
    """Casts (x, state, *weights) as autocast asks, so that outputs have the built-in's dtypes.

    The built-in's RNN and LSTM run in the autocast dtype. On the CPU its GRU, and with ``promote`` (packed
    input, cells) its LSTM, mix dtypes and end in the wider of the state's and autocast's. fp64 is left alone.
    """
    x, state, *_ = args
    if x.dtype == torch.float64:
        return args
    dtype = torch.get_autocast_dtype(device)
    mixes = cell.name == "gru" or (cell.name == "lstm" and (promote or x.dtype not in (torch.float32, dtype)))
    if device == "cpu" and mixes:
        dtype = torch.promote_types(dtype, state[0].dtype)
    return tuple([t.to(dtype) for t in a] if isinstance(a, (list, tuple)) else a.to(dtype) for a in args)
