"""What a run leaves behind: the machine it ran on, a JSON file with the raw samples, and plots."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

import fusedrnn

from . import train_text
from .kernel_table import KernelTable, Row
from .shapes import CELLS, MODES
from .train_text import Training

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
    try:
        describe = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
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


def write(
    folder: Path, environment: dict[str, Any], training: Training | None, table: KernelTable | None
) -> list[Path]:
    """Writes ``bench.json`` and the plots, replacing those of an earlier run, and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "bench.json"]
    results: dict[str, Any] = {"environment": environment}
    if training:
        results["training"] = asdict(training)
        paths.append(plot_training(training, environment, folder / "loss.png"))
    if table:
        results["kernels"] = _table_as_json(table)
        paths += [
            plot_kernels(table, precision, environment, folder / f"kernels-{precision}.png")
            for precision in table.peaks
        ]
    # Numbers that JSON has no word for (a loss that became NaN) would make the file unreadable elsewhere.
    paths[0].write_text(json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")
    return paths


def _table_as_json(table: KernelTable) -> dict[str, Any]:
    return {
        "peak_flop_per_second": table.peaks,
        "memory_method": table.memory_method,
        "geometric_means": {
            precision: {cell.name: table.geometric_mean(cell.name, precision) for cell in CELLS}
            | {
                "all": table.geometric_mean(precision=precision),
                "onnxruntime": table.geometric_mean(precision=precision, peer=True),
            }
            for precision in table.peaks
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
            "peer_ratio": row.peer_ratio._asdict() if row.peer_ratio else None,
        }
    return figures


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def _caption(environment: dict[str, Any]) -> str:
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
    figure, axes = plt.subplots(
        1, len(CELLS), figsize=(15, 1.9 + 0.62 * len(shapes)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, cell in zip(axes, CELLS, strict=True):
        for i, mode in enumerate(MODES):
            of_mode = {row.shape: row for row in rows if (row.cell, row.mode) == (cell.name, mode)}
            offset = (i - (len(MODES) - 1) / 2) * 0.38
            _draw_ratios(axis, [of_mode[shape] for shape in shapes], offset, mode)
        mean = table.geometric_mean(cell.name, precision)
        axis.set_title(f"{cell.name}   " + (f"geometric mean {mean:.2f}×" if mean else ""), fontweight="bold")
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
        f"median of side-by-side pairs; the line spans the 10th to 90th percentile\n{_caption(environment)}",
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_ratios(axis: Any, rows: Sequence[Row], offset: float, mode: str) -> None:
    right = [(y + offset, row.ratio) for y, row in enumerate(rows) if not row.faults]
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
    for y, row in enumerate(rows):
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


def plot_training(training: Training, environment: dict[str, Any], path: Path) -> Path:
    """Draws both loss curves, one on the other, and below them how far apart they are."""
    steps = range(len(training.builtin_losses))
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 7), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    top.plot(steps, training.builtin_losses, color=BUILTIN, linewidth=4, alpha=0.45, label="torch.nn.LSTM")
    top.plot(steps, training.fusedrnn_losses, color=OURS, linewidth=1.1, label="fusedrnn.LSTM")
    top.axhline(training.entropy, color="black", linewidth=0.8, linestyle=":")
    top.annotate(
        "unigram entropy", (len(steps), training.entropy), (-4, 4), textcoords="offset points", ha="right"
    )
    top.set_ylabel("loss, bits per character")
    top.legend(frameon=False)
    top.set_title(
        f"Two-layer character LSTM on {training.characters:,} characters of Python's standard library",
        loc="left",
        fontweight="bold",
    )
    zero = 2e-9  # where a gap of nothing is drawn; the smallest other one is a unit in the last place, 6e-8
    gaps = [max(gap, zero) for gap in train_text.relative_gaps(training)]
    bottom.plot(steps, gaps, ".", color=OURS, markersize=3)
    allowed = [train_text.tolerance(step) for step in steps]
    bottom.plot(steps, allowed, color="black", linewidth=1, linestyle="--", drawstyle="steps-post")
    bottom.annotate("allowed", (0, allowed[0]), (3, 3), textcoords="offset points", fontsize=8)
    bottom.set_yscale("log")
    bottom.set_ylim(zero / 3, 1)
    bottom.set_yticks(
        [zero, 1e-7, 1e-5, 1e-3, 1e-1], ["0", "$10^{-7}$", "$10^{-5}$", "$10^{-3}$", "$10^{-1}$"]
    )
    bottom.minorticks_off()
    bottom.set_ylabel("relative gap")
    bottom.set_xlabel(f"step\n{_caption(environment)}")
    for axis in (top, bottom):
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, len(steps))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
