"""The kernel table: every cell, shape and mode, checked against the built-in and timed beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from tqdm import tqdm

import fusedrnn
import fusedrnn.functional

from . import gates, peer, timing
from .shapes import CELLS, MODES, Cell, Shape, flop, step_bytes


class Inputs(NamedTuple):
    """One call's tensors: x [T, B, I] or packed rows [rows, I], each state [1, B, H], y's gradient like y."""

    x: Tensor
    state: list[Tensor]
    dy: Tensor
    dstate: list[Tensor]
    batch_sizes: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        return Inputs(
            cast(self.x), [*map(cast, self.state)], cast(self.dy), [*map(cast, self.dstate)], self.batch_sizes
        )


def make_inputs(cell: Cell, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, needs_gradient: bool = False) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_(needs_gradient)

    steps = (shape.rows,) if shape.packed else (shape.T, shape.B)
    n_states = 2 if cell.name == "LSTM" else 1
    return Inputs(
        x=normal(*steps, shape.I, needs_gradient=True),
        state=[normal(1, shape.B, shape.H, needs_gradient=True) for _ in range(n_states)],
        dy=normal(*steps, shape.H),
        dstate=[normal(1, shape.B, shape.H) for _ in range(n_states)],
        batch_sizes=shape.batch_sizes if shape.packed else None,
    )


def call(layer: torch.nn.RNNBase, inputs: Inputs, mode: str) -> dict[str, Tensor]:
    """Runs one layer call, as it is checked and as it is timed.

    Inference returns y and the final states, under ``torch.inference_mode``. Training also returns the
    gradients of the input, the initial states and the weights.
    """
    if mode == "inference":
        with torch.inference_mode():
            return _forward(layer, inputs)
    outputs = _forward(layer, inputs)
    sources = {
        "x": inputs.x,
        **{f"state{i}": s for i, s in enumerate(inputs.state)},
        **dict(layer.named_parameters()),
    }
    gradients = torch.autograd.grad([*outputs.values()], [*sources.values()], [inputs.dy, *inputs.dstate])
    return outputs | {f"d{name}": g for name, g in zip(sources, gradients, strict=True)}


def _forward(layer: torch.nn.RNNBase, inputs: Inputs) -> dict[str, Tensor]:
    x = inputs.x if inputs.batch_sizes is None else PackedSequence(inputs.x, inputs.batch_sizes)
    y, final = layer(x, tuple(inputs.state) if len(inputs.state) > 1 else inputs.state[0])
    states = final if isinstance(final, tuple) else (final,)
    return {
        "y": y if inputs.batch_sizes is None else y.data,
        **{f"final{i}": s for i, s in enumerate(states)},
    }


@contextmanager
def plans() -> Iterator[set[str]]:
    """Collects the names of the backends that the planner chooses inside the block."""
    chosen: set[str] = set()
    make_plan = fusedrnn.functional.make_plan

    def record(*args, **kwargs):
        plan = make_plan(*args, **kwargs)
        chosen.add(plan.backend)
        return plan

    with mock.patch.object(fusedrnn.functional, "make_plan", record):
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
    faults: dict[str, str] = field(default_factory=dict)
    errors: dict[str, gates.Verdict] = field(default_factory=dict)
    builtin_times: list[float] = field(default_factory=list)
    fusedrnn_times: list[float] = field(default_factory=list)
    peer_times: list[float] = field(default_factory=list)  # onnxruntime's
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
        return timing.spread([a / b for a, b in zip(self.builtin_times, self.fusedrnn_times, strict=True)])

    @property
    def peer_ratio(self) -> timing.Spread | None:
        """onnxruntime's time over ours, likewise; None where it has none."""
        if not self.peer_times:
            return None
        return timing.spread([a / b for a, b in zip(self.peer_times, self.fusedrnn_times, strict=True)])


@dataclass
class KernelTable:
    """All rows, and per precision the matrix-product peak in operations per second, of the same run."""

    rows: list[Row]
    peaks: dict[str, float]
    memory_method: str

    @property
    def failures(self) -> list[str]:
        return [
            f"{row.cell} {row.shape} {row.mode} {row.precision}: {name} {fault}"
            for row in self.rows
            for name, fault in row.faults.items()
        ]

    def geometric_mean(
        self, cell: str | None = None, precision: str | None = None, *, peer: bool = False
    ) -> float | None:
        """Of the ratios, over the padded sequences that have one; None if none has."""
        ratios = [
            ratio.median
            for row in self.rows
            if not row.faults
            and row.shape.whole
            and cell in (None, row.cell)
            and precision in (None, row.precision)
            and (ratio := row.peer_ratio if peer else row.ratio)
        ]
        return timing.geometric_mean(ratios) if ratios else None


def run(
    device: torch.device, shapes: Sequence[Shape], precisions: Sequence[str], *, seconds: float, seed: int
) -> KernelTable:
    """Checks and times every cell × shape × mode × precision in about ``seconds``."""
    deadline = timing.Deadline(seconds)
    rows: list[Row] = []
    peaks = dict.fromkeys(precisions, 0.0)
    total = len(precisions) * len(CELLS) * len(shapes) * len(MODES)
    with tqdm(total=total, desc="kernels", unit="row") as progress:
        for precision in precisions:
            with gates.matmul_precision(precision):
                peaks[precision] = timing.matmul_peak(device, gates.PRECISIONS[precision].dtype)
                for cell in CELLS:
                    for shape in shapes:
                        share = len(MODES) * deadline.left / (total - len(rows))
                        for row in _measure(cell, shape, precision, device, share, seed):
                            rows.append(row)
                            progress.set_postfix_str(f"{cell.name} {shape} {row.mode} {_ratio_text(row)}")
                            progress.update()
                # Again, because the machine may have been busier then: the ceiling is the best that was seen.
                again = timing.matmul_peak(device, gates.PRECISIONS[precision].dtype)
                peaks[precision] = max(peaks[precision], again)
        progress.set_postfix_str("")
    method = timing.CUDA_MEMORY_METHOD if device.type == "cuda" else timing.CPU_MEMORY_METHOD
    return KernelTable(rows, peaks, method)


def _measure(
    cell: Cell, shape: Shape, precision: str, device: torch.device, seconds: float, seed: int
) -> Iterator[Row]:
    """Yields the rows of all modes, the last within about ``seconds``.

    Results are always checked. Once the budget is overdrawn, a ratio rests on a single pair.
    """
    deadline = timing.Deadline(seconds)
    least = {"warmup": 1, "min_rounds": 3} if seconds > 0 else {"warmup": 0, "min_rounds": 1}
    dtype = gates.PRECISIONS[precision].dtype
    torch.manual_seed(seed)
    builtin = cell.layer(torch.nn, shape).to(device, dtype)
    ours = cell.layer(fusedrnn, shape).to(device, dtype)
    ours.load_state_dict(builtin.state_dict())
    inputs = make_inputs(cell, shape, dtype, device, seed)
    truth = call(copy.deepcopy(builtin).double(), inputs.to(torch.float64), "training")
    has_peer = device.type == "cpu" and dtype == torch.float32 and not shape.packed and peer.available()
    for i, mode in enumerate(MODES):
        row = Row(
            cell.name,
            shape,
            mode,
            precision,
            flop(cell, shape, mode),
            step_bytes(cell, shape, dtype.itemsize),
        )

        def run_builtin(mode: str = mode) -> object:
            return call(builtin, inputs, mode)

        def run_ours(mode: str = mode) -> object:
            return call(ours, inputs, mode)

        _gate(row, builtin, ours, inputs, truth)
        if not row.faults:
            calls = [run_builtin, run_ours]
            if has_peer and mode == "inference":
                calls.append(peer.make_call(cell, builtin, inputs.x, inputs.state))
            row.builtin_times, row.fusedrnn_times, *others = timing.interleave(
                calls,
                device,
                seconds=deadline.left / (len(MODES) - i),
                **least,
                settle=0.01 if device.type == "cpu" else 0.0,
            )
            row.peer_times = others[0] if others else []
            row.builtin_memory = timing.peak_memory(run_builtin, device)
            row.fusedrnn_memory = timing.peak_memory(run_ours, device)
        yield row


def _gate(
    row: Row, builtin: torch.nn.RNNBase, ours: torch.nn.RNNBase, inputs: Inputs, truth: dict[str, Tensor]
) -> None:
    expected = call(builtin, inputs, row.mode)
    try:
        with plans() as chosen:
            results = call(ours, inputs, row.mode)
    except (
        Exception
    ) as error:  # a crash is a red gate: it fails the run, and the other rows are still worth having
        row.faults = {"call": f"raised {type(error).__name__}: {error}"}
        return
    row.backend = "+".join(sorted(chosen))
    referee = {name: truth[name] for name in expected}
    row.errors = gates.judge_all(results, expected, referee, gates.PRECISIONS[row.precision])
    row.faults = {name: verdict.fault for name, verdict in row.errors.items() if verdict.fault}


def _ratio_text(row: Row) -> str:
    return "wrong" if row.faults else f"{row.ratio.median:.2f}×"


def show(table: KernelTable, console: Console) -> None:
    """Prints the rows, one table per cell and precision, the geometric means, and what a red gate found."""
    for precision, peak in table.peaks.items():
        for cell in CELLS:
            rows = [row for row in table.rows if (row.cell, row.precision) == (cell.name, precision)]
            console.print(_cell_table(f"{cell.name}, {precision}", rows, peak))
        means = [(cell.name, table.geometric_mean(cell.name, precision)) for cell in CELLS]
        means.append(("all", table.geometric_mean(precision=precision)))
        text = "   ".join(f"{name} {mean:.2f}×" if mean else f"{name} none" for name, mean in means)
        console.print(f"Geometric mean of the ratios over padded sequences, {precision}:  {text}")
        if mean := table.geometric_mean(precision=precision, peer=True):
            console.print(f"Against onnxruntime, inference:  {mean:.2f}×")
        console.print(
            f"Peak: {peak / 1e9:.0f} GFLOP/s, the fastest {precision} matrix product seen in this run.\n"
        )
    pairs = [len(row.builtin_times) for row in table.rows if not row.faults] or [0]
    console.print(
        "Ratio: built-in's time / fusedrnn's, above 1 fusedrnn is faster; the median of"
        f" {min(pairs)} to {max(pairs)} side-by-side pairs\n(10th–90th percentile)."
        " Two figures in a column: built-in → fusedrnn."
        " ort: onnxruntime's time / fusedrnn's.\n"
        "W_hh: what each step reads, and the cache of a core that holds it."
        " GFLOP/s: matrix products a call cannot do without.\n"
        f" MB: {table.memory_method}."
    )
    for failure in table.failures:
        console.print(f"wrong: {failure}", style="red", markup=False)


def _cell_table(title: str, rows: Sequence[Row], peak: float) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("shape", no_wrap=True)
    table.add_column("mode")
    for name in ("ms", "ratio", "ort", "GFLOP/s", "% of peak", "W_hh", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by")
    for row in rows:
        if row.faults:
            table.add_row(str(row.shape), row.mode, "", "[bold red]wrong[/]", "", "", "", "", "", row.backend)
            continue
        times = (row.builtin.median, row.fusedrnn.median)
        speeds = [row.flop / t for t in times]
        ratio = row.ratio
        table.add_row(
            str(row.shape),
            row.mode,
            _pair([f"{t * 1e3:.3g}" if t < 1 else f"{t * 1e3:.0f}" for t in times]),
            f"[bold]{_ratio_text(row)}[/] ({ratio.low:.2f}–{ratio.high:.2f})",
            f"{row.peer_ratio.median:.2f}×" if row.peer_ratio else "",
            _pair([f"{s / 1e9:.0f}" for s in speeds]),
            _pair([f"{100 * s / peak:.0f}" for s in speeds]),
            f"{row.step_bytes / 1024:.0f} KB {timing.cache_level(row.step_bytes)}",
            _pair(
                ["?" if m is None else f"{m / 1e6:.1f}" for m in (row.builtin_memory, row.fusedrnn_memory)]
            ),
            row.backend,
        )
    return table


def _pair(texts: Sequence[str]) -> str:
    return " → ".join(texts)
