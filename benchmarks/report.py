"""The plot of the training run, and the files of ``make bench``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusedrnn.bench.report import BUILTIN, OURS, caption, plt, table_as_json, write_json, write_table
from fusedrnn.bench.table import KernelTable

from . import train_text
from .train_text import Training


def write(
    folder: Path, environment: dict[str, Any], training: Training | None, table: KernelTable | None
) -> list[Path]:
    """Writes ``bench.json``, the CSV and the plots, replacing those of an earlier run; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment}
    paths = []
    if training:
        results["training"] = asdict(training)
        paths.append(plot_training(training, environment, folder / "loss.png"))
    if table:
        results["kernels"] = table_as_json(table)
        paths += write_table(folder, environment, table)
    return [write_json(folder / "bench.json", results), *paths]


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
    bottom.set_xlabel(f"step\n{caption(environment)}")
    for axis in (top, bottom):
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, len(steps))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
