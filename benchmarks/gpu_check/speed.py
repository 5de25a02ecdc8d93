"""Timing against the built-in, right first, then fast; and of every plan, to see if the first is best."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fusedrnn
from fusedrnn import accuracy as gates
from fusedrnn.bench import timing
from fusedrnn.trial import CELLS, MODES, Cell, Inputs, Shape, call, make_inputs

from . import library
from .checks import NEVER_CAME, Check, Context, Failed, Record, Settings, Stage
from .correctness import capture
from .problems import PERSISTENT, PLANNED, faults_of, forced, judge, settle

HIDDEN, BATCHES, STEPS = (256, 512, 1024, 128, 64), (16, 1, 64), 256
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
CHECKED_STEPS = 16  # of the same sizes, held against fp64 before anything is timed
STEPWISE_FROM = 512  # hidden units from which the stepwise schedule is worth its time here
ROUNDS, WARMUP, SECONDS = 9, 2, 0.3
LSTM, GRU, _ = CELLS
REGISTERED = {"LSTM": "lstm", "GRU": "gru"}


@dataclass(frozen=True)
class Timed:
    """A layer call that is timed."""

    precision: str
    cell: Cell
    shape: Shape
    mode: str

    def __str__(self) -> str:
        return f"{self.precision} {self.cell.name} {self.shape} {self.mode}"

    @property
    def bounds(self) -> gates.Precision:
        return gates.PRECISIONS[self.precision]

    def plans(self, *, backward: bool) -> list[library.Plan]:
        """Those that the device can keep resident, in the planner's order."""
        cell, tf32 = REGISTERED[self.cell.name], self.precision == "tf32"
        return library.plans(cell, self.bounds.dtype, tf32, backward, 1, self.shape.B, self.shape.H)


def timed_calls(quick: bool) -> Iterator[Timed]:
    """What is asked for most comes first."""
    if quick:
        yield Timed("fp32", LSTM, Shape(4, 3, 16, 33), "training")
        yield Timed("bf16", GRU, Shape(4, 3, 16, 33), "inference")
        return
    for precision, B, H in itertools.product(PRECISIONS, BATCHES, HIDDEN):
        for cell, mode in itertools.product((LSTM, GRU), MODES):
            yield Timed(precision, cell, Shape(STEPS, B, H, H), mode)


def swept_calls() -> Iterator[Timed]:
    for B, H in ((16, 512), (16, 256), (16, 1024), (1, 512), (64, 512), (16, 128)):
        for cell, mode in itertools.product((LSTM, GRU), MODES):
            yield Timed("bf16", cell, Shape(STEPS, B, H, H), mode)


def check_speed(settings: Settings, what: Timed, context: Context) -> dict[str, Any]:
    schedules = ["planned", *PERSISTENT] + ["stepwise"] * (what.shape.H >= STEPWISE_FROM)
    return measure(settings, what, schedules, context)


def check_plans(settings: Settings, what: Timed, context: Context) -> dict[str, Any]:
    """Times every plan of the call's last pass; what the other pass cannot have is refused."""
    plans = what.plans(backward=what.mode == "training")
    return measure(settings, what, [str(plan) for plan in plans], context)


def measure(settings: Settings, what: Timed, schedules: Sequence[str], context: Context) -> dict[str, Any]:
    """Times the built-in and, of the schedules, those that are right.

    A schedule is one of ``settings.backend``, or has its backend before it: ``triton grid``.

    Raises:
        Failed: one is wrong; the figures of the others are in the error.
    """
    device, dtype = settings.device, what.bounds.dtype
    with gates.matmul_precision(what.precision):
        torch.manual_seed(settings.seed)
        builtin = what.cell.layer(torch.nn, what.shape).to(device, dtype)
        ours = what.cell.layer(fusedrnn, what.shape).to(device, dtype)
        ours.load_state_dict(builtin.state_dict())
        refused, faults, right = _gate(settings, what, builtin, ours, schedules, context)

        inputs = make_inputs(what.cell, what.shape, dtype, device, settings.seed)
        calls: dict[str, timing.Call] = {"builtin": partial(call, builtin, inputs, what.mode)}
        calls |= {name: partial(_call, settings, name, ours, inputs, what.mode) for name in right}
        calls, methods = _captured(settings, calls)
        samples = timing.interleave(
            [*calls.values()],
            device,
            seconds=SECONDS,
            warmup=1 if settings.quick else WARMUP,
            min_rounds=2 if settings.quick else 5,
            max_rounds=2 if settings.quick else ROUNDS,
        )
        settle(settings.backend, device)
    times = {name: [1e6 * s / what.shape.T for s in of] for name, of in zip(calls, samples, strict=True)}
    figures = {
        "microseconds_per_step": times,
        "ratios": {name: ratio(times["builtin"], times[name]) for name in right},
        "methods": methods,
        "plans": _plans(settings, what),
        "refused": refused,
        "faults": faults,
    }
    for schedule, fault in faults.items():
        raise Failed(f"{schedule}: {fault}", **figures)
    return figures


def ratio(builtin: Sequence[float], ours: Sequence[float]) -> float:
    """The built-in's time over ours, the median over pairs that were measured side by side."""
    return timing.spread([a / b for a, b in zip(builtin, ours, strict=True)]).median


def _call(settings: Settings, schedule: str, layer: Any, inputs: Inputs, mode: str) -> dict[str, Any]:
    backend, _, schedule = schedule.rpartition(" ")
    with forced(backend or settings.backend, PLANNED if schedule == "planned" else schedule):
        return call(layer, inputs, mode)


def _captured(
    settings: Settings, calls: dict[str, timing.Call]
) -> tuple[dict[str, timing.Call], dict[str, str]]:
    """The calls as replays of CUDA graphs where they can be captured, and how each is timed."""
    if not settings.on_gpu:
        return calls, dict.fromkeys(calls, "clock")
    replays, methods = {}, {}
    for name, eager in calls.items():
        try:
            graph, _ = capture(eager)
        except RuntimeError as error:
            replays[name], methods[name] = eager, f"events, since capture raised {error}"
            torch.cuda.synchronize(settings.device)
        else:
            replays[name], methods[name] = graph.replay, "graph"
    return replays, methods


def _gate(
    settings: Settings,
    what: Timed,
    builtin: torch.nn.RNNBase,
    ours: torch.nn.RNNBase,
    schedules: Sequence[str],
    context: Context,
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Of the schedules: which the planner refuses, which are wrong, and which are right; with the reasons."""
    short = Shape(min(what.shape.T, CHECKED_STEPS), what.shape.B, what.shape.I, what.shape.H)
    inputs = make_inputs(what.cell, short, what.bounds.dtype, settings.device, settings.seed)
    expected = call(builtin, inputs, what.mode)
    truth = call(copy.deepcopy(builtin).double(), inputs.to(torch.float64), what.mode)
    refused, faults, right = {}, {}, []
    for schedule in schedules:
        exchange = schedule.partition(":")[0]
        if exchange in context.broken:
            faults[schedule] = "a launch has hung before"
            continue
        try:
            results = _call(settings, schedule, ours, inputs, what.mode)
            settle(settings.backend, settings.device)
        except RuntimeError as error:
            if "cannot run" in str(error):
                refused[schedule] = str(error)
                continue
            faults[schedule] = f"raised {error}"
            if NEVER_CAME in str(error):
                context.broken.add(exchange)
            continue
        if wrong := faults_of(judge(results, expected, truth, what.bounds)):
            faults[schedule] = wrong
        else:
            right.append(schedule)
    return refused, faults, right


def _plans(settings: Settings, what: Timed) -> dict[str, list[str]]:
    """By pass, the names of the plans, in the planner's order."""
    if settings.backend != "cuda":
        return {}
    passes = {"forward": False} | ({"backward": True} if what.mode == "training" else {})
    return {name: [str(plan) for plan in what.plans(backward=backward)] for name, backward in passes.items()}


def _checks(settings: Settings, calls: Iterator[Timed], run: Any) -> list[Check]:
    return [
        Check(
            str(what),
            partial(run, settings, what),
            facts={
                "precision": what.precision,
                "cell": what.cell.name,
                "shape": [what.shape.T, what.shape.B, what.shape.I, what.shape.H],
                "mode": what.mode,
            },
        )
        for what in calls
    ]


def speed_checks(settings: Settings) -> list[Check]:
    return _checks(settings, timed_calls(settings.quick), check_speed)


def plan_checks(settings: Settings) -> list[Check]:
    return _checks(settings, swept_calls(), check_plans)


def show_speed(records: Sequence[Record], console: Console) -> None:
    show_times(records, console, ("planned", *PERSISTENT, "stepwise"), "planned")


def show_times(records: Sequence[Record], console: Console, names: Sequence[str], planned: str) -> None:
    """A table for each precision and mode; of ``planned``, the mean ratio to the built-in."""
    rows = [r for r in records if "microseconds_per_step" in r]
    for precision, mode in itertools.product(PRECISIONS, MODES):
        chosen = [r for r in rows if (r["precision"], r["mode"]) == (precision, mode)]
        if chosen:
            console.print(_table(f"{precision}, {mode}: µs per step (ratio to the built-in)", chosen, names))
            ratios = [r["ratios"][planned] for r in chosen if planned in r["ratios"]]
            if ratios:
                mean = timing.geometric_mean(ratios)
                console.print(f"As planned, geometric mean: {mean:.2f}×, lowest {min(ratios):.2f}×.\n")
    console.print(
        f"Medians of up to {ROUNDS} interleaved rounds, input product included; by CUDA graph where it could"
        " be captured.\nAbove 1× ours is faster. No figure where a schedule cannot run the shape, none where"
        f" it is wrong over {CHECKED_STEPS} steps."
    )


def _table(title: str, records: Sequence[Record], names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("cell", "H", "B"):
        table.add_column(name)
    for name in ("builtin", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for r in records:
        _, B, _, H = r["shape"]
        table.add_row(r["cell"], str(H), str(B), *(_cell(r, name) for name in ("builtin", *names)))
    return table


def _cell(record: Record, name: str) -> str:
    if name in record["faults"]:
        return "[bold red]wrong[/]"
    if name not in record["microseconds_per_step"]:
        return ""
    median = _median(record, name)
    return f"{median:.2f}" if name == "builtin" else f"{median:.2f} ({record['ratios'][name]:.2f}×)"


def _median(record: Record, name: str) -> float:
    return timing.spread(record["microseconds_per_step"][name]).median


def show_plans(records: Sequence[Record], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("call", "built-in", "first plan", "best plan", "all, in the planner's order"):
        table.add_column(name)
    for r in records:
        if "ratios" not in r:
            continue
        names = [*r["ratios"]]
        each = [f"{name} {_median(r, name):.2f}" for name in names]
        best = min(names, key=partial(_median, r), default="")
        first, least = (each[0], f"{best} {_median(r, best):.2f}") if names else ("", "")
        table.add_row(r["check"], f"{_median(r, 'builtin'):.2f}", first, least, ", ".join(each))
    console.print(table)
    console.print("µs per step. A plan: slices, unit tiles, splits of K, batch tiles.")


SPEED = Stage("timing", "Time against the built-in", 110, speed_checks, show_speed)
PLANS = Stage("plans", "Time of every plan", 25, plan_checks, show_plans, needs_gpu=True)
