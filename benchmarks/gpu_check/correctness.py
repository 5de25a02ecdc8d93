"""Parity, repeats, graphs and streams: whether the kernels are right on this device, and stay so."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fusedrnn import accuracy as gates
from fusedrnn.bench.timing import capture
from fusedrnn.cells import CELLS

from .checks import FAILED, NOT_RUN, PASSED, Check, Context, Failed, NotRun, Record, Settings, Stage
from .problems import (
    PERSISTENT,
    SCHEDULES,
    Case,
    Problem,
    faults_of,
    figures_of,
    forced,
    judge,
    largest,
    make_problem,
    require_equal,
    run,
    settle,
)

BOTH = (False, True)
# Sizes that divide nothing. The first has two steps, so that what hangs or is wrong everywhere shows at once.
SHAPES = {
    "two steps": Case("", 2, 3, 5, 21),
    "one step": Case("", 1, 9, 7, 37),
    "reverse": Case("", 9, 17, 19, 53, (True,)),
    "both ways": Case("", 7, 40, 33, 90, BOTH),
    "packed": Case("", 17, 13, 30, 72, BOTH, packed=True),
}
# Hidden sizes whose weights the registers of the blocks cannot hold: the rest is in shared memory. By the
# bytes of an operand's element: what an H200 can just run.
LARGE = {
    "block": {2: 121, 4: 93},
    "cluster": {2: 500, 4: 250},
    "grid": {2: 1000, 4: 850},
    "stepwise": {2: 1000, 4: 850},
}
QUICK_SHAPES = {
    "two steps": SHAPES["two steps"],
    "packed": Case("", 3, 5, 4, 33, BOTH, packed=True),
}


def parity_cases(quick: bool) -> Iterator[tuple[str, Case, str, str]]:
    """Label, case, precision and schedule; schedules innermost, since they share what they are judged by."""
    precisions = ("fp32", "bf16") if quick else tuple(gates.PRECISIONS)
    for label, shape in (QUICK_SHAPES if quick else SHAPES).items():
        for cell, precision, schedule in itertools.product(CELLS, precisions, SCHEDULES):
            yield label, replace(shape, cell=cell), precision, schedule
    for cell, precision, schedule in itertools.product(CELLS, precisions, () if quick else SCHEDULES):
        H = LARGE[schedule][gates.PRECISIONS[precision].dtype.itemsize]
        yield "large", Case(cell, 6, 13, 40, H), precision, schedule


@lru_cache(maxsize=4)
def expected(
    case: Case, precision: str, device: torch.device, seed: int
) -> tuple[Problem, dict[str, Tensor] | None, dict[str, Tensor]]:
    """A problem, the built-in's results if it can run it, and those of the reference in fp64."""
    problem = make_problem(case, gates.PRECISIONS[precision].dtype, device, seed)
    builtin = None
    if case.reverse != (True,):
        with forced("torch"):
            builtin = problem.leaves().results()
    with forced("reference"):
        truth = problem.map(Tensor.double).leaves().results()
    return problem, builtin, truth


def check_parity(
    settings: Settings, case: Case, precision: str, schedule: str, context: Context
) -> dict[str, Any]:
    with gates.matmul_precision(precision):
        problem, builtin, truth = expected(case, precision, settings.device, settings.seed)
        ours = run(problem, settings.backend, schedule, settings.device)
    verdicts = judge(ours, builtin, truth, gates.PRECISIONS[precision], kink=case.cell == "rnn_relu")
    figures = figures_of(verdicts, gates.PRECISIONS[precision])
    if faults := faults_of(verdicts):
        raise Failed(faults, **figures)
    return figures


def parity_checks(settings: Settings) -> list[Check]:
    return [
        Check(
            f"{precision} {schedule} {case} ({label})",
            partial(check_parity, settings, case, precision, schedule),
            schedule,
            facts={"cell": case.cell, "precision": precision, "schedule": schedule},
        )
        for label, case, precision, schedule in parity_cases(settings.quick)
    ]


def show_parity(records: Sequence[Record], console: Console, schedules: Sequence[str] = SCHEDULES) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("cell")
    table.add_column("schedule")
    precisions = [p for p in gates.PRECISIONS if any(r.get("precision") == p for r in records)]
    for precision in precisions:
        table.add_column(precision, justify="right", no_wrap=True)
    for cell, schedule in itertools.product(CELLS, schedules):
        rows = [
            [
                r
                for r in records
                if (r.get("cell"), r.get("schedule"), r.get("precision")) == (cell, schedule, p)
            ]
            for p in precisions
        ]
        table.add_row(cell, schedule, *map(_worst, rows))
    console.print(table)
    console.print(
        "Worst relative L2 error against fp64, of y, final states and gradients; in brackets the built-in's"
        " in the same cases.\nAllowed: "
        + ", ".join(f"{p} {gates.PRECISIONS[p].cap * gates.PRECISIONS[p].unit:.1e}" for p in precisions)
        + f", and {gates.SLACK:g} times the built-in's plus one unit of the dtype; of relu's gradients more,"
        " since rounding moves units across its kink."
    )


def _worst(records: Sequence[Record]) -> str:
    compared = [r for r in records if "worst" in r]
    text = ""
    if compared:
        theirs = [r["builtin_worst"] for r in compared if not math.isnan(r["builtin_worst"])]
        text = f"{largest(r['worst'] for r in compared):.1e}" + (f" ({max(theirs):.1e})" if theirs else "")
    if any(r["verdict"] == FAILED for r in records):
        return f"[bold red]{text} failed[/]"
    return text or NOT_RUN


# Long enough that a block that runs ahead of its peers would meet what it must not.
REPEATED = {
    "block": Case("lstm", 64, 19, 24, 100),
    "cluster": Case("lstm", 64, 19, 24, 250),
    "grid": Case("lstm", 64, 19, 24, 700),
}
QUICK_REPEATED = dict.fromkeys(PERSISTENT, Case("lstm", 3, 5, 4, 33))
REPEATS, QUICK_REPEATS = 1000, 3


def check_repeats(
    settings: Settings, case: Case, schedule: str, training: bool, context: Context
) -> dict[str, Any]:
    """Runs one problem again and again, every other time beside copies that disturb L2 and memory."""
    device = settings.device
    problem = make_problem(case, torch.bfloat16, device, settings.seed)
    problem = problem.leaves() if training else problem
    noise = torch.zeros(1 << 24 if settings.on_gpu else 1, device=device)
    beside = torch.cuda.Stream(device) if settings.on_gpu else None
    repeats = QUICK_REPEATS if settings.quick else REPEATS
    with forced(settings.backend, schedule):
        first = problem.results()
        wrong = {name: torch.zeros((), dtype=torch.int64, device=device) for name in first}
        done = 0
        while done < repeats and context.deadline.left > 0:
            for i in range(done, min(done + 50, repeats)):
                if beside is not None and i % 2:
                    with torch.cuda.stream(beside):
                        noise.add_(1)
                for name, result in problem.results().items():
                    wrong[name] += (result != first[name]).any()  # true for a NaN
                done = i + 1
            settle(settings.backend, device)
    counts = {name: int(count) for name, count in wrong.items() if count}
    figures = {"schedule": schedule, "repeats": done, "wanted": repeats, "wrong": counts}
    if counts:
        raise Failed(f"differ from the first run: {counts} of {done}", **figures)
    return figures


def repeat_checks(settings: Settings) -> list[Check]:
    cases = QUICK_REPEATED if settings.quick else REPEATED
    return [
        Check(
            f"{schedule} {'forward+backward' if training else 'forward'} bf16 {case}",
            partial(check_repeats, settings, case, schedule, training),
            schedule,
            patience=120,
        )
        for schedule, case in cases.items()
        for training in (False, True)
    ]


def show_repeats(records: Sequence[Record], console: Console) -> None:
    show_verdicts(
        records,
        console,
        repeats=lambda r: f"{r['repeats']} of {r['wanted']}" if "repeats" in r else "",
        wrong=lambda r: str(sum(r["wrong"].values())) if "wrong" in r else "",
    )


def check_graph(
    settings: Settings, case: Case, schedule: str, training: bool, context: Context
) -> dict[str, Any]:
    """Captures the call in a CUDA graph and replays it for inputs that were not there at the capture."""
    problem = make_problem(case, torch.bfloat16, settings.device, settings.seed)
    problem = problem.leaves() if training else problem
    inputs = [problem.x.detach().clone(), -problem.x.detach(), problem.x.detach().clone()]

    def put(x: Tensor) -> None:
        with torch.no_grad():
            problem.x.copy_(x)

    with forced(settings.backend, schedule):
        eager = []
        for x in inputs:
            put(x)
            eager.append({name: t.clone() for name, t in problem.results().items()})
        settle(settings.backend, settings.device)
        graph, results = capture(problem.results)
        # What the call left in host memory is not there any more.
        reused = [torch.zeros(case.T + 1, dtype=torch.int64) for _ in range(64)]
        for x, wanted in zip(inputs, eager, strict=True):
            put(x)
            graph.replay()
            torch.cuda.synchronize(settings.device)
            require_equal(results, wanted, "replayed and eager results")
        del reused
        settle(settings.backend, settings.device)
    return {"schedule": schedule}


def graph_checks(settings: Settings) -> list[Check]:
    padded = {
        "stepwise": Case("gru", 9, 5, 24, 100, BOTH),
        "block": Case("gru", 33, 5, 24, 100, BOTH),
        "cluster": Case("lstm", 33, 13, 24, 250, BOTH),
        "grid": Case("lstm", 33, 13, 24, 700, BOTH),
    }
    # Last, and each in a process of its own: offsets that went astray could make a kernel write anywhere.
    packed = [(schedule, replace(padded[schedule], packed=True)) for schedule in ("stepwise", "cluster")]
    return [
        Check(
            f"{schedule} {'forward+backward' if training else 'forward'} bf16 {case}",
            partial(check_graph, settings, case, schedule, training),
            schedule,
            alone=case.packed,
        )
        for schedule, case in (*padded.items(), *packed)
        for training in ((True,) if case.packed else (False, True))
    ]


STREAM_ROUNDS = 20


def check_streams(
    settings: Settings, cases: Sequence[tuple[str, Case]], priority: int, context: Context
) -> dict[str, Any]:
    """Two problems at once on two streams, started by one thread; as alone, to the bit."""
    if any(schedule in context.broken for schedule, _ in cases):
        raise NotRun("a launch of that schedule has hung before")
    device = settings.device
    problems = [make_problem(case, torch.bfloat16, device, i).leaves() for i, (_, case) in enumerate(cases)]

    def results(i: int) -> dict[str, Tensor]:
        with forced(settings.backend, cases[i][0]):
            return problems[i].results()

    wanted = [results(i) for i in range(len(cases))]
    settle(settings.backend, device)
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device, priority=priority)]
    for _ in range(STREAM_ROUNDS):
        found = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(results(i))
        settle(settings.backend, device)
        for i, (schedule, case) in enumerate(cases):
            require_equal(found[i], wanted[i], f"{schedule} {case}, beside another stream")
    return {"rounds": STREAM_ROUNDS}


def check_threads(
    settings: Settings, schedule: str, cases: Sequence[Case], context: Context
) -> dict[str, Any]:
    """One kernel started by two threads at once, with different needs of shared memory.

    In fp32, which keeps all weights there.
    """
    device = settings.device
    problems = [make_problem(case, torch.float32, device, i) for i, case in enumerate(cases)]
    with gates.matmul_precision("fp32"), forced(settings.backend, schedule):
        wanted = [problem.results() for problem in problems]
        settle(settings.backend, device)
        found: list[dict[str, Tensor]] = [{} for _ in cases]
        errors: list[str] = []

        def work(i: int) -> None:
            stream = torch.cuda.Stream(device)
            try:
                with forced(settings.backend, schedule), torch.cuda.stream(stream), torch.no_grad():
                    for _ in range(10 * STREAM_ROUNDS):
                        found[i] = problems[i].results()
                stream.synchronize()
            except Exception as error:  # reported by the thread that waits for this one
                errors.append(str(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settle(settings.backend, device)
    if errors:
        raise Failed(f"a thread got: {errors[0]}")
    for i, case in enumerate(cases):
        require_equal(found[i], wanted[i], f"{case} in a thread beside another")
    return {"rounds": 10 * STREAM_ROUNDS}


def stream_checks(settings: Settings) -> list[Check]:
    # Long enough to be under way together, and each grid larger than half of an H200.
    block = ("block", Case("gru", 1000, 19, 24, 100))
    cluster = ("cluster", Case("lstm", 800, 70, 24, 250))
    other = ("cluster", Case("gru", 600, 33, 40, 120))
    grid = ("grid", Case("lstm", 500, 30, 24, 1000))
    wide = ("grid", Case("lstm", 400, 30, 24, 1100))
    steps = ("stepwise", Case("gru", 40, 9, 24, 100))
    pairs = [(block, steps), (cluster, other), (cluster, grid), (grid, wide)]
    checks = [
        Check(
            " beside ".join(f"{schedule} {case}" for schedule, case in pair)
            + (", the second of high priority" if priority else ""),
            partial(check_streams, settings, pair, priority),
        )
        for pair in pairs
        for priority in ((0, -1) if pair[0] == grid else (0,))
    ]
    for schedule, widths in (("block", (40, 93)), ("cluster", (100, 250))):
        sizes = [Case("lstm", 20, 8, 16, H) for H in widths]
        checks.append(
            Check(f"{schedule}, two threads", partial(check_threads, settings, schedule, sizes), schedule)
        )
    return checks


def show_verdicts(records: Sequence[Record], console: Console, **columns: Callable[[Record], str]) -> None:
    """A line for each check."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("check")
    table.add_column("verdict")
    for name in (*columns, "s"):
        table.add_column(name, justify="right")
    colours = {PASSED: "green", FAILED: "bold red", NOT_RUN: "yellow"}
    for r in records:
        verdict = f"[{colours[r['verdict']]}]{r['verdict']}[/]"
        table.add_row(r["check"], verdict, *(text(r) for text in columns.values()), f"{r['seconds']:.1f}")
    console.print(table)


PARITY = Stage("parity", "Parity with fp64 and with the built-in", 60, parity_checks, show_parity)
REPEATED_RUNS = Stage("repeats", "Runs repeat to the bit", 40, repeat_checks, show_repeats)
GRAPHS = Stage("graphs", "CUDA graphs: capture and replay", 35, graph_checks, show_verdicts, needs_gpu=True)
STREAMS = Stage("streams", "Two streams at once", 20, stream_checks, show_verdicts, needs_gpu=True)
