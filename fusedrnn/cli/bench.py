"""``fusedrnn bench``: how fast the layers are on this machine, and beside what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from fusedrnn.accuracy import PRECISIONS
from fusedrnn.trial import CELL_BY_NAME, MODES, Shape

from .output import make_console

_SETS = "default, quick, flashrnn, deepbench, haste, rl, packed, cliffs, grid"
_PEERS = "python loop, compiled loop, onnxruntime, haste, flashrnn, torchrl"


def bench(
    name: Annotated[str, typer.Option("--set", help=f"Of shapes: {_SETS}.")] = "default",
    shape: Annotated[list[str] | None, typer.Option(help="T,B,I,H instead of a set; repeatable.")] = None,
    cell: Annotated[str, typer.Option(help="lstm, gru, rnn, or some of them as a,b; default: all.")] = "",
    precision: Annotated[
        str, typer.Option(help=f"{', '.join(PRECISIONS)}, or some as a,b; default: fp32 on a CPU, else all.")
    ] = "",
    mode: Annotated[str, typer.Option(help="inference, training; default: both.")] = "",
    peer: Annotated[
        str,
        typer.Option(
            help=f"Beside torch.nn: {_PEERS}, as a,b; all; none. Default: the installed, no compiling."
        ),
    ] = "",
    seconds: Annotated[float, typer.Option(help="About how long; all is checked anyway.")] = 120,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda, if there is one.")] = "",
    threads: Annotated[int, typer.Option(help="Of the CPU; 0: as many as are idle.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.csv and plots.")] = Path("bench"),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files of earlier runs; nothing is measured.")
    ] = None,
) -> None:
    """Time layers beside torch.nn and whatever else is installed; first check that they are right.

    The exit status is 1 if a result is wrong, and 2 if the question makes no sense.
    """
    try:
        import matplotlib as mpl  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        typer.echo(f"fusedrnn bench needs {error.name}; type: pip install 'fusedrnn[bench]'", err=True)
        raise typer.Exit(2) from None
    if compare:
        _compare(*compare)
        return
    from fusedrnn.bench import peers, report, sets, table, timing

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cells = _chosen("cell", cell, ("lstm", "gru", "rnn"))
    if name not in sets.SETS:
        raise typer.BadParameter(f"no set {name!r}; choose from {', '.join(sets.SETS)}")
    entries = sets.entries(name, [CELL_BY_NAME[c].name for c in cells])
    if shape:
        entries = [sets.Entry(CELL_BY_NAME[c], _shape(text)) for c in cells for text in shape]
    usual = tuple(PRECISIONS) if place.type == "cuda" else ("fp32",)
    precisions = _chosen("precision", precision, tuple(PRECISIONS), usual)
    if place.type != "cuda" and "tf32" in precisions:
        raise typer.BadParameter("tf32 is a GPU's")
    modes = _chosen("mode", mode, MODES)
    beside = [peers.PEERS[p] for p in _peers(peer)]
    console = make_console()
    idle = timing.idle_cpus()
    if warning := timing.set_threads(threads or None, idle):
        console.print(warning, style="yellow")
    environment = report.environment(place, seed, idle)
    measured = table.run(place, entries, precisions, seconds=seconds, seed=seed, modes=modes, beside=beside)
    table.show(measured, console)
    for line in sorted({f"{p}: {fault}" for row in measured.rows for p, fault in row.peer_faults.items()}):
        console.print(f"left out: {line}", style="yellow", markup=False)
    out.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment, "set": name, "kernels": report.table_as_json(measured)}
    files = [report.write_json(out / "bench.json", results), *report.write_table(out, environment, measured)]
    for path in files:
        console.print(str(path), soft_wrap=True, markup=False)
    raise typer.Exit(1 if measured.failures else 0)


def _chosen(what: str, text: str, known: tuple[str, ...], usual: tuple[str, ...] | None = None) -> list[str]:
    chosen = text.split(",") if text else [*(usual or known)]
    for value in chosen:
        if value not in known:
            raise typer.BadParameter(f"no {what} {value!r}; choose from {', '.join(known)}")
    return chosen


def _shape(text: str) -> Shape:
    try:
        T, B, I, H = map(int, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"a shape is four whole numbers, T,B,I,H; this is {text!r}") from None
    if min(T, B, I, H) < 1:
        raise typer.BadParameter("sizes must be positive")
    return Shape(T, B, I, H)


def _peers(text: str) -> list[str]:
    from fusedrnn.bench import peers

    if text == "none":
        return []
    if text in ("", "all"):
        left_out = () if text else ("compiled loop",)
        return [p.name for p in peers.installed([*peers.PEERS]) if p.name not in left_out]
    chosen = _chosen("peer", text, tuple(peers.PEERS))
    for name in chosen:
        if missing := peers.PEERS[name].missing():
            raise typer.BadParameter(f"{name} needs {', '.join(missing)}, not installed")
    return chosen


def _compare(before: Path, after: Path) -> None:
    from fusedrnn.bench.compare import compare as compare_files

    try:
        found = compare_files(before, after)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = make_console()
    rows = Table(box=None, padding=(0, 2, 0, 0))
    rows.add_column("call")
    for title in ("before, ms", "after, ms", "before / after", "beyond the spread"):
        rows.add_column(title, justify="right", no_wrap=True)
    for change in sorted(found.changes, key=lambda c: c.ratio):
        times = [f"{s.median * 1e3:.4g}" for s in (change.before, change.after)]
        clear = ("faster" if change.ratio > 1 else "slower") if change.clear else ""
        rows.add_row(change.name, *times, f"{change.ratio:.2f}×", clear)
    console.print(rows)
    for title, names in (("only before", found.only_before), ("only after", found.only_after)):
        if names:
            console.print(f"{title}: {len(names)}: {', '.join(names[:4])}{', …' * (len(names) > 4)}")
    for line in found.differences:
        console.print(f"not the same machine or versions: {line}", style="yellow", markup=False)
    if found.mean:
        console.print(f"Geometric mean: {found.mean:.3f}×; above 1 it has become faster.")
