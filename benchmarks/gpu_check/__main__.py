"""The command line of the GPU check."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from fusedrnn.bench.timing import Deadline

from . import library
from .checks import FAILED, NOT_RUN, PASSED, Context, Record, Settings, Stage, not_run, run_checks
from .correctness import GRAPHS, PARITY, REPEATED_RUNS, STREAMS
from .primitives import PRIMITIVES
from .problems import SCHEDULES
from .sanitizer import SANITIZER, run_case
from .speed import PLANS, SPEED
from .triton_backend import TRITON
from .workers import Supervisor, serve

DESCRIPTION = """\
Proves on a GPU what no CPU can, in under ten minutes: the latencies the kernels rest on, parity with fp64
and with cuDNN, repeats to the bit, CUDA graphs, streams, compute-sanitizer, a first timing, and all of that
but the sanitizer for the Triton backend.

Results go into one JSON file, written again after every stage. The exit status is 1 if a check failed, 2 if
there is nothing to check. Speed has no part in it."""

STAGES = {
    stage.name: stage
    for stage in (PRIMITIVES, PARITY, REPEATED_RUNS, GRAPHS, STREAMS, SANITIZER, SPEED, PLANS, TRITON)
}
COMMIT = "FUSEDRNN_COMMIT"  # read where the tree is no git repository
MOST_LINES = 8  # on the failures of a stage


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "results",
        help="folder for the JSON file, <out>/<device>/<date>.json",
    )
    parser.add_argument("--limit", type=float, default=540.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda or cpu")
    parser.add_argument("--backend", choices=("cuda", "emulator"), help="default: the device's")
    parser.add_argument("--quick", action="store_true", help="few small cases: for tests of this command")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument(
        "--commit", default=os.environ.get(COMMIT), help=f"where there is no git; or {COMMIT}"
    )
    parser.add_argument("--case", help="run small cases of these schedules and nothing else")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # the pipe of a worker's events
    options = parser.parse_args(arguments)
    options.stages = options.stages.split(",")
    for name in options.stages:
        if name not in STAGES:
            parser.error(f"no stage {name!r}; choose from {', '.join(STAGES)}")
    if options.device.type not in ("cuda", "cpu"):
        parser.error(f"nothing to check on {options.device}")
    if options.device.type == "cuda" and options.device.index is None:
        options.device = torch.device("cuda", 0)
    if options.backend is None:
        options.backend = "cuda" if options.device.type == "cuda" else "emulator"
    options.case = options.case.split(",") if options.case else []
    for name in options.case:
        if name not in SCHEDULES:
            parser.error(f"no schedule {name!r}; choose from {', '.join(SCHEDULES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Memory is filled with NaN by torch's deterministic mode, which asks this of cuBLAS.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = Settings(options.device, options.backend, options.quick, options.seed)
    if reason := unavailable(settings):
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    if options.worker is not None:
        serve(settings, STAGES, sys.stdin, os.fdopen(options.worker, "w"))
        return 0
    if options.case:
        wrong = [schedule for schedule in options.case if not run_case(schedule, settings)]
        return 1 if wrong else 0
    return check(options, settings)


def unavailable(settings: Settings) -> str:
    """Why nothing can be checked; empty if something can."""
    import fusedrnn

    if settings.on_gpu and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return fusedrnn.backends()[settings.backend].reason


def check(options: argparse.Namespace, settings: Settings) -> int:
    """Runs the stages, prints their tables, writes the file and returns the exit status."""
    deadline = Deadline(options.limit)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150  # a log file has no width; the tables need this one
    results: dict[str, Any] = {
        "environment": environment(settings, options.commit),
        "limit": options.limit,
        "quick": settings.quick,
        "stages": [],
    }
    show_environment(results["environment"], console)
    path = free_path(options.out, results["environment"])
    supervisor = Supervisor(worker_arguments(settings)) if settings.on_gpu else None
    broken: set[str] = set()
    left = [STAGES[name] for name in STAGES if name in options.stages]
    try:
        while left:
            stage = left[0]
            share = deadline.left * stage.seconds / sum(s.seconds for s in left)
            results["stages"].append(run_stage(stage, settings, share, broken, supervisor, console))
            left.pop(0)
            write(path, results)
    finally:
        if supervisor is not None:
            supervisor.close()
            results["output"] = "".join(supervisor.output)[-20000:]
        write(path, results)
    return conclude(results, path, console)


def run_stage(
    stage: Stage,
    settings: Settings,
    seconds: float,
    broken: set[str],
    supervisor: Supervisor | None,
    console: Console,
) -> dict[str, Any]:
    """Runs a stage within about ``seconds``, prints its table, and returns what the file keeps of it."""
    console.rule(f"{stage.title} ({stage.name})", align="left")
    start, context = time.monotonic(), Context(Deadline(seconds), broken)
    records: list[Record] = []
    with tqdm(desc=stage.name, unit="check", disable=None, leave=False) as progress:
        for record in stage_records(stage, settings, context, supervisor):
            records.append(record)
            progress.set_postfix_str(f"{record['verdict']}: {record['check']}")
            progress.update()
    if any(r["verdict"] != NOT_RUN for r in records):
        stage.show(records, console)
        if stage in (SPEED, TRITON) and not settings.on_gpu:
            console.print("These are times of a CPU: they say nothing of a GPU.", style="yellow")
    show_rest(records, console)
    return {
        "name": stage.name,
        "title": stage.title,
        "share_seconds": seconds,
        "seconds": time.monotonic() - start,
        "verdict": verdict(records),
        "records": records,
    }


def stage_records(
    stage: Stage, settings: Settings, context: Context, supervisor: Supervisor | None
) -> Iterator[Record]:
    if stage.needs_gpu and not settings.on_gpu:
        return iter([not_run(stage.name, "needs a GPU")])
    if supervisor is not None and stage.supervised:
        return supervisor.run(stage, context)
    return run_checks(stage.checks(settings), context)


def show_rest(records: Sequence[Record], console: Console) -> None:
    """Says what failed, and what was left out and why."""
    wrong = [r for r in records if r["verdict"] == FAILED]
    for r in wrong[:MOST_LINES]:
        console.print(f"FAILED {r['check']}: {r['why']}", style="red", markup=False)
    if len(wrong) > MOST_LINES:
        console.print(f"FAILED {len(wrong) - MOST_LINES} more: see the file", style="red", markup=False)
    reasons: dict[str, list[str]] = {}
    for r in records:
        if r["verdict"] == NOT_RUN:
            reasons.setdefault(r["why"], []).append(r["check"])
    for why, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"not run: {names[0]}{more}: {why}", style="yellow", markup=False)


def verdict(records: Sequence[Record]) -> str:
    """Failed if any check did; passed if one did and all were run."""
    found = {r["verdict"] for r in records}
    if FAILED in found:
        return FAILED
    if found == {PASSED}:
        return PASSED
    return NOT_RUN if PASSED not in found else "passed in part"


def conclude(results: dict[str, Any], path: Path, console: Console) -> int:
    console.rule("Verdicts", align="left")
    for stage in results["stages"]:
        counts = {v: sum(r["verdict"] == v for r in stage["records"]) for v in (PASSED, FAILED, NOT_RUN)}
        counted = ", ".join(f"{count} {v}" for v, count in counts.items() if count)
        console.print(f"{stage['name']:11} {stage['seconds']:5.0f} s  {counted or 'nothing to check'}")
    console.print(str(path), soft_wrap=True, markup=False)
    return 1 if any(stage["verdict"] == FAILED for stage in results["stages"]) else 0


def environment(settings: Settings, commit: str | None) -> dict[str, Any]:
    """Where and with what it was checked."""
    from fusedrnn.bench import report  # and with it matplotlib, for which no worker should wait

    facts = report.environment(settings.device, settings.seed, None)
    facts["commit"] = facts["commit"] or commit
    facts["backend"] = settings.backend
    facts["cublas_workspace"] = os.environ["CUBLAS_WORKSPACE_CONFIG"]
    if settings.on_gpu:
        properties = torch.cuda.get_device_properties(settings.device)
        facts["library_built_for"] = library.built_for()
        facts["multiprocessors"] = properties.multi_processor_count
        facts["capability"] = [properties.major, properties.minor]
        facts["gpu"] = query_gpu()
    return facts


def show_environment(facts: dict[str, Any], console: Console) -> None:
    gpu = ", ".join(f"{name} {value}" for name, value in facts.get("gpu", {}).items())
    console.print(
        f"{facts['device']}, backend {facts['backend']}; torch {facts['torch']}, cuDNN {facts['cudnn']},"
        f" Python {facts['python']}; commit {facts['commit']}" + f"\n{gpu}" * bool(gpu),
        markup=False,
    )


def query_gpu() -> dict[str, str]:
    """Driver, clocks, power and temperature, as nvidia-smi tells them; nothing where it is missing."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, answer.stdout.split("\n")[0].split(", "), strict=False))


def worker_arguments(settings: Settings) -> list[str]:
    arguments = [
        "--device",
        str(settings.device),
        "--backend",
        settings.backend,
        "--seed",
        str(settings.seed),
    ]
    return [*arguments, "--quick"] if settings.quick else arguments


def free_path(out: Path, environment: dict[str, Any]) -> Path:
    """``<out>/<device>/<date>.json``, numbered where there is one of that day."""
    folder = out / ("emulator" if environment["device"] == "cpu" else slug(environment["device"]))
    folder.mkdir(parents=True, exist_ok=True)
    date = environment["date"][:10]
    path, number = folder / f"{date}.json", 2
    while path.exists():
        path, number = folder / f"{date}-{number}.json", number + 1
    return path


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def write(path: Path, results: dict[str, Any]) -> None:
    """Replaces the file in one step: what is there is whole, whenever the run is killed."""
    from fusedrnn.bench import report

    new = path.with_suffix(".new")
    new.write_text(json.dumps(report.finite(results), indent=1, allow_nan=False) + "\n")
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
