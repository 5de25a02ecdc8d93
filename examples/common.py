"""What the recipes share besides the loop: options of the command line, the backend, batches, plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib as mpl
import torch
import typer
from torch import Tensor

import fusedrnn

from .trainer import History

mpl.use("Agg")  # before pyplot: no display is needed
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

BackendName = Literal["auto", "torch", "cpu", "cuda", "triton", "reference"]

Backend = Annotated[BackendName, typer.Option(help="Whose kernels; torch: those of torch.nn, to compare.")]


def _asked_to_resume(context: typer.Context, resume: bool) -> bool:
    if resume and context.params.get("checkpoint") is None:
        raise typer.BadParameter("it needs a --checkpoint to go on from")
    return resume


# Eager, so that it is known when --resume is looked at.
Checkpoint = Annotated[Path | None, typer.Option(help="File to save to after every epoch.", is_eager=True)]
Data = Annotated[Path | None, typer.Option(help="Your own data instead.", exists=True)]
Device = Annotated[str, typer.Option(help="cpu or cuda; by default cuda, if there is one.")]
Epochs = Annotated[int, typer.Option(min=1, help="At most so many passes over the data.")]
Plot = Annotated[Path, typer.Option(help="PNG to write.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on from --checkpoint, if it is there.", callback=_asked_to_resume),
]
Seed = Annotated[int, typer.Option(help="Of everything that is random.")]

PLOTS = Path("build/recipes")  # where the plots go by default
OURS, BASELINE, QUIET = "#d1495b", "#5f6b7a", "#2a6f97"


def application(main: Callable[..., Any]) -> typer.Typer:
    """The command line of a recipe that is one function; options and help are its annotations."""
    app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None)
    app.command()(main)
    return app


@contextmanager
def prepared(backend: BackendName, seed: int, device: str = "") -> Iterator[torch.device]:
    """Seeds torch, forces the backend inside the block, and yields the device to work on."""
    torch.manual_seed(seed)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if backend == "auto":
        yield place
        return
    with fusedrnn.use_backend(backend):
        yield place


def shuffled(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """All rows once, in random order, in batches of ``size`` and a smaller last one."""
    return [tuple(t[rows] for t in tensors) for rows in torch.randperm(len(tensors[0])).split(size)]


@contextmanager
def figure(path: Path, width: float = 7, height: float = 3.2) -> Iterator[Figure]:
    """A figure to draw on, in inches, which is saved as a PNG when the block ends."""
    drawn = plt.figure(figsize=(width, height), layout="constrained")
    try:
        yield drawn
        for axes in drawn.axes:
            axes.grid(color="#e5e5e5", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, format="png", dpi=90)
    finally:
        plt.close(drawn)
    print(f"plot: {path}")


def plot_learning(
    path: Path, title: str, histories: dict[str, History], metric: str, baselines: dict[str, float]
) -> None:
    """Draws training loss and metric by epoch, a line for each history; baselines are dashed lines."""
    with figure(path) as drawn:
        drawn.suptitle(title, x=0.01, ha="left", fontsize=11)
        left, right = drawn.subplots(1, 2)
        for (name, history), colour in zip(histories.items(), _colours(len(histories)), strict=True):
            epochs = range(1, len(history.loss) + 1)
            marker = "." if len(epochs) < 30 else ""
            left.plot(epochs, history.loss, color=colour, marker=marker)
            right.plot(epochs, history.metric, color=colour, marker=marker, label=name)
        for (name, level), dashes in zip(baselines.items(), ("--", ":", "-.") * len(baselines), strict=False):
            right.axhline(level, color=BASELINE, linestyle=dashes, label=name)
        for axes, label in ((left, "training loss"), (right, metric)):
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
        right.legend(frameon=False, fontsize=8)


def _colours(count: int) -> list[str]:
    return [OURS, QUIET, "#e09f3e", *plt.rcParams["axes.prop_cycle"].by_key()["color"]][:count]


def part_of(path: Path | None, name: str) -> Path | None:
    """The checkpoint of one model of several: ``run.pt`` of a teacher is ``run-teacher.pt``."""
    return path and path.with_stem(f"{path.stem}-{name}")
