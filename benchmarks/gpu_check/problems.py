"""Layer calls to check with: random problems, run under a forced schedule, and judged."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedrnn
from fusedrnn import accuracy as gates
from fusedrnn import env
from fusedrnn.cells import CELLS
from fusedrnn.functional import Weights, sequence

from .checks import Failed

PERSISTENT = ("block", "cluster", "grid")
SCHEDULES = ("stepwise", *PERSISTENT)
PLANNED = ""  # the value of FUSEDRNN_SCHEDULE that forces nothing
FEW = 2.0**-20  # a share of units that is none of those in a case


@dataclass(frozen=True)
class Case:
    """Sizes as in the dims legend; ``reverse`` for each of the N recurrences."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    reverse: tuple[bool, ...] = (False,)
    packed: bool = False

    def __str__(self) -> str:
        directions = {(False,): "", (True,): " reverse", (False, True): " both ways"}[self.reverse]
        return f"{self.cell} T{self.T} B{self.B} I{self.I} H{self.H}{directions}" + " packed" * self.packed


@dataclass
class Problem:
    """A layer call, and the gradients of its outputs: ``dy`` like y, ``dfinal`` like the states."""

    case: Case
    x: Tensor
    state: list[Tensor]
    weights: Weights
    batch_sizes: Tensor | None
    dy: Tensor
    dfinal: list[Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        named = {"x": self.x, **{f"state{i}": s for i, s in enumerate(self.state)}}
        for field, group in zip(Weights._fields, self.weights, strict=True):
            named |= {f"{field}{n}": t for n, t in enumerate(group)}
        return named

    def map(self, change: Any) -> Problem:
        """The same with every tensor changed, except ``batch_sizes``, which stay on the CPU."""
        return Problem(
            self.case,
            change(self.x),
            [*map(change, self.state)],
            Weights(*([*map(change, group)] for group in self.weights)),
            self.batch_sizes,
            change(self.dy),
            [*map(change, self.dfinal)],
        )

    def leaves(self) -> Problem:
        """The same storage, asking for gradients."""
        same = self.map(lambda t: t.detach().requires_grad_())
        same.dy, same.dfinal = self.dy, self.dfinal
        return same

    def forward(self) -> dict[str, Tensor]:
        y, final = sequence(
            self.case.cell,
            self.x,
            self.state,
            self.weights,
            reverse=self.case.reverse,
            batch_sizes=self.batch_sizes,
        )
        return {"y": y, **{f"final{i}": s for i, s in enumerate(final)}}

    def results(self) -> dict[str, Tensor]:
        """Outputs, and gradients if the inputs ask for them."""
        outputs = self.forward()
        if not self.x.requires_grad:
            return outputs
        sources = self.inputs
        grads = torch.autograd.grad([*outputs.values()], [*sources.values()], [self.dy, *self.dfinal])
        named = {f"d{name}": g for name, g in zip(sources, grads, strict=True)}
        return {name: t.detach() for name, t in (outputs | named).items()}


def make_problem(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Weights as torch.nn draws them, the rest normal; packed lengths are random, the first is T."""
    G, N = CELLS[case.cell].gates, len(case.reverse)
    T, B, I, H = case.T, case.B, case.I, case.H
    generator = torch.Generator().manual_seed(seed)

    def put(t: Tensor) -> Tensor:
        return t.to(device, dtype)

    def uniform(*size: int) -> Tensor:
        return put((torch.rand(size, generator=generator) * 2 - 1) / math.sqrt(H))

    def normal(*size: int) -> Tensor:
        return put(torch.randn(size, generator=generator))

    weights = Weights(
        [uniform(G * H, I) for _ in range(N)],
        [uniform(G * H, H) for _ in range(N)],
        [uniform(G * H) for _ in range(N)],
        [uniform(G * H) for _ in range(N)],
        [],
    )
    batch_sizes, steps = None, (T, B)
    if case.packed:
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        lengths[0] = T
        batch_sizes = torch.stack([(lengths > t).sum() for t in range(T)])
        steps = (int(batch_sizes.sum()),)
    states = [(N, B, H)] * CELLS[case.cell].states
    return Problem(
        case,
        normal(*steps, I),
        [normal(*size) for size in states],
        weights,
        batch_sizes,
        normal(*steps, N * H),
        [normal(*size) for size in states],
    )


@contextmanager
def forced(backend: str, schedule: str = PLANNED) -> Iterator[None]:
    """Forces a backend for this thread and, for the whole process, how the CUDA kernels run a sequence."""
    before = os.environ.get(env.SCHEDULE)
    os.environ[env.SCHEDULE] = schedule
    try:
        with fusedrnn.use_backend(backend), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")
            yield
    finally:
        if before is None:
            del os.environ[env.SCHEDULE]
        else:
            os.environ[env.SCHEDULE] = before


@contextmanager
def poisoned() -> Iterator[None]:
    """Whatever torch allocates inside holds NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def settle(backend: str, device: torch.device) -> None:
    """Waits for what was launched, and raises if a kernel gave up: ops say so at the next call only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        tiny = make_problem(Case("rnn_tanh", 1, 1, 1, 1), torch.float32, device)
        with forced(backend, "stepwise"):
            tiny.forward()
        torch.cuda.synchronize(device)


def run(
    problem: Problem, backend: str, schedule: str, device: torch.device, *, training: bool = True
) -> dict[str, Tensor]:
    """The problem's results, over memory that held NaN, once all of them are there."""
    with forced(backend, schedule), poisoned():
        results = (problem.leaves() if training else problem).results()
    settle(backend, device)
    return results


def judge(
    ours: Mapping[str, Tensor],
    builtin: Mapping[str, Tensor] | None,
    referee: Mapping[str, Tensor],
    precision: gates.Precision,
    *,
    kink: bool = False,
) -> dict[str, gates.Verdict]:
    """As :func:`benchmarks.gates.judge_all`; without a built-in only the distance from the referee counts.

    ``kink``: the cell's derivative jumps at zero. Rounding then puts a share of about ``unit`` of all units
    on the other side of it, each with an error as large as its gradient: of the L2 norm that is the root of
    their share, for the built-in as for ours. In fp32 there is hardly one.
    """
    if not ours.keys() == referee.keys():
        raise ValueError(f"results do not correspond: {list(ours)}, {list(referee)}")
    verdicts = {}
    for name, result in ours.items():
        allowed = precision.cap * precision.unit
        jumps = kink and name.startswith("d") and precision.unit > FEW
        if jumps:
            allowed = max(allowed, 2 * math.sqrt(precision.unit + 1 / referee["y"].numel()))
        if builtin is not None and not jumps:
            verdicts[name] = gates.judge(result, builtin[name], referee[name], precision)
            continue
        error = gates.relative_l2(result, referee[name])
        other = math.nan if builtin is None else gates.relative_l2(builtin[name], referee[name])
        far = f"has a relative error of {error:.1e} against fp64, allowed is {allowed:.1e}"
        verdicts[name] = gates.Verdict(error, other, math.nan, "" if error <= allowed else far)
    return verdicts


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN if there is one."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


def figures_of(verdicts: Mapping[str, gates.Verdict], precision: gates.Precision) -> dict[str, Any]:
    """What a record keeps of verdicts; the errors are ours, the built-in's, and the distance of the two."""
    return {
        "allowed": precision.cap * precision.unit,
        "worst": largest(v.error for v in verdicts.values()),
        "builtin_worst": largest(v.builtin_error for v in verdicts.values()),
        "errors": {name: [v.error, v.builtin_error, v.difference] for name, v in verdicts.items()},
    }


def faults_of(verdicts: Mapping[str, gates.Verdict]) -> str:
    """What is wrong, in the words of the first that is; empty if nothing is."""
    wrong = [f"{name} {v.fault}" for name, v in verdicts.items() if v.fault]
    more = f" (and {len(wrong) - 1} more of {len(verdicts)} results)" if len(wrong) > 1 else ""
    return wrong[0] + more if wrong else ""


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of the results that are not equal to the bit. A NaN equals nothing."""
    return [name for name in b if not torch.equal(a[name], b[name])]


def require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises :class:`Failed` unless all results are equal to the bit."""
    if names := differing(found, expected):
        errors = {name: gates.relative_l2(found[name], expected[name]) for name in names}
        worst = max(errors, key=lambda name: errors[name])
        raise Failed(f"{what}: {', '.join(names)} differ, {worst} by {errors[worst]:.1e}", errors=errors)
