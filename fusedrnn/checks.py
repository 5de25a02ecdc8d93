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
    _require(x.dim() == (2 if packed else 3), f"x must be {'2-D' if packed else '3-D'}, got {x.dim()}-D")
    _require(
        N > 0 and len(weight_ih) == N and len(weight_hh) == N, "weights must have one tensor per recurrence"
    )
    _require(len(bias_ih) == len(bias_hh) and len(bias_ih) in (0, N), "biases must be given for all or none")
    _require(len(weight_hr) in (0, N), "projections must be given for all recurrences or none")
    _require(len(state) == cell.states, f"{cell.name} has {cell.states} states, got {len(state)}")
    _require(not (weight_hr and cell.reads_h), f"{cell.name} has no projection")
    _require(x.dtype.is_floating_point, f"x must be of a floating dtype, got {x.dtype}")
    ranks = {"weight_hh": (weight_hh[0], 2), "state": (state[0], 3)}
    if weight_hr:
        ranks["weight_hr"] = (weight_hr[0], 2)
    for name, (tensor, rank) in ranks.items():
        _require(tensor.dim() == rank, f"{name} must be {rank}-D, got {tensor.dim()}-D")
    G, H = cell.gates, weight_hh[0].size(0) // cell.gates
    P = weight_hr[0].size(0) if weight_hr else H
    B = state[0].size(1)
    _require(H > 0 and P > 0, f"hidden and projection size must be positive, got {H} and {P}")
    if not packed:
        _require(x.size(0) > 0, "Expected sequence length to be larger than 0 in RNN")
        _require(x.size(1) == B, f"state has batch size {B}, x has {x.size(1)}")
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
            _require(tensor.shape == shape, f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            _require(
                mixed_dtypes or tensor.dtype == x.dtype, f"{name} has dtype {tensor.dtype}, x has {x.dtype}"
            )
            _require(tensor.device == x.device, f"{name} is on {tensor.device}, x on {x.device}")
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
    _require(batch_sizes.device.type == "cpu", "batch_sizes must be on the CPU")
    _require(batch_sizes.dtype == torch.int64, f"batch_sizes must be int64, got {batch_sizes.dtype}")
    _require(
        batch_sizes.dim() == 1 and batch_sizes.numel() > 0,
        "Expected sequence length to be larger than 0 in RNN",
    )
    if not torch.compiler.is_compiling() and type(batch_sizes) is Tensor:
        sizes = batch_sizes.tolist()
        _require(sizes[0] == B, f"batch_sizes[0] is {sizes[0]}, the state has batch size {B}")
        _require(
            all(a >= b for a, b in pairwise(sizes)) and sizes[-1] > 0,
            "batch_sizes must be positive and must not increase",
        )
        _require(sum(sizes) == x.size(0), f"batch_sizes add up to {sum(sizes)}, x has {x.size(0)} rows")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
