"""What the field says of recurrent layers, measured here: ``python -m benchmarks.claims --help``.

Each claim is stated with where it comes from, measured, and compared. One that does not hold on this
machine is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusedrnn
from fusedrnn.bench import peers, report, timing
from fusedrnn.trial import CELLS, Cell, Shape, call, make_trio

LSTM, GRU, RNN = CELLS


@dataclass
class Finding:
    """A claim, where it is from, and what was measured.

    Attributes:
        holds: whether it is so here; None where this machine cannot tell.
        figures: medians by name; times in seconds, memory in bytes.
    """

    claim: str
    source: str
    found: str
    holds: bool | None
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    device: torch.device
    seconds: float  # for each measurement
    quick: bool

    def shape(self, T: int, B: int, H: int) -> Shape:
        return Shape(min(T, 16), min(B, 4), min(H, 16), min(H, 16)) if self.quick else Shape(T, B, H, H)


def _median(times: list[float]) -> float:
    return timing.spread(times).median


def _side_by_side(calls: list[timing.Call], s: Settings) -> list[list[float]]:
    calls, _ = timing.captured(calls, s.device)
    return timing.interleave(calls, s.device, seconds=s.seconds, warmup=1, min_rounds=3)


def parameters(s: Settings) -> Finding:
    layers = {cell.name: cell.layer(fusedrnn, Shape(1, 1, 128, 128)) for cell in CELLS}
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    ratio = [counts[name] / counts["RNN"] for name in ("RNN", "GRU", "LSTM")]
    return Finding(
        "RNN, GRU and LSTM of one size have parameters as 1:3:4",
        "one weight matrix and bias for each gate: Hochreiter 1997, Cho 2014",
        ":".join(f"{r:g}" for r in ratio),
        ratio == [1, 3, 4],
        {name: float(count) for name, count in counts.items()},
    )


def gru_against_lstm(s: Settings) -> Iterator[Finding]:
    shape = s.shape(64, 16, 256)
    for mode in ("inference", "training"):
        calls = []
        for cell in (LSTM, GRU):
            trio = make_trio(cell, shape, torch.float32, s.device, 0)
            calls.append(partial(call, trio.ours, trio.inputs, mode))
        lstm, gru = map(_median, _side_by_side(calls, s))
        yield Finding(
            f"a GRU takes less time than an LSTM, three quarters ({shape} {mode})",
            "three of its four gates; Chung et al. 2014 found it faster",
            f"{gru / lstm:.2f} of it",
            gru < lstm,
            {"lstm": lstm, "gru": gru},
        )


def mixed_precision(s: Settings) -> Iterator[Finding]:
    shape = s.shape(128, 32, 512)
    runs = _in_two_dtypes(LSTM, shape, "training", s)
    times = dict(zip(runs, map(_median, _side_by_side([*runs.values()], s)), strict=True))
    memory = {name: timing.peak_memory(run, s.device) or 0 for name, run in runs.items()}
    figures = {f"{n}_seconds": t for n, t in times.items()} | {
        f"{n}_bytes": float(m) for n, m in memory.items()
    }
    yield Finding(
        f"16-bit training is faster ({shape})",
        "Micikevicius et al. 2018, on tensor cores",
        f"{times['fp32'] / times['bf16']:.2f} times as fast",
        times["bf16"] < times["fp32"],
        figures,
    )
    ratio = memory["bf16"] / memory["fp32"] if memory["fp32"] else 0.0
    yield Finding(
        f"and needs about half the memory ({shape})",
        "Micikevicius et al. 2018",
        f"{ratio:.2f} of it" if ratio else "this system does not tell",
        (ratio < 0.75) if ratio else None,
        figures,
    )


def narrow_weights(s: Settings) -> Iterator[Finding]:
    shape = s.shape(64, 1, 512)
    for cell in (LSTM, GRU):
        runs = _in_two_dtypes(cell, shape, "inference", s)
        wide, narrow = map(_median, _side_by_side([*runs.values()], s))
        yield Finding(
            f"one sequence takes less time with 16-bit weights ({cell} {shape} inference)",
            "Diamos et al. 2016: of few sequences, every step is bound by reading the weights",
            f"{wide / narrow:.2f} times as fast",
            narrow < wide,
            {"fp32": wide, "bf16": narrow},
        )


def _in_two_dtypes(cell: Cell, shape: Shape, mode: str, s: Settings) -> dict[str, Callable[[], Any]]:
    runs = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        trio = make_trio(cell, shape, dtype, s.device, 0)
        runs[name] = partial(call, trio.ours, trio.inputs, mode)
    return runs


def fused_against_loop(s: Settings) -> Iterator[Finding]:
    shape = s.shape(128, 1, 128)
    for cell in CELLS:
        trio = make_trio(cell, shape, torch.float32, s.device, 0)
        for mode in ("inference", "training"):
            loop = peers.PEERS["python loop"].make(cell, shape, trio, mode)
            slow, fast = map(_median, _side_by_side([loop, partial(call, trio.ours, trio.inputs, mode)], s))
            yield Finding(
                f"a fused loop is at least ten times as fast as a Python loop ({cell} {shape} {mode})",
                "what fused recurrent kernels are written for; Appleyard et al. 2016",
                f"{slow / fast:.1f} times",
                slow >= 10 * fast,
                {"loop": slow, "fused": fast},
            )


def truncated(s: Settings) -> Iterator[Finding]:
    """Back-propagation through windows of a sequence: the state goes on, the gradient does not."""
    shape, windows = s.shape(1024, 8, 128), 8
    trio = make_trio(LSTM, shape, torch.float32, s.device, 0)
    weights = list(trio.ours.parameters())

    def run(parts: int) -> list[Tensor]:
        state: Any = tuple(t.detach() for t in trio.inputs.state)
        total = [torch.zeros_like(w) for w in weights]
        xs, dys = trio.inputs.x.detach().chunk(parts), trio.inputs.dy.chunk(parts)
        for x, dy in zip(xs, dys, strict=True):
            y, state = trio.ours(x, state)
            for t, g in zip(total, torch.autograd.grad(y, weights, dy), strict=True):
                t += g
            state = tuple(t.detach() for t in state)
        return total

    whole, cut = partial(run, 1), partial(run, windows)
    times = [*map(_median, _side_by_side([whole, cut], s))]
    memory = [timing.peak_memory(c, s.device) for c in (whole, cut)]
    figures = dict(zip(("whole_seconds", "windows_seconds"), times, strict=True))
    source = "Williams & Peng 1990"
    told = memory[0] is not None and memory[1] is not None and memory[0] > 0
    ratio = (memory[1] or 0) / memory[0] if told and memory[0] else 0.0
    if told:
        figures |= {"whole_bytes": float(memory[0] or 0), "windows_bytes": float(memory[1] or 0)}
    yield Finding(
        f"truncated back-propagation, {windows} windows, needs a fraction of the memory ({shape})",
        source,
        f"{ratio:.2f} of it" if told else "this system does not tell",
        (ratio < 0.5) if told else None,
        figures,
    )
    yield Finding(
        f"and costs about the same time ({shape})",
        source,
        f"{times[1] / times[0]:.2f} of it",
        times[1] < 1.25 * times[0],
        figures,
    )


CLAIMS: dict[str, Callable[[Settings], Any]] = {
    "parameters": parameters,
    "gru": gru_against_lstm,
    "precision": mixed_precision,
    "weights": narrow_weights,
    "loop": fused_against_loop,
    "truncated": truncated,
}


def measure(names: list[str], settings: Settings) -> Iterator[Finding]:
    for name in names:
        found = CLAIMS[name](settings)
        yield from [found] if isinstance(found, Finding) else found


def show(findings: list[Finding], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("claim", "source", "here"):
        table.add_column(title)
    words = {True: "[green]so[/]", False: "[yellow]not so[/]", None: "cannot tell"}
    for f in findings:
        table.add_row(f.claim, f.source, f"{words[f.holds]}: {f.found}")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.split("\n\n")[1])
    parser.add_argument("--only", choices=CLAIMS, action="append", help="some of them, repeatable")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each measurement (default: 4)")
    parser.add_argument("--quick", action="store_true", help="small sizes: for tests of this command")
    parser.add_argument("--device", type=torch.device, help="cpu or cuda; by default cuda, if there is one")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device, options.seconds, options.quick)
    findings = list(measure(options.only or list(CLAIMS), settings))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150
    show(findings, console)
    if options.out:
        environment = report.environment(device, 0, None)
        report.write_json(options.out, {"environment": environment, "claims": [asdict(f) for f in findings]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
