"""The latencies that every floor of a step is made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import library
from .checks import Check, Context, NotRun, Record, Settings, Stage

SAMPLES, WARMUP = 7, 2
NOT_RESIDENT = "cannot keep its blocks resident"


def check_primitive(index: int, context: Context) -> dict[str, Any]:
    try:
        samples = [library.measure(index, i) for i in range(WARMUP + SAMPLES)][WARMUP:]
    except RuntimeError as error:
        if NOT_RESIDENT in str(error):
            raise NotRun(str(error)) from None
        raise
    return {"samples": [sample._asdict() for sample in samples]}


def check_clusters(context: Context) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "multiprocessors": properties.multi_processor_count,
        "clusters": {blocks: library.clusters_at_once(blocks) for blocks in (2, 4, 8, 16)},
    }


def primitive_checks(settings: Settings) -> list[Check]:
    if not settings.on_gpu:
        return []
    names = list(library.measurements())
    return [
        Check("clusters that fit", check_clusters),
        *(Check(name, partial(check_primitive, i)) for i, name in enumerate(names)),
    ]


def show_primitives(records: Sequence[Record], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("primitive")
    for name in ("cycles", "ns", "lowest–highest ns", "B/cycle", "GB/s"):
        table.add_column(name, justify="right")
    for r in records:
        if "samples" not in r:
            continue
        samples = [library.Sample(**sample) for sample in r["samples"]]
        if samples[0].bytes:
            per_cycle = statistics.median(s.bytes / s.cycles for s in samples)
            rate = statistics.median(s.bytes / s.nanoseconds for s in samples)
            table.add_row(r["check"], "", "", "", f"{per_cycle:.1f}", f"{rate:.1f}")
        else:
            times = [s.nanoseconds / s.operations for s in samples]
            cycles = statistics.median(s.cycles / s.operations for s in samples)
            spread = f"{min(times):.1f}–{max(times):.1f}"
            table.add_row(r["check"], f"{cycles:.1f}", f"{statistics.median(times):.1f}", spread, "", "")
    console.print(table)
    for r in records:
        if "clusters" in r:
            fits = ", ".join(f"{count} of {blocks} blocks" for blocks, count in r["clusters"].items())
            console.print(f"Clusters at once on {r['multiprocessors']} multiprocessors: {fits}.")


PRIMITIVES = Stage(
    "primitives", "Latencies of the primitives", 10, primitive_checks, show_primitives, needs_gpu=True
)
