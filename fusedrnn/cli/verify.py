"""``fusedrnn verify``: whether the layers are right on this machine, for the user's sizes."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fusedrnn
from fusedrnn.accuracy import PRECISIONS
from fusedrnn.trial import CELL_BY_NAME, Shape
from fusedrnn.verification import Case, Finding, verify

from .output import make_console

GRID = {
    "cell": "lstm,gru,rnn,rnn_relu",
    "dtype": "fp32,bf16,fp16",
    "hidden": "64,129",
    "batch": "1,33",
    "steps": "65",
    "layers": "1,2",
}
_WHAT = {
    "values": "y and states",
    "gradients": "gradients",
    "steps": "each step by itself",
    "repeats": "repeats to the bit",
    "modes": "inference = training",
}


def verify_command(
    cell: Annotated[str, typer.Option(help="lstm, gru, rnn, rnn_relu; lists as a,b in any option.")] = "lstm",
    hidden: Annotated[str, typer.Option(help="H, units of the state.")] = "128",
    batch: Annotated[str, typer.Option(help="B, sequences.")] = "8",
    steps: Annotated[str, typer.Option(help="T, time steps.")] = "64",
    inputs: Annotated[str, typer.Option(help="I, features of the input; by default as many as H.")] = "",
    layers: Annotated[str, typer.Option(help="Layers on one another.")] = "1",
    projection: Annotated[str, typer.Option(help="P, of an LSTM; 0 for none.")] = "0",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)} (a GPU's).")] = "fp32",
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Both directions.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Sequences of falling lengths, packed.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="A grid of cells, dtypes and sizes instead.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda, if there is one.")] = "",
    backend: Annotated[str, typer.Option(help="That has to serve; by default the planner's choice.")] = "",
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Check values, states, gradients, single steps and repeats against torch.nn and against fp64.

    The exit status is 0 if all is right, 1 if something is wrong, and 2 if it could not be checked.
    """
    chosen = {
        "cell": cell,
        "dtype": dtype,
        "hidden": hidden,
        "batch": batch,
        "steps": steps,
        "layers": layers,
    }
    if grid:
        chosen |= GRID
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = _cases(chosen | {"inputs": inputs, "projection": projection}, bidirectional, packed, place)
    refusals: dict[str, str] = {}
    findings: list[Finding] = []
    for case in track(cases, "verifying", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        try:
            findings += verify(case, place, backend=backend or None, seed=seed)
        except (RuntimeError, ValueError) as error:  # such a call cannot be made here: said, and not passed
            refusals[str(case)] = str(error)
    wrong = [f for f in findings if f.fault]
    if as_json:
        report = {
            "fusedrnn": fusedrnn.__version__,
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
            "backend": backend or "as planned",
            "findings": [f.as_dict() for f in findings],
            "refused": refusals,
            "verdict": "wrong" if wrong else "refused" if refusals else "right",
        }
        typer.echo(json.dumps(report, indent=1))
    else:
        _show(findings, refusals, make_console())
    raise typer.Exit(1 if wrong else 2 if refusals else 0)


def _cases(options: dict[str, str], bidirectional: bool, packed: bool, device: torch.device) -> list[Case]:
    lists = {name: text.split(",") for name, text in options.items()}
    for name, known in (("cell", CELL_BY_NAME), ("dtype", PRECISIONS)):
        for value in lists[name]:
            if value not in known:
                raise typer.BadParameter(f"no {name} {value!r}; choose from {', '.join(known)}")
    if device.type != "cuda" and "tf32" in lists["dtype"]:
        raise typer.BadParameter("tf32 is a GPU's")
    numbers = ("steps", "batch", "inputs", "hidden", "layers", "projection")
    try:
        sizes = {name: [int(v) if v else 0 for v in lists[name]] for name in numbers}
    except ValueError as error:
        raise typer.BadParameter(f"sizes are whole numbers: {error}") from None
    cases = []
    for name, precision in itertools.product(lists["cell"], lists["dtype"]):
        for T, B, features, H, L, P in itertools.product(*(sizes[n] for n in numbers)):
            if min(T, B, H, L) < 1 or features < 0 or P < 0:
                raise typer.BadParameter("sizes must be positive")
            shape = Shape(T, B, features or H, H, packed, L, bidirectional, P if name == "lstm" else 0)
            cases.append(Case(CELL_BY_NAME[name], shape, precision))
    return cases


def _show(findings: Sequence[Finding], refusals: dict[str, str], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("case", no_wrap=True)
    for title in _WHAT.values():
        table.add_column(title, justify="right", no_wrap=True)
    cases: dict[Any, dict[str, Finding]] = {}
    for finding in findings:
        cases.setdefault(finding.case, {})[finding.what] = finding
    for case, answers in cases.items():
        table.add_row(str(case), *(_cell(answers[what]) for what in _WHAT))
    console.print(table)
    for finding in findings:
        if finding.fault:
            console.print(
                f"wrong: {finding.case}: {finding.what}: {finding.fault}", style="red", markup=False
            )
    for case, reason in refusals.items():
        console.print(f"not checked: {case}: {reason}", style="yellow", markup=False)
    wrong = len({f.case for f in findings if f.fault})
    console.print(
        f"{len(cases)} cases, {wrong} wrong, {len(refusals)} not checked. Relative L2 errors against fp64, of"
        " the result furthest off;\nin brackets the error of torch.nn's own kernel in the same result."
    )


def _cell(finding: Finding) -> str:
    if finding.what == "repeats":
        return "[bold red]no[/]" if finding.fault else "yes"
    text = f"{finding.error:.1e}" if finding.error else "equal"
    if not math.isnan(finding.builtin_error):
        text += f" ({finding.builtin_error:.1e})"
    return f"[bold red]{text}[/]" if finding.fault else text
