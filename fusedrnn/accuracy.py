"""How accuracy is judged: against the same computation in fp64, and beside the error of torch's own kernel.

Not by the largest error over a long sequence, which a recurrence amplifies, but by relative L2 errors, and by
:func:`residual`, which takes each step for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Precision(NamedTuple):
    """A way to compute.

    Attributes:
        dtype: of weights, inputs and results.
        unit: relative spacing of the numbers that enter the matrix products.
        cap: largest relative error to accept, in units. In fp32 the built-in's own errors over these
            sequences are 1 to 7 units; the other modes accumulate in fp32 and round once per step.
    """

    dtype: torch.dtype
    unit: float
    cap: float


PRECISIONS = {
    "fp32": Precision(torch.float32, 2.0**-23, 32),
    "tf32": Precision(torch.float32, 2.0**-10, 8),
    "fp16": Precision(torch.float16, 2.0**-10, 8),
    "bf16": Precision(torch.bfloat16, 2.0**-7, 8),
}

# How much further from the truth than the built-in a result may be. Another order of summation rounds better
# here and worse there, seen is up to 1.8 times; a wrong or a less precise term does more.
SLACK = 2.0


_FEW = 2.0**-20  # a share of units that is none of those in a case


def across_a_kink(precision: Precision, units: int) -> Precision:
    """What to allow gradients of a cell whose derivative jumps at zero, as relu's does.

    Rounding puts a share of about ``unit`` of all units on the other side of the jump, each with an error as
    large as its gradient: of the L2 norm that is the root of their share, for the built-in as for ours. In
    fp32 there is hardly one.

    Args:
        precision: of the cells without a jump.
        units: how many values of h there are.
    """
    if precision.unit <= _FEW:
        return precision
    # A unit on the other side changes what it passes on to earlier steps too: up to 2.2 times that was seen.
    allowed = max(precision.cap * precision.unit, 3 * math.sqrt(precision.unit + 1 / units))
    # As a unit, so that the built-in, whose errors are others, is no bound either.
    return precision._replace(unit=allowed, cap=1)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Lets fp32 products on a GPU use TF32 for ``tf32``, and for nothing else."""
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


class Verdict(NamedTuple):
    """How far one result is from the fp64 run and from the built-in; ``fault`` is empty if near enough."""

    error: float
    builtin_error: float
    difference: float
    fault: str


def relative_l2(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` in fp64; ``|a|`` where b is zero."""
    a, b = a.detach().double(), b.detach().double()
    norm = b.norm().item()
    return (a - b).norm().item() / (norm if norm > 0 else 1.0)


def judge(
    ours: Tensor, builtin: Tensor, referee: Tensor, precision: Precision, *, layers: int = 1
) -> Verdict:
    """Judges one result against the built-in's, with the same computation in fp64 as the referee of both.

    ``layers``: what is allowed grows with them, since each adds the rounding of its own.
    """
    if ours.shape != builtin.shape or ours.dtype != builtin.dtype:
        fault = f"is {ours.dtype} {list(ours.shape)}, not {builtin.dtype} {list(builtin.shape)}"
        return Verdict(math.inf, math.inf, math.inf, fault)
    error, builtin_error = relative_l2(ours, referee), relative_l2(builtin, referee)
    difference = relative_l2(ours, builtin)
    cap = layers * precision.cap * precision.unit
    fault = ""
    if not error <= cap:  # NaN is a fault too
        fault = f"has a relative error of {error:.1e} against fp64, allowed is {cap:.1e}"
    elif error > SLACK * builtin_error + layers * precision.unit:
        fault = f"has a relative error of {error:.1e} against fp64, the built-in's is {builtin_error:.1e}"
    elif not difference <= 2 * cap:
        fault = f"differs from the built-in by {difference:.1e}, allowed is {2 * cap:.1e}"
    return Verdict(error, builtin_error, difference, fault)


def judge_all(
    ours: Mapping[str, Tensor],
    builtin: Mapping[str, Tensor],
    referee: Mapping[str, Tensor],
    precision: Precision,
    *,
    layers: int = 1,
) -> dict[str, Verdict]:
    """Judges results by name. A name that only one side has raises ``ValueError``."""
    if not ours.keys() == builtin.keys() == referee.keys():
        raise ValueError(f"results do not correspond: {list(ours)}, {list(builtin)}, {list(referee)}")
    return {name: judge(ours[name], builtin[name], referee[name], precision, layers=layers) for name in ours}
