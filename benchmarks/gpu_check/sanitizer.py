"""compute-sanitizer over one small case of each exchange, forward and backward."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .checks import Check, Context, Failed, NotRun, Record, Settings, Stage
from .correctness import show_verdicts
from .problems import SCHEDULES, Case, forced, make_problem, settle

TOOLS = ("memcheck", "racecheck", "synccheck")
TINY = {
    "stepwise": Case("lstm", 2, 3, 4, 20),
    "block": Case("lstm", 3, 9, 4, 93),
    "cluster": Case("gru", 3, 9, 4, 100),
    "grid": Case("gru", 3, 9, 4, 100),
}
FINISHED, STOPPED = "finished: ", "stopped"
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")
BLIND = (
    "racecheck sees the shared memory that the threads of one block share: not what blocks of a cluster store"
    " into each other's, nor what goes through global memory."
)


def run_case(schedule: str, settings: Settings) -> bool:
    """Runs one schedule's small case, both passes: what stands under the tool. Whether it ended well."""
    try:
        problem = make_problem(TINY[schedule], torch.bfloat16, settings.device, settings.seed).leaves()
        with forced(settings.backend, schedule):
            problem.results()
        settle(settings.backend, settings.device)
    except Exception as error:  # the other schedules are still worth looking at
        print(f"{schedule} raised {type(error).__name__}: {error}", flush=True)
        return False
    print(FINISHED + schedule, flush=True)
    return True


def find_tool() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def command(tool: str, settings: Settings) -> list[str]:
    """Only kernels of this project are looked into: those of torch are many, and not ours to judge."""
    program = find_tool()
    if program is None:
        raise NotRun("compute-sanitizer is not installed")
    # That a device refuses a launch is an answer the planner asks for, not an error.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [
        *(program, "--tool", tool, *quiet),
        *("--kernel-name", "kernel_substring=fusedrnn", "--print-limit", "50"),
        *(sys.executable, "-m", "benchmarks.gpu_check", "--case", ",".join(SCHEDULES)),
        *("--device", str(settings.device), "--backend", settings.backend),
    ]


def check_tool(settings: Settings, tool: str, context: Context) -> dict[str, Any]:
    schedules = [schedule for schedule in SCHEDULES if schedule not in context.broken]
    arguments = command(tool, settings)
    arguments[arguments.index("--case") + 1] = ",".join(schedules)
    seconds = context.deadline.left / (len(TOOLS) - TOOLS.index(tool))
    process = subprocess.Popen(
        arguments,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        process_group=0,  # the tool and what runs under it
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        ended = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        ended = f"{STOPPED} after {seconds:.0f} s"
    return verdict_of(output, schedules, ended)


def verdict_of(output: str, schedules: Sequence[str], ended: str) -> dict[str, Any]:
    """Reads a tool's output.

    Raises:
        Failed: it found something, or ended without a verdict on all that was asked.
        NotRun: it was stopped, and had found nothing until then.
    """
    finished = [s for s in schedules if FINISHED + s in output.splitlines()]
    found = SUMMARY.findall(output)
    errors = sum(int(count) for _, count in found) if found else None
    lines = output.splitlines()
    figures = {"finished": finished, "errors": errors, "ended": ended, "output": lines[:120] + lines[-40:]}
    if errors:
        raise Failed(f"{errors} errors; the first: {first_error(lines)}", **figures)
    if ended.startswith(STOPPED):
        raise NotRun(f"{ended}; what had finished: {', '.join(finished) or 'nothing'}")
    if finished != list(schedules) or errors is None:
        missing = [s for s in schedules if s not in finished]
        raise Failed(f"no verdict on {', '.join(missing) or 'the run'}: {ended}", **figures)
    return figures


def first_error(lines: Sequence[str]) -> str:
    reported = [line.lstrip("= ") for line in lines if line.startswith("=========")]
    words = ("error", "invalid", "hazard", "barrier", "race")
    return next((line for line in reported if any(word in line.lower() for word in words)), "not named")


def sanitizer_checks(settings: Settings) -> list[Check]:
    return [Check(tool, partial(check_tool, settings, tool)) for tool in TOOLS]


def show_sanitizer(records: Sequence[Record], console: Console) -> None:
    show_verdicts(
        records,
        console,
        finished=lambda r: ", ".join(r.get("finished", [])),
        errors=lambda r: str(r.get("errors", "")),
    )
    console.print(BLIND)


SANITIZER = Stage(
    "sanitizer",
    "compute-sanitizer",
    135,
    sanitizer_checks,
    show_sanitizer,
    needs_gpu=True,
    supervised=False,
)
