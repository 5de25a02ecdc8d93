"""The kernel table: every call of a set, checked against the built-in and timed beside it and its peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from fusedrnn import accuracy, functional
from fusedrnn.trial import MODES, Cell, Shape, Trio, call, flop, make_trio, step_bytes

from . import peers, timing
from .sets import Entry


@contextmanager
def plans() -> Iterator[set[str]]:
    """Collects the names of the backends that the planner chooses inside the block."""
    chosen: set[str] = set()
    with functional.watched_plans(lambda plan, *_: chosen.add(plan.backend)):
        yield chosen


@dataclass
class Row:
    """One line of the table. Times in seconds, memory in bytes; no times if ``faults`` has an entry."""

    cell: str
    shape: Shape
    mode: str
    precision: str
    flop: int
    step_bytes: int
    backend: str = ""
    method: str = "clock"
    faults: dict[str, str] = field(default_factory=dict)
    errors: dict[str, accuracy.Verdict] = field(default_factory=dict)
    builtin_times: list[float] = field(default_factory=list)
    fusedrnn_times: list[float] = field(default_factory=list)
    product_flop: int = 0
    product_times: list[float] = field(default_factory=list)  # of a large product
    peer_times: dict[str, list[float]] = field(default_factory=dict)
    peer_faults: dict[str, str] = field(default_factory=dict)  # why a peer has no times
    builtin_memory: int | None = None
    fusedrnn_memory: int | None = None

    @property
    def builtin(self) -> timing.Spread:
        return timing.spread(self.builtin_times)

    @property
    def fusedrnn(self) -> timing.Spread:
        return timing.spread(self.fusedrnn_times)

    @property
    def ratio(self) -> timing.Spread:
        """The built-in's time over ours, pair by pair: above 1 ours is the faster one."""
        return timing.spread(_ratios(self.builtin_times, self.fusedrnn_times))

    def share_of_peak(self, times: Sequence[float]) -> float:
        """Operations per second over those of the large product, of the same rounds."""
        return self.flop / self.product_flop * _median_ratio(self.product_times, times)

    def peer_ratio(self, name: str) -> float | None:
        """A peer's time over ours, of the same rounds; None where it has none."""
        return _median_ratio(self.peer_times[name], self.fusedrnn_times) if name in self.peer_times else None


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(times, others, strict=True)]


def _median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return timing.spread(_ratios(times, others)).median


@dataclass
class KernelTable:
    """All rows, and the precisions they are in."""

    rows: list[Row]
    precisions: Sequence[str]
    memory_method: str

    def peak(self, precision: str) -> float | None:
        """Operations per second of the fastest large product in this run; None if nothing was timed."""
        of_precision = [row for row in self.rows if row.precision == precision and row.product_times]
        return max((row.product_flop / min(row.product_times) for row in of_precision), default=None)

    @property
    def failures(self) -> list[str]:
        return [
            f"{row.cell} {row.shape} {row.mode} {row.precision}: {name} {fault}"
            for row in self.rows
            for name, fault in row.faults.items()
        ]

    @property
    def cells(self) -> list[str]:
        return [*dict.fromkeys(row.cell for row in self.rows)]

    @property
    def peers(self) -> list[str]:
        """Those that were timed at least once."""
        return [*dict.fromkeys(name for row in self.rows for name in row.peer_times)]

    def geometric_mean(
        self, cell: str | None = None, precision: str | None = None, *, peer: str | None = None
    ) -> float | None:
        """Of the ratios, over the padded sequences that have one; None if none has."""
        ratios = [
            ratio
            for row in self.rows
            if not row.faults
            and row.shape.whole
            and cell in (None, row.cell)
            and precision in (None, row.precision)
            and (ratio := row.peer_ratio(peer) if peer else row.ratio.median)
        ]
        return timing.geometric_mean(ratios) if ratios else None


def run(
    device: torch.device,
    entries: Sequence[Entry],
    precisions: Sequence[str],
    *,
    seconds: float,
    seed: int,
    modes: Sequence[str] = MODES,
    beside: Sequence[peers.Peer] = (),
) -> KernelTable:
    """Checks and times every call × mode × precision in about ``seconds``, beside the built-in and peers."""
    deadline = timing.Deadline(seconds)
    rows: list[Row] = []
    total = len(precisions) * len(entries) * len(modes)
    with tqdm(total=total, desc="kernels", unit="row") as progress:
        for precision in precisions:
            with accuracy.matmul_precision(precision):
                dtype, second = accuracy.PRECISIONS[precision].dtype, min(1.0, max(0.1, seconds / 20))
                product = timing.fastest_product(device, dtype, second)
                for cell, shape in entries:
                    share = len(modes) * deadline.left / (total - len(rows))
                    for row in _measure(cell, shape, precision, device, share, seed, modes, beside, product):
                        rows.append(row)
                        progress.set_postfix_str(f"{row.cell} {shape} {row.mode} {_ratio_text(row)}")
                        progress.update()
        progress.set_postfix_str("")
    method = timing.CUDA_MEMORY_METHOD if device.type == "cuda" else timing.CPU_MEMORY_METHOD
    return KernelTable(rows, precisions, method)


def _measure(
    cell: Cell,
    shape: Shape,
    precision: str,
    device: torch.device,
    seconds: float,
    seed: int,
    modes: Sequence[str],
    beside: Sequence[peers.Peer],
    product: timing.Product,
) -> Iterator[Row]:
    """Yields the rows of all modes, the last within about ``seconds``.

    Results are always checked. Once the budget is overdrawn, a ratio rests on a single pair.
    """
    deadline = timing.Deadline(seconds)
    dtype = accuracy.PRECISIONS[precision].dtype
    trio = make_trio(cell, shape, dtype, device, seed)
    truth = call(trio.referee, trio.inputs.to(torch.float64), "training")
    for i, mode in enumerate(modes):
        operations, weights = flop(cell, shape, mode), step_bytes(cell, shape, dtype.itemsize)
        row = Row(str(cell), shape, mode, precision, operations, weights)
        run_builtin = partial(call, trio.builtin, trio.inputs, mode)
        run_ours = partial(call, trio.ours, trio.inputs, mode)
        _gate(row, trio, truth)
        if not row.faults:
            pair, row.method = timing.captured([run_builtin, run_ours], device)
            right = {peer.name: run for peer in beside if (run := _right(peer, row, cell, trio, truth))}
            others, _ = timing.captured([*right.values()], device)
            settled = seconds > 0
            row.builtin_times, row.fusedrnn_times, row.product_times, *peer_times = timing.interleave(
                [*pair, product.call, *others],
                device,
                seconds=deadline.left / (len(modes) - i),
                warmup=int(settled),
                min_rounds=1 + 2 * settled,
                settle=0.05 if settled and device.type == "cpu" else 0.0,
            )
            row.product_flop = product.flop
            row.peer_times = dict(zip(right, peer_times, strict=True))
            row.builtin_memory = timing.peak_memory(run_builtin, device)
            row.fusedrnn_memory = timing.peak_memory(run_ours, device)
        yield row


def _right(
    peer: peers.Peer, row: Row, cell: Cell, trio: Trio, truth: dict[str, Tensor]
) -> peers.Results | None:
    """A peer's call if its results are right; else the row keeps the reason."""
    try:
        run = peer.make(cell, row.shape, trio, row.mode)
        fault = peers.check(run(), truth, accuracy.PRECISIONS[row.precision])
    except peers.Unserved as error:
        fault = str(error)
    except Exception as error:  # of a package that is not ours: it is left out, and the reason kept
        fault = f"raised {type(error).__name__}: {error}"
    if not fault:
        return run
    row.peer_faults[peer.name] = fault
    return None


def _gate(row: Row, trio: Trio, truth: dict[str, Tensor]) -> None:
    expected = call(trio.builtin, trio.inputs, row.mode)
    try:
        with plans() as chosen:
            results = call(trio.ours, trio.inputs, row.mode)
    except (
        Exception
    ) as error:  # a crash is a red gate: it fails the run, and the other rows are still worth having
        row.faults = {"call": f"raised {type(error).__name__}: {error}"}
        return
    row.backend = "+".join(sorted(chosen))
    referee = {name: truth[name] for name in expected}
    precision = accuracy.PRECISIONS[row.precision]
    row.errors = accuracy.judge_all(results, expected, referee, precision, layers=row.shape.layers)
    row.faults = {name: verdict.fault for name, verdict in row.errors.items() if verdict.fault}


def _ratio_text(row: Row) -> str:
    return "wrong" if row.faults else f"{row.ratio.median:.2f}×"


def show(table: KernelTable, console: Console) -> None:
    """Prints the rows, one table per cell and precision, the geometric means, and what a red gate found."""
    for precision in table.precisions:
        for cell in table.cells:
            rows = [row for row in table.rows if (row.cell, row.precision) == (cell, precision)]
            console.print(_cell_table(f"{cell}, {precision}", rows, table.peers))
        means = [(cell, table.geometric_mean(cell, precision)) for cell in table.cells]
        means.append(("all", table.geometric_mean(precision=precision)))
        text = "   ".join(f"{name} {mean:.2f}×" if mean else f"{name} none" for name, mean in means)
        console.print(f"Geometric mean of the ratios over padded sequences, {precision}:  {text}")
        for peer in table.peers:
            if mean := table.geometric_mean(precision=precision, peer=peer):
                console.print(f"Against {peer}:  {mean:.2f}×")
        if peak := table.peak(precision):
            text = f"Peak: a large {precision} matrix product, in the rounds of each row; at best"
            console.print(f"{text} {peak / 1e9:.0f} GFLOP/s.\n")
    pairs = [len(row.builtin_times) for row in table.rows if not row.faults] or [0]
    console.print(
        "Ratio: built-in's time / fusedrnn's, above 1 fusedrnn is faster; the median of"
        f" {min(pairs)} to {max(pairs)} side-by-side pairs\n(10th–90th percentile)."
        " Two figures in a column: built-in → fusedrnn."
        " A peer's column: its time / fusedrnn's.\n"
        "W_hh: what each step reads, and the cache of a core that holds it."
        " GFLOP/s: matrix products a call cannot do without.\n"
        f"MB: {table.memory_method}."
    )
    for failure in table.failures:
        console.print(f"wrong: {failure}", style="red", markup=False)


def _cell_table(title: str, rows: Sequence[Row], beside: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("shape", no_wrap=True)
    table.add_column("mode")
    for name in ("ms", "µs/step", "ratio", *beside, "GFLOP/s", "% of peak", "W_hh", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by")
    for row in rows:
        if row.faults:
            empty = [""] * (len(beside) + 4)
            table.add_row(str(row.shape), row.mode, "", "", "[bold red]wrong[/]", *empty, row.backend)
            continue
        times = (row.builtin.median, row.fusedrnn.median)
        speeds = [row.flop / t for t in times]
        ratio = row.ratio
        table.add_row(
            str(row.shape),
            row.mode,
            _pair([f"{t * 1e3:.3g}" if t < 1 else f"{t * 1e3:.0f}" for t in times]),
            f"{times[1] / row.shape.T * 1e6:.3g}",
            f"[bold]{_ratio_text(row)}[/] ({ratio.low:.2f}–{ratio.high:.2f})",
            *(f"{other:.2f}×" if (other := row.peer_ratio(name)) else "" for name in beside),
            _pair([f"{s / 1e9:.0f}" for s in speeds]),
            _pair([f"{100 * row.share_of_peak(t):.0f}" for t in (row.builtin_times, row.fusedrnn_times)]),
            f"{row.step_bytes / 1024:.0f} KB {timing.cache_level(row.step_bytes)}",
            _pair(
                ["?" if m is None else f"{m / 1e6:.1f}" for m in (row.builtin_memory, row.fusedrnn_memory)]
            ),
            row.backend,
        )
    return table


def _pair(texts: Sequence[str]) -> str:
    return " → ".join(texts)
