"""A first timing against the built-in: right first, then fast."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fusedrnn
from benchmarks import gates, timing
from benchmarks.kernel_table import Inputs, call, make_inputs
from benchmarks.shapes import CELLS, MODES, Cell, Shape

from . import library
from .checks import NEVER_CAME, Check, Context, Failed, Record, Settings, Stage
from .correctness import capture
from .problems import PERSISTENT, PLANNED, faults_of, forced, judge, settle

HIDDEN, BATCHES, STEPS = (256, 512, 1024, 128, 64), (16, 1, 64), 256
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
CHECKED_STEPS = 16  # of the same sizes, held against fp64 before anything is timed
STEPWISE_FROM = 512  # hidden units from which the stepwise schedule is worth its time here
ROUNDS, WARMUP, SECONDS = 9, 2, 0.3


def speed_cases(quick: bool) -> Iterator[tuple[str, Cell, Shape, str]]:
    """Precision, cell, shape and mode, what is asked for most first."""
    if quick:
        yield "fp32", CELLS[0], Shape(4, 3, 16, 33), "training"
        yield "bf16", CELLS[1], Shape(4, 3, 16, 33), "inference"
        return
    for precision, B, H in itertools.product(PRECISIONS, BATCHES, HIDDEN):
        for cell, mode in itertools.product(CELLS[:2], MODES):
            yield precision, cell, Shape(STEPS, B, H, H), mode


def check_speed(
    settings: Settings, precision: str, cell: Cell, shape: Shape, mode: str, context: Context
) -> dict[str, Any]:
    with gates.matmul_precision(precision):
        figures = _measure(settings, precision, cell, shape, mode, context)
    if figures["faults"]:
        schedule, fault = next(iter(figures["faults"].items()))
        raise Failed(f"{schedule}: {fault}", **figures)
    return figures


def _measure(
    settings: Settings, precision: str, cell: Cell, shape: Shape, mode: str, context: Context
) -> dict[str, Any]:
    device, dtype = settings.device, gates.PRECISIONS[precision].dtype
    torch.manual_seed(settings.seed)
    builtin = cell.layer(torch.nn, shape).to(device, dtype)
    ours = cell.layer(fusedrnn, shape).to(device, dtype)
    ours.load_state_dict(builtin.state_dict())
    schedules = ["planned", *PERSISTENT] + ["stepwise"] * (shape.H >= STEPWISE_FROM)
    refused, faults, right = _gate(settings, precision, cell, shape, mode, builtin, ours, schedules, context)

    inputs = make_inputs(cell, shape, dtype, device, settings.seed)
    calls: dict[str, timing.Call] = {"builtin": partial(call, builtin, inputs, mode)}
    calls |= {schedule: partial(_call, settings, schedule, ours, inputs, mode) for schedule in right}
    methods = dict.fromkeys(calls, "events" if settings.on_gpu else "clock")
    if settings.on_gpu:
        for name, eager in calls.items():
            try:
                graph, _ = capture(eager)
            except RuntimeError as error:
                methods[name] = f"events, since capture raised {error}"
                torch.cuda.synchronize(device)
            else:
                calls[name], methods[name] = graph.replay, "graph"
    samples = timing.interleave(
        [*calls.values()],
        device,
        seconds=SECONDS,
        warmup=1 if settings.quick else WARMUP,
        min_rounds=2 if settings.quick else 5,
        max_rounds=2 if settings.quick else ROUNDS,
    )
    settle(settings.backend, device)
    per_step = {
        name: [1e6 * s / shape.T for s in seconds] for name, seconds in zip(calls, samples, strict=True)
    }
    return {
        "precision": precision,
        "cell": cell.name,
        "shape": [shape.T, shape.B, shape.I, shape.H],
        "mode": mode,
        "microseconds_per_step": per_step,
        "ratios": {name: ratio(per_step["builtin"], per_step[name]) for name in right},
        "methods": methods,
        "plans": _plans(settings, precision, cell, shape, mode),
        "refused": refused,
        "faults": faults,
    }


def ratio(builtin: Sequence[float], ours: Sequence[float]) -> float:
    """The built-in's time over ours, the median over pairs that were measured side by side."""
    return timing.spread([a / b for a, b in zip(builtin, ours, strict=True)]).median


def _call(settings: Settings, schedule: str, layer: Any, inputs: Inputs, mode: str) -> dict[str, Any]:
    with forced(settings.backend, PLANNED if schedule == "planned" else schedule):
        return call(layer, inputs, mode)


def _gate(
    settings: Settings,
    precision: str,
    cell: Cell,
    shape: Shape,
    mode: str,
    builtin: torch.nn.RNNBase,
    ours: torch.nn.RNNBase,
    schedules: Sequence[str],
    context: Context,
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Of the schedules: which the planner refuses, which are wrong, and which are right; with the reasons."""
    short = Shape(min(shape.T, CHECKED_STEPS), shape.B, shape.I, shape.H)
    inputs = make_inputs(cell, short, gates.PRECISIONS[precision].dtype, settings.device, settings.seed)
    expected = call(builtin, inputs, mode)
    truth = call(copy.deepcopy(builtin).double(), inputs.to(torch.float64), mode)
    refused, faults, right = {}, {}, []
    for schedule in schedules:
        if schedule in context.broken:
            faults[schedule] = "a launch has hung before"
            continue
        try:
            results = _call(settings, schedule, ours, inputs, mode)
            settle(settings.backend, settings.device)
        except RuntimeError as error:
            if "cannot run" in str(error):
                refused[schedule] = str(error)
                continue
            faults[schedule] = f"raised {error}"
            if NEVER_CAME in str(error):
                context.broken.add(schedule)
            continue
        if wrong := faults_of(judge(results, expected, truth, gates.PRECISIONS[precision])):
            faults[schedule] = wrong
        else:
            right.append(schedule)
    return refused, faults, right


def _plans(
    settings: Settings, precision: str, cell: Cell, shape: Shape, mode: str
) -> dict[str, dict[str, list[int]]]:
    if settings.backend != "cuda":
        return {}
    name = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[cell.name]
    dtype, tf32 = gates.PRECISIONS[precision].dtype, precision == "tf32"
    passes = ("forward",) if mode == "inference" else ("forward", "backward")
    return {
        which: library.plans(name, dtype, tf32, which == "backward", 1, shape.B, shape.H) for which in passes
    }


def speed_checks(settings: Settings) -> list[Check]:
    return [
        Check(
            f"{precision} {cell.name} {shape} {mode}",
            partial(check_speed, settings, precision, cell, shape, mode),
        )
        for precision, cell, shape, mode in speed_cases(settings.quick)
    ]


def show_speed(records: Sequence[Record], console: Console) -> None:
    rows = [r for r in records if "microseconds_per_step" in r]
    for precision, mode in itertools.product(PRECISIONS, MODES):
        chosen = [r for r in rows if (r["precision"], r["mode"]) == (precision, mode)]
        if chosen:
            console.print(_table(f"{precision}, {mode}: µs per step (ratio to the built-in)", chosen))
            ratios = [r["ratios"]["planned"] for r in chosen if "planned" in r["ratios"]]
            if ratios:
                mean = timing.geometric_mean(ratios)
                console.print(f"As planned, geometric mean: {mean:.2f}×, lowest {min(ratios):.2f}×.\n")
    console.print(
        f"Medians of up to {ROUNDS} interleaved rounds, input product included; by CUDA graph where it could"
        " be captured.\nAbove 1× ours is faster. No figure where a schedule cannot run the shape, none where"
        f" it is wrong over {CHECKED_STEPS} steps."
    )


def _table(title: str, records: Sequence[Record]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    names = ("builtin", "planned", *PERSISTENT, "stepwise")
    table.add_column("cell")
    table.add_column("H")
    table.add_column("B")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for r in records:
        _, B, _, H = r["shape"]
        table.add_row(r["cell"], str(H), str(B), *(_cell(r, name) for name in names))
    return table


def _cell(record: Record, name: str) -> str:
    if name in record["faults"]:
        return "[bold red]wrong[/]"
    if name not in record["microseconds_per_step"]:
        return ""
    median = timing.spread(record["microseconds_per_step"][name]).median
    return f"{median:.2f}" if name == "builtin" else f"{median:.2f} ({record['ratios'][name]:.2f}×)"


SPEED = Stage("timing", "Time against the built-in", 120, speed_checks, show_speed)
