"""The benchmark's command line."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusedrnn.accuracy import PRECISIONS, matmul_precision
from fusedrnn.bench import peers, sets, timing
from fusedrnn.bench import table as kernel_table
from fusedrnn.bench.report import environment as where

from . import report, train_text

DESCRIPTION = """\
Compares fusedrnn with torch.nn on this machine, in about three minutes.

train  trains a character language model on Python's own standard library with torch.nn.LSTM and
       with fusedrnn.LSTM, from the same weights on the same batches; the loss curves must agree.
table  checks values, states and gradients of LSTM, GRU and RNN against the built-in and an fp64
       run, then times both side by side; onnxruntime too, where it is installed.

The exit status is 1 if the curves part, the model does not learn or a result is wrong. Speed has
no part in it."""

TRAIN_SHARE = 0.35


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--only", choices=("train", "table"), help="run one of the two")
    parser.add_argument("--quick", action="store_true", help="few steps and shapes, under a minute")
    parser.add_argument("--seconds", type=float, help="time budget (default: 170, quick: 40)")
    parser.add_argument(
        "--precision",
        action="append",
        choices=PRECISIONS,
        help="of the table, repeatable (default: fp32 on a CPU, all on a GPU)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder for JSON and plots",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads (default: torch's choice, fewer where other work keeps CPUs busy)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device(default_device), help="cpu or cuda"
    )
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 40.0 if options.quick else 170.0
    if options.precision is None:
        options.precision = [*PRECISIONS] if options.device.type == "cuda" else ["fp32"]
    if options.device.type != "cuda" and "tf32" in options.precision:
        parser.error("tf32 is a GPU's")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 130  # a log file has no width; the table needs this one
    idle = timing.idle_cpus()
    if warning := timing.set_threads(options.threads, idle):
        console.print(warning, style="yellow")
    environment = where(options.device, options.seed, idle)
    show_environment(environment, console)

    training = table = None
    both = options.only is None
    if options.only in (None, "train"):
        console.rule("Training on text", align="left")
        with matmul_precision("fp32"):
            training = train_text.run(
                train_text.read_text(),
                options.device,
                steps=train_text.QUICK_STEPS if options.quick else train_text.STEPS,
                seconds=options.seconds * (TRAIN_SHARE if both else 1),
                seed=options.seed,
            )
        train_text.show(training, console)
    if options.only in (None, "table"):
        console.rule("Kernels", align="left")
        table = kernel_table.run(
            options.device,
            sets.entries("quick" if options.quick else "default"),
            options.precision,
            seconds=options.seconds - (time.monotonic() - start),
            seed=options.seed,
            beside=[*peers.installed(["onnxruntime"])],
        )
        kernel_table.show(table, console)

    console.rule("Files", align="left")
    for path in report.write(options.out, environment, training, table):
        console.print(str(path), soft_wrap=True, markup=False)
    failures = [*(training.failures if training else ()), *(table.failures if table else ())]
    console.print(f"Done in {time.monotonic() - start:.0f} s.")
    if failures:
        console.print(f"FAILED, {len(failures)} wrong:", style="bold red")
        for failure in failures:
            console.print(f"  {failure}", style="red", markup=False)
    return 1 if failures else 0


def show_environment(environment: dict[str, Any], console: Console) -> None:
    console.print(
        f"fusedrnn {environment['fusedrnn']} against torch {environment['torch']},"
        f" Python {environment['python']}\n"
        f"{environment['cpu']}, {environment['cpus']} CPUs, threads: {environment['threads']},"
        f" {environment['cpu_capability']}; device: {environment['device']}"
    )
    for name, status in environment["backends"].items():
        console.print(f"  backend {name}: {status}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
