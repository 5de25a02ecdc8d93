"""Checks of a layer call, for where no kernel of ours sees it: the reference, the built-in, tracing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .cells import Cell


def check(
    cell: Cell,
    x: Tensor,
    state: Sequence[Tensor],
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    *,
    mixed_dtypes: bool = False,
    inputs: int = 1,
) -> None:
    """Checks a call as the compiled op does, for where no kernel of ours sees it.

    ``mixed_dtypes``: autocast is going to make one dtype of them. ``inputs``: as :func:`inputs_of`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    bias_ih, bias_hh, weight_hr = given(bias_ih), given(bias_hh), given(weight_hr)
    N = len(reverse)
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        raise RuntimeError(f"x must be {'2-D' if packed else '3-D'}, got {x.dim()}-D")
    if N == 0 or len(weight_ih) != N or len(weight_hh) != N:
        raise RuntimeError("weights must have one tensor per recurrence")
    if len(bias_ih) != len(bias_hh) or len(bias_ih) not in (0, N):
        raise RuntimeError("biases must be given for all or none")
    if len(weight_hr) not in (0, N):
        raise RuntimeError("projections must be given for all recurrences or none")
    if len(state) != cell.states:
        raise RuntimeError(f"{cell.name} has {cell.states} states, got {len(state)}")
    if weight_hr and cell.reads_h:
        raise RuntimeError(f"{cell.name} has no projection")
    if not x.dtype.is_floating_point:
        raise RuntimeError(f"x must be of a floating dtype, got {x.dtype}")
    for name, group, rank in (("weight_hh", weight_hh, 2), ("state", state, 3), ("weight_hr", weight_hr, 2)):
        if group and group[0].dim() != rank:
            raise RuntimeError(f"{name} must be {rank}-D, got {group[0].dim()}-D")
    G, H = cell.gates, weight_hh[0].size(0) // cell.gates
    P = weight_hr[0].size(0) if weight_hr else H
    B = state[0].size(1)
    if H == 0 or P == 0:
        raise RuntimeError(f"hidden and projection size must be positive, got {H} and {P}")
    if not packed:
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if x.size(1) != B:
            raise RuntimeError(f"state has batch size {B}, x has {x.size(1)}")
    dtype, device = x.dtype, x.device
    for name, group, shape in (
        ("weight_ih", weight_ih, (G * H, x.size(-1) // inputs)),
        ("weight_hh", weight_hh, (G * H, P)),
        ("bias_ih", bias_ih, (G * H,)),
        ("bias_hh", bias_hh, (G * H,)),
        ("weight_hr", weight_hr, (P, H)),
        ("state", state[:1], (N, B, P)),
        ("state", state[1:], (N, B, H)),
    ):
        for tensor in group:
            if tensor.shape != shape:
                raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != dtype and not mixed_dtypes:
                raise RuntimeError(f"{name} has dtype {tensor.dtype}, x has {dtype}")
            if tensor.device != device:
                raise RuntimeError(f"{name} is on {tensor.device}, x on {device}")
    if batch_sizes is not None:
        _check_batch_sizes(batch_sizes, x, B)


def inputs_of(x: Tensor, weight_ih: Sequence[Tensor]) -> int:
    """K, the inputs that lie side by side in the features of x: each is for N / K recurrences in turn.

    Calls of the functional interface have one. The ops take more, which vmap makes.
    """
    features, own, N = x.size(-1), weight_ih[0].size(-1) if weight_ih[0].dim() else 0, len(weight_ih)
    if own == features or own == 0 or features % own:
        return 1
    return features // own if N % (features // own) == 0 else 1


def given(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights, or none where vectors of no elements stand for them: see ``ops.sequence``."""
    return [] if all(w.dim() == 1 and w.size(0) == 0 for w in weights) else weights


def _check_batch_sizes(batch_sizes: Tensor, x: Tensor, B: int) -> None:
    if batch_sizes.device.type != "cpu":
        raise RuntimeError("batch_sizes must be on the CPU")
    if batch_sizes.dtype != torch.int64:
        raise RuntimeError(f"batch_sizes must be int64, got {batch_sizes.dtype}")
    if batch_sizes.dim() != 1 or batch_sizes.numel() == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if torch.compiler.is_compiling() or type(batch_sizes) is not Tensor:
        return
    sizes = batch_sizes.tolist()
    if sizes[0] != B:
        raise RuntimeError(f"batch_sizes[0] is {sizes[0]}, the state has batch size {B}")
    if sizes[-1] <= 0 or any(a < b for a, b in pairwise(sizes)):
        raise RuntimeError("batch_sizes must be positive and must not increase")
    if sum(sizes) != x.size(0):
        raise RuntimeError(f"batch_sizes add up to {sum(sizes)}, x has {x.size(0)} rows")
