"""What a run leaves behind: the machine it ran on, a JSON file with the raw samples, and plots."""

from __future__ import annotations

import csv
import datetime as dt
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

import fusedrnn
from fusedrnn.trial import MODES

from .table import KernelTable, Row

mpl.use("Agg")  # before pyplot: no display is needed
from matplotlib import pyplot as plt

BUILTIN, OURS = "#5f6b7a", "#d1495b"
MODE_COLOURS = {"inference": "#2a6f97", "training": "#e09f3e"}


def environment(device: torch.device, seed: int, idle_cpus: float | None) -> dict[str, Any]:
    """Where and with what the figures were measured."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "fusedrnn": fusedrnn.__version__,
        "backends": {name: status.reason or "available" for name, status in fusedrnn.backends().items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "idle_cpus": idle_cpus,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "seed": seed,
    }


def _commit() -> str | None:
    """The commit of the source tree, marked where the tree differs from it; None outside a repository."""
    root = Path(__file__).parents[2]
    if not (root / "csrc").exists():  # installed: a repository around it would be another's
        return None
    try:
        describe = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return describe.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def write_json(path: Path, results: dict[str, Any]) -> Path:
    """Writes results. Numbers that JSON has no word for (a loss that became NaN) become text: else the file
    would be unreadable elsewhere."""
    path.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
    return path


def write_table(folder: Path, environment: dict[str, Any], table: KernelTable) -> list[Path]:
    """Writes ``bench.csv`` and the plots, replacing those of an earlier run, and returns the paths."""
    paths = [_write_csv(folder / "bench.csv", table)]
    for precision in table.precisions:
        paths.append(plot_kernels(table, precision, environment, folder / f"kernels-{precision}.png"))
        if scaling := _scaling(table, precision):
            paths.append(plot_scaling(scaling, precision, environment, folder / f"scaling-{precision}.png"))
    return paths


def table_as_json(table: KernelTable) -> dict[str, Any]:
    return {
        "peak_flop_per_second": {precision: table.peak(precision) for precision in table.precisions},
        "memory_method": table.memory_method,
        "geometric_means": {
            precision: {cell: table.geometric_mean(cell, precision) for cell in table.cells}
            | {"all": table.geometric_mean(precision=precision)}
            | {peer: table.geometric_mean(precision=precision, peer=peer) for peer in table.peers}
            for precision in table.precisions
        },
        "rows": [_row_as_json(row) for row in table.rows],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    figures = asdict(row)
    figures["errors"] = {name: verdict._asdict() for name, verdict in row.errors.items()}
    if not row.faults:
        figures |= {
            "builtin_seconds": row.builtin._asdict(),
            "fusedrnn_seconds": row.fusedrnn._asdict(),
            "ratio": row.ratio._asdict(),
            "share_of_peak": row.share_of_peak(row.fusedrnn_times),
            "peer_ratios": {name: row.peer_ratio(name) for name in row.peer_times},
        }
    return figures


_COLUMNS = (
    *("cell", "shape", "mode", "precision", "by", "method", "pairs", "builtin_ms", "fusedrnn_ms"),
    *("us_per_step", "ratio", "ratio_low", "ratio_high", "gflop_per_s", "percent_of_peak", "builtin_mb"),
    *("fusedrnn_mb", "fault"),
)


def _write_csv(path: Path, table: KernelTable) -> Path:
    """A line for each row, with medians; a column more for each peer's ratio."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *(f"ratio_{name}" for name in table.peers)])
        for row in table.rows:
            what = [row.cell, str(row.shape), row.mode, row.precision, row.backend, row.method]
            if row.faults:
                filler = [""] * (len(_COLUMNS) - len(what) - 1)
                writer.writerow([*what, *filler, "; ".join(f"{k} {v}" for k, v in row.faults.items())])
                continue
            ours, ratio = row.fusedrnn.median, row.ratio
            memory = (row.builtin_memory, row.fusedrnn_memory)
            speed = row.flop / ours
            times = (row.builtin.median * 1e3, ours * 1e3, ours / row.shape.T * 1e6)
            figures = (*times, *ratio, speed / 1e9, 100 * row.share_of_peak(row.fusedrnn_times))
            beside = [row.peer_ratio(name) for name in table.peers]
            writer.writerow(
                [
                    *what,
                    len(row.fusedrnn_times),
                    *(f"{figure:.6g}" for figure in figures),
                    *("" if m is None else f"{m / 1e6:.3f}" for m in memory),
                    "",
                    *(f"{b:.6g}" if b else "" for b in beside),
                ]
            )
    return path


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def caption(environment: dict[str, Any]) -> str:
    where = environment["device"] if environment["device"] != "cpu" else environment["cpu"]
    threads = f"{environment['threads']} thread" + ("s" if environment["threads"] > 1 else "")
    commit, dash, dirty = (environment["commit"] or "unknown").partition("-")
    return (
        f"{where}, {threads} · torch {environment['torch']}"
        f" · fusedrnn {environment['fusedrnn']}, commit {commit[:10]}{dash}{dirty}"
        f" · {environment['date'][:10]}"
    )


def plot_kernels(table: KernelTable, precision: str, environment: dict[str, Any], path: Path) -> Path:
    """Draws every ratio as a bar from 1, to the right where fusedrnn is faster; one panel per cell."""
    rows = [row for row in table.rows if row.precision == precision]
    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure, grid = plt.subplots(
        1,
        len(table.cells),
        figsize=(15, 1.9 + 0.62 * len(shapes)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    axes = grid[0]
    for axis, cell in zip(axes, table.cells, strict=True):
        for i, mode in enumerate(MODES):
            of_mode = {row.shape: row for row in rows if (row.cell, row.mode) == (cell, mode)}
            offset = (i - (len(MODES) - 1) / 2) * 0.38
            places = [(i, of_mode[shape]) for i, shape in enumerate(shapes) if shape in of_mode]
            _draw_ratios(axis, places, offset, mode)
        mean = table.geometric_mean(cell, precision)
        axis.set_title(f"{cell}   " + (f"geometric mean {mean:.2f}×" if mean else ""), fontweight="bold")
        axis.axvline(1, color="black", linewidth=1, zorder=3)
        axis.grid(axis="x", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    _ratio_axis(axes[0], [row for row in rows if not row.faults])
    axes[0].set_yticks(range(len(shapes)), [str(shape) for shape in shapes])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(MODES), frameon=False)
    figure.suptitle(
        f"torch.nn's time / fusedrnn's time, {precision} (right of 1: fusedrnn is faster)", x=0.01, ha="left"
    )
    figure.supxlabel(
        f"median of side-by-side pairs; the line spans the 10th to 90th percentile\n{caption(environment)}",
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_ratios(axis: Any, rows: Sequence[tuple[int, Row]], offset: float, mode: str) -> None:
    right = [(y + offset, row.ratio) for y, row in rows if not row.faults]
    if right:
        places, ratios = zip(*right, strict=True)
        axis.barh(
            places,
            [r.median - 1 for r in ratios],
            0.34,
            left=1,
            color=MODE_COLOURS[mode],
            label=mode,
            zorder=2,
        )
        axis.hlines(
            places, [r.low for r in ratios], [r.high for r in ratios], color="#333333", linewidth=1, zorder=4
        )
    for place, ratio in right:
        # Beyond the bar and its line, on the side where the bar points.
        edge, side, gap = (ratio.high, "left", 4) if ratio.median >= 1 else (ratio.low, "right", -4)
        axis.annotate(
            f"{ratio.median:.2f}×",
            (edge, place),
            (gap, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8,
        )
    for y, row in rows:
        if row.faults:
            axis.annotate(
                f"{mode}: wrong", (1, y + offset), (5, 0), textcoords="offset points", va="center",
                color="#c00000", fontsize=8, fontweight="bold",
            )  # fmt: skip


def _ratio_axis(axis: Any, rows: Sequence[Row]) -> None:
    """A logarithmic axis, on which half and double are equally far from 1, with room for the labels."""
    low = min([0.8, *(row.ratio.low for row in rows)])
    high = max([1.25, *(row.ratio.high for row in rows)])
    span = high / low
    axis.set_xscale("log", base=2)
    axis.set_xlim(low / span**0.18, high * span**0.18)
    ticks = [0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 16, 32, 64]
    if span > 6:
        ticks = [0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128]
    left, right = axis.get_xlim()
    axis.set_xticks([tick for tick in ticks if left <= tick <= right])
    axis.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}×")
    axis.minorticks_off()


def _scaling(table: KernelTable, precision: str) -> dict[str, list[list[Row]]]:
    """By dimension, the series of rows that differ in that dimension alone, three or more, in its order."""
    found: dict[str, list[list[Row]]] = {}
    for dim in ("T", "B", "H"):
        series: dict[tuple[Any, ...], list[Row]] = {}
        for row in table.rows:
            if row.precision == precision and not row.faults:
                # The input grows with the hidden size where they are equal.
                square = row.shape.I == row.shape.H
                changes: dict[str, Any] = {dim: 1} | ({"I": 1} if dim == "H" and square else {})
                same = replace(row.shape, **changes)
                series.setdefault((row.cell, row.mode, same, square), []).append(row)
        chosen = [rows for rows in series.values() if len({getattr(r.shape, dim) for r in rows}) > 2]
        if chosen:
            found[dim] = [sorted(rows, key=lambda r: getattr(r.shape, dim)) for rows in chosen]
    return found


def plot_scaling(
    scaling: dict[str, list[list[Row]]], precision: str, environment: dict[str, Any], path: Path
) -> Path:
    """Draws time against T, B and H on logarithmic axes: solid ours, dashed the built-in's."""
    size = (6 * len(scaling), 5)
    figure, grid = plt.subplots(1, len(scaling), figsize=size, squeeze=False, layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, (dim, series) in zip(grid[0], scaling.items(), strict=True):
        for i, rows in enumerate(series):
            sizes = [getattr(row.shape, dim) for row in rows]
            colour, first = colours[i % len(colours)], rows[0]
            rest = " ".join(w for w in str(first.shape).split() if not w.startswith((dim, "I")))
            label = f"{first.cell} {first.mode}, {rest}"
            axis.plot(sizes, [r.fusedrnn.median * 1e3 for r in rows], "o-", color=colour, label=label)
            axis.plot(sizes, [r.builtin.median * 1e3 for r in rows], "x--", color=colour, alpha=0.7)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        measured = sorted({getattr(row.shape, dim) for rows in series for row in rows})
        axis.set_xticks(measured, [str(size) for size in measured])
        axis.tick_params(axis="x", which="minor", bottom=False)
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(lambda tick, _: f"{tick:g}")
        axis.set_xlabel(dim)
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    grid[0][0].set_ylabel("ms a call")
    figure.suptitle(f"solid: fusedrnn, dashed: torch.nn, {precision}", x=0.01, ha="left")
    figure.supxlabel(caption(environment), fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
