"""The Triton backend: right, the same every time, and how fast beside the built-in and the CUDA kernels.

On a CPU its kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), beside the emulator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

import fusedrnn
from fusedrnn import accuracy as gates
from fusedrnn.cells import CELLS
from fusedrnn.trial import MODES, Shape

from .checks import NOT_RUN, Check, Context, NotRun, Record, Settings, Stage
from .correctness import (
    BOTH,
    capture,
    check_graph,
    check_parity,
    check_repeats,
    show_parity,
    show_repeats,
)
from .problems import Case, forced, make_problem, require_equal, settle
from .speed import GRU, LSTM, Timed, measure, show_times

NAME = "triton"
SCHEDULES = ("stepwise", "block", "grid")
# Every kernel is compiled here, for seconds, so that each size must show something. Weights on chip in one
# program, in several, and read at every step.
PACKED = Case("", 17, 13, 30, 53, BOTH, packed=True)
LARGE = {"block": (60,), "grid": (250, 1050)}
# The interpreter takes its time: two programs, for two steps.
QUICK_PACKED = Case("", 2, 2, 3, 17, (True,), packed=True)
REPEATED = (
    ("block", Case("lstm", 64, 19, 24, 100)),
    ("grid", Case("lstm", 64, 19, 24, 300)),
    ("grid", Case("lstm", 64, 19, 24, 1100)),
)
QUICK_REPEATED = tuple((schedule, Case("gru", 2, 2, 3, 17)) for schedule in ("block", "grid"))
BESIDE = {"cuda": "cuda planned", "emulator": "emulator planned"}  # our other kernels, by backend
SIZES, BATCHES, STEPS = (512, 128, 256, 1024), (16, 64), 256


def exists(schedule: str, precision: str) -> bool:
    """Products of ieee fp32 are too slow for one program."""
    return not (schedule == "block" and precision == "fp32")


def parity_cases(quick: bool) -> Iterator[tuple[str, Case, str, str]]:
    """Label, case, precision and schedule."""
    packed = QUICK_PACKED if quick else PACKED
    for cell, precision, schedule in itertools.product(
        CELLS, ("fp32", "bf16") if quick else tuple(gates.PRECISIONS), SCHEDULES
    ):
        if exists(schedule, precision):
            yield "packed", replace(packed, cell=cell), precision, schedule
    if not quick:
        for precision, cell, (schedule, sizes) in itertools.product(
            ("bf16", "tf32"), ("lstm", "gru"), LARGE.items()
        ):
            for H in sizes:
                yield "large", Case(cell, 6, 13, 40, H), precision, schedule


def check_unseen_batch(settings: Settings, case: Case, schedule: str, context: Context) -> dict[str, Any]:
    """Captures a packed batch of lengths that were never run before, and replays it."""
    if not settings.on_gpu:
        raise NotRun("needs a GPU")
    known, unseen = (make_problem(case, torch.bfloat16, settings.device, settings.seed + i) for i in (0, 1))
    with forced(settings.backend, schedule):
        graph, results = capture(unseen.results, warm_up=known.results)
        graph.replay()
        torch.cuda.synchronize(settings.device)
        require_equal(results, unseen.results(), "replayed and eager results")
        settle(settings.backend, settings.device)
    return {}


def graph(settings: Settings, case: Case, schedule: str, context: Context) -> dict[str, Any]:
    if not settings.on_gpu:
        raise NotRun("needs a GPU")
    return check_graph(settings, case, schedule, True, context)


def checks(settings: Settings) -> list[Check]:
    """All of them on this backend; of the schedules' names none is one of the CUDA kernels'."""
    beside = BESIDE[settings.backend]
    settings = settings._replace(backend=NAME)
    if reason := fusedrnn.backends()[NAME].reason:
        return [Check(NAME, partial(_unavailable, reason))]
    found = [
        _check(
            f"{precision} {schedule} {case} ({label})",
            partial(check_parity, settings, case, precision, schedule),
            schedule,
            cell=case.cell,
            precision=precision,
        )
        for label, case, precision, schedule in parity_cases(settings.quick)
    ]
    repeated = QUICK_REPEATED if settings.quick else REPEATED
    for schedule, case in repeated:
        name = f"{schedule} {case}"
        repeats = partial(check_repeats, settings, case, schedule, True)
        found += [_check(f"repeats of {name}", repeats, schedule)]
        found += [_check(f"graph of {name}", partial(graph, settings, case, schedule), schedule)]
    for schedule in ("stepwise", "grid"):
        unseen = Case("gru", 9, 5, 24, 100, BOTH, packed=True)
        found += [
            _check(
                f"graph of lengths never seen, {schedule}",
                partial(check_unseen_batch, settings, unseen, schedule),
                schedule,
            )
        ]
    for what in timed_calls(settings.quick):
        facts = {"precision": what.precision, "cell": what.cell.name, "mode": what.mode}
        shape = [what.shape.T, what.shape.B, what.shape.I, what.shape.H]
        run = partial(check_speed, settings, what, beside)
        found.append(Check(f"time of {what}", run, facts={**facts, "shape": shape}, patience=120))
    return found


def _check(name: str, run: Any, schedule: str, **facts: Any) -> Check:
    own = f"{NAME} {schedule}"
    return Check(name, run, own, facts={**facts, "schedule": own} if facts else {}, patience=120)


def _unavailable(reason: str, context: Context) -> dict[str, Any]:
    raise NotRun(reason)


def timed_calls(quick: bool) -> Iterator[Timed]:
    """bf16 and GRU first: what the built-in is slow in."""
    if quick:
        yield Timed("bf16", GRU, Shape(2, 1, 3, 17), "training")
        return
    for B, H, cell, mode in itertools.product(BATCHES, SIZES, (LSTM, GRU), MODES):
        yield Timed("bf16", cell, Shape(STEPS, B, H, H), mode)
    for precision in ("fp16", "tf32", "fp32"):
        yield Timed(precision, LSTM, Shape(STEPS, 16, 512, 512), "training")


def names(beside: str) -> tuple[str, ...]:
    return (f"{NAME} planned", *(f"{NAME} {schedule}" for schedule in SCHEDULES), beside)


def check_speed(settings: Settings, what: Timed, beside: str, context: Context) -> dict[str, Any]:
    return measure(settings, what, names(beside), context)


def show(records: Sequence[Record], console: Console) -> None:
    compared = [r for r in records if "builtin_worst" in r or "allowed" in r]
    if compared:
        show_parity(compared, console, [f"{NAME} {schedule}" for schedule in SCHEDULES])
    repeated = [r for r in records if r["check"].startswith(("repeats", "graph")) and r["verdict"] != NOT_RUN]
    if repeated:
        show_repeats(repeated, console)
    timed = [r for r in records if "microseconds_per_step" in r]
    for beside in BESIDE.values():
        if any(beside in r["microseconds_per_step"] for r in timed):
            show_times(timed, console, names(beside), f"{NAME} planned")


TRITON = Stage(NAME, "The Triton backend", 110, checks, show)
