"""Whether the layers are right on this machine: :func:`verify`, for chosen cells, sizes and precisions.

Four questions for each case:

- values: y, final states and all gradients, against the same layer of ``torch.nn`` in fp64, beside the error
  of ``torch.nn`` in the same precision (:mod:`fusedrnn.accuracy`);
- steps: the teacher-forced residual. At some steps, the next h is computed in fp64 from the states that the
  kernel itself arrived at, and compared with the kernel's. A recurrence cannot amplify or hide such an error;
- repeats: the same call again gives the same bits;
- modes: inference gives what training gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import accuracy, functional, reference
from .accuracy import PRECISIONS, SLACK, Precision, relative_l2
from .backend import use_backend
from .cells import get_cell
from .functional import Weights
from .trial import Cell, Inputs, Shape, Trio, call, make_trio

STEPS = 6  # at which the residual is taken


@dataclass(frozen=True)
class Case:
    """What is verified: ``precision`` is a key of :data:`fusedrnn.accuracy.PRECISIONS`."""

    cell: Cell
    shape: Shape
    precision: str

    def __str__(self) -> str:
        return f"{self.cell} {self.shape} {self.precision}"


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        case: what was verified.
        what: ``values``, ``gradients``, ``steps``, ``repeats`` or ``modes``.
        worst: the name of the result that is furthest off.
        error: its relative L2 error against fp64; of repeats and modes, against the first run.
        builtin_error: the error of torch's own kernel in the same result; NaN where it was not asked.
        allowed: the largest error to accept.
        fault: what is wrong; empty if nothing is.
    """

    case: Case
    what: str
    worst: str
    error: float
    builtin_error: float
    allowed: float
    fault: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no word for NaN."""
        values = asdict(self) | {"case": str(self.case)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def verify(
    case: Case, device: torch.device, *, backend: str | None = None, seed: int = 0
) -> Iterator[Finding]:
    """Answers the questions for one case.

    Args:
        case: the cell, sizes and precision.
        device: where to run.
        backend: what has to serve the calls; by default what the planner chooses.
        seed: of weights and inputs.

    Yields:
        A :class:`Finding` for each question.

    Raises:
        RuntimeError: the backend is not available, or cannot serve the call.
    """
    precision = PRECISIONS[case.precision]
    with accuracy.matmul_precision(case.precision):
        trio = make_trio(case.cell, case.shape, precision.dtype, device, seed)
        results = _run(trio, backend, "training")
        yield from _values(case, trio, results, precision)
        yield _steps(case, trio, precision, backend)
        yield _equal(case, "repeats", results, _run(trio, backend, "training"))
        yield _equal(case, "modes", results, _run(trio, backend, "inference"))


def _run(trio: Trio, backend: str | None, mode: str) -> dict[str, Tensor]:
    with _served_by(backend):
        return {name: t.detach() for name, t in call(trio.ours, trio.inputs, mode).items()}


@contextmanager
def _served_by(backend: str | None) -> Iterator[None]:
    with use_backend(backend) if backend else nullcontext():
        yield


def _values(case: Case, trio: Trio, results: dict[str, Tensor], precision: Precision) -> Iterator[Finding]:
    builtin = call(trio.builtin, trio.inputs, "training")
    truth = call(trio.referee, trio.inputs.to(torch.float64), "training")
    kinked = case.cell.nonlinearity == "relu"
    layers, verdicts = case.shape.layers, {}
    for name, result in results.items():
        jumps = kinked and name.startswith("d")
        verdicts[name] = accuracy.judge(
            result,
            builtin[name],
            truth[name],
            accuracy.across_a_kink(precision, truth["y"].numel()) if jumps else precision,
            layers=layers,
        )
    for what, names in (
        ("values", [n for n in verdicts if not n.startswith("d")]),
        ("gradients", [n for n in verdicts if n.startswith("d")]),
    ):
        faulty = [n for n in names if verdicts[n].fault]
        worst = faulty[0] if faulty else max(names, key=lambda n: verdicts[n].error)
        v = verdicts[worst]
        fault = "; ".join(f"{n} {verdicts[n].fault}" for n in faulty)
        allowed = layers * precision.cap * precision.unit
        yield Finding(case, what, worst, v.error, v.builtin_error, allowed, fault)


def _equal(case: Case, what: str, first: dict[str, Tensor], other: dict[str, Tensor]) -> Finding:
    """Whether two runs are equal: to the bit if one repeats the other.

    Inference may run by another plan than training, which rounds elsewhere.
    """
    precision = PRECISIONS[case.precision]
    allowed = 0.0 if what == "repeats" else case.shape.layers * precision.cap * precision.unit
    errors = {name: relative_l2(t, first[name]) for name, t in other.items()}
    unequal = [name for name in other if not torch.equal(other[name], first[name])]
    worst = max(unequal, key=lambda n: errors[n], default="")
    error = errors[worst] if worst else 0.0
    wrong = bool(unequal) if what == "repeats" else not error <= allowed
    fault = f"{', '.join(unequal)} differ, {worst} by {error:.1e}" if wrong else ""
    return Finding(case, what, worst, error, math.nan, allowed, fault)


def _steps(case: Case, trio: Trio, precision: Precision, backend: str | None) -> Finding:
    """The teacher-forced residual of every layer and direction: the worst, and torch's own at its worst."""
    worst, error, builtin_error = "", 0.0, 0.0
    with torch.no_grad():
        for name, residuals in _residuals(case, trio, backend):
            ours, theirs = residuals
            builtin_error = max(builtin_error, theirs)
            if not ours <= error:
                worst, error = name, ours
    # h is rounded once, and the cell state once where a sequence is cut.
    allowed = precision.cap * precision.unit
    fault = ""
    if not error <= allowed:
        fault = f"{worst} is off by {error:.1e}, allowed is {allowed:.1e}"
    elif error > SLACK * builtin_error + precision.unit:
        fault = f"{worst} is off by {error:.1e}, the built-in's by {builtin_error:.1e}"
    return Finding(case, "steps", worst, error, builtin_error, allowed, fault)


def _residuals(case: Case, trio: Trio, backend: str | None) -> Iterator[tuple[str, tuple[float, float]]]:
    layers: list[Weights] = trio.ours._layer_weights(trio.ours._flat_weights)  # type: ignore[operator]
    x, D = trio.inputs.x.detach(), case.shape.directions
    for number, weights in enumerate(layers):
        rows = slice(number * D, (number + 1) * D)
        state = [s.detach()[rows] for s in trio.inputs.state]
        part = Inputs(x, state, x, [], trio.inputs.batch_sizes)
        with _served_by(backend):
            y = _sequence(case.cell, part, weights, D)[0]
        for n in range(D):
            errors = []
            for chosen in (backend, "torch"):
                with _served_by(chosen):
                    errors.append(_residual(case.cell, part, weights, D, n))
            name = f"layer {number}" + (", reverse" if n else "")
            yield name, (errors[0], errors[1])
        x = y


def _sequence(cell: Cell, part: Inputs, weights: Weights, D: int) -> tuple[Tensor, list[Tensor]]:
    return functional.sequence(
        cell.registered,
        part.x,
        part.state,
        weights,
        reverse=[False, True][:D],
        batch_sizes=part.batch_sizes,
    )


def _residual(cell: Cell, part: Inputs, weights: Weights, D: int, n: int) -> float:
    """Of direction n: relative L2 over some steps, together, of h after a step.

    The states before a step are the final states of the same call on the part of the sequence before it: a
    recurrence does not see what comes later.
    """
    y, _ = _sequence(cell, part, weights, D)
    steps = len(part.batch_sizes) if part.batch_sizes is not None else part.x.size(0)
    one = Weights(*([w.double() for w in group[n : n + 1]] for group in weights))
    found, wanted = [], []
    for t in _sampled(steps):
        at, state = _before(cell, part, weights, D, n, t)
        x = part.x[at] if part.batch_sizes is None else part.x[at].unsqueeze(0)
        _, after = reference.sequence(
            get_cell(cell.registered), x.double(), [s.double() for s in state], *one, [False], None
        )
        width = y.size(-1) // D
        h = y[at][..., n * width : (n + 1) * width]
        found.append(h.reshape(-1, width))
        wanted.append(after[0][0].reshape(-1, width))
    return relative_l2(torch.cat(found), torch.cat(wanted))


def _sampled(steps: int) -> Sequence[int]:
    """Indices of the first step, the last and some in between."""
    return sorted({round(i * (steps - 1) / max(1, STEPS - 1)) for i in range(STEPS)})


def _before(cell: Cell, part: Inputs, weights: Weights, D: int, n: int, t: int) -> tuple[slice, list[Tensor]]:
    """The rows of step t, and the states of direction n that it starts from, each [1, sequences, *]."""
    sizes = part.batch_sizes
    if sizes is None:
        rows, sequences, later = slice(t, t + 1), part.x.size(1), part.x.size(1)
        before = part._replace(x=part.x[t + 1 :] if n else part.x[:t])
    else:
        offsets = [0, *sizes.cumsum(0).tolist()]
        rows, sequences = slice(offsets[t], offsets[t + 1]), int(sizes[t])
        before = part._replace(x=part.x[: offsets[t]], batch_sizes=sizes[:t])
        later = part.state[0].size(1)
        if n:  # those whose last step is t start there
            later = int(sizes[t + 1]) if t + 1 < len(sizes) else 0
            state = [s[:, :later].contiguous() for s in part.state]
            before = Inputs(part.x[offsets[t + 1] :], state, part.dy, [], sizes[t + 1 :].contiguous())
    initial = [s[n : n + 1, :sequences] for s in part.state]
    if not before.x.size(0):
        return rows, initial
    _, final = _sequence(cell, before, weights, D)
    reached = [s[n : n + 1, :sequences] for s in final]
    return rows, [torch.cat((f, i[:, later:]), 1) for f, i in zip(reached, initial, strict=True)]
