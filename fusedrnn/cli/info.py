"""``fusedrnn info``: the state of the installation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape

from fusedrnn import diagnosis

from .output import make_console


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what is installed, which backends can be used, why the others cannot, and what to do about it."""
    facts = diagnosis.collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    console = make_console()
    for line in _lines(facts):
        console.print(line, soft_wrap=True)


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    yield from _section("Versions", facts["versions"], lambda v: _pairs(v, "none"))
    yield from _section("CPU", facts["cpu"], _pairs)
    yield from _section("GPUs", facts["gpus"], _gpus)
    yield from _section("Backends", facts["backends"], _backends)
    yield from _section("Libraries", facts["libraries"], _libraries)
    yield from _section("Environment variables", facts["environment"], _environment)


def _section(title: str, part: Any, lines: Any) -> Iterator[str]:
    yield f"[bold]{title}[/]"
    if isinstance(part, dict) and "error" in part:
        yield f"  [red]{escape(str(part['error']))}[/]"
        if part.get("remedy"):
            yield f"    → {escape(part['remedy'])}"
    else:
        yield from lines(part)


def _pairs(part: dict[str, Any], absent: str = "") -> Iterator[str]:
    for name, value in part.items():
        text = value.get("error", "") if isinstance(value, dict) else absent if value is None else value
        yield f"  {name:16} {escape(str(text))}"


def _gpus(part: list[dict[str, Any]]) -> Iterator[str]:
    for index, gpu in enumerate(part):
        yield (
            f"  {index}: {escape(gpu['name'])}, compute capability {gpu['capability']},"
            f" {gpu['multiprocessors']} multiprocessors, {gpu['memory'] / 2**30:.0f} GiB;"
            f" kernels: {gpu['kernels']}"
        )
    if not part:
        yield "  none that this torch can see"


def _backends(part: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, status in part.items():
        if status["available"]:
            yield f"  {name:16} [green]available[/]"
            continue
        yield f"  {name:16} [yellow]not available[/]: {escape(status['reason'])}"
        if status["remedy"]:
            yield f"  {'':16} → {escape(status['remedy'])}"


def _libraries(part: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, library in part.items():
        if library["bytes"] is None:
            yield f"  {name:20} not there: {escape(library['path'])}"
            continue
        built = f", for {' '.join(library['built_for'])}" if library.get("built_for") else ""
        yield f"  {name:20} {library['bytes'] / 2**20:.1f} MiB{built}: {escape(library['path'])}"


def _environment(part: dict[str, dict[str, str]]) -> Iterator[str]:
    for name, variable in part.items():
        yield f"  {name}={escape(variable['value'])}: {variable['effect']}"
        if variable["fault"]:
            yield f"    [red]{escape(variable['fault'])}[/]"
    if not part:
        yield "  none of those that matter is set"
