"""Clocks, interleaved timing, the matrix product to measure against, and the memory a call needs."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]


class Spread(NamedTuple):
    """A median with the 10th and 90th percentiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Summarises at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1])


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


class Deadline:
    """A time budget that starts to run when it is made."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, negative once the budget is overdrawn."""
        return self._end - time.monotonic()


def clock(call: Call, device: torch.device) -> float:
    """Runs the call once and returns its seconds: wall time on a CPU, time between two events on a GPU."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    calls: Sequence[Call],
    device: torch.device,
    *,
    seconds: float,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 150,
    settle: float = 0.0,
) -> list[list[float]]:
    """Times the calls in turn, so that whatever else the machine does meets all of them alike.

    Every round has a time of each call; the order is rotated from round to round.

    Args:
        calls: what to time.
        device: where the calls run.
        seconds: when to stop, once ``min_rounds`` rounds are done.
        warmup: rounds that are not recorded.
        min_rounds: rounds that are recorded however long they take.
        max_rounds: rounds after which more would not tell more.
        settle: seconds for which each call is repeated in a round, twice at least; what counts is the median
            of the second half. Each is then measured as it runs by itself, with its code and data in the
            caches. Thread pools need it: the threads of a library wait for more work in a loop for a while
            and slow down the next, and after that it takes the system some time to give every thread a core
            of its own.

    Returns:
        For each call its seconds, one value per round: values of the same index were measured side by side.
    """
    samples: list[list[float]] = [[] for _ in calls]
    deadline = Deadline(seconds)
    with _no_collection():
        for _ in range(warmup):
            for call in calls:
                call()
        for i in range(max_rounds):
            if i >= min_rounds and deadline.left <= 0:
                break
            for j in range(len(calls)):
                k = (i + j) % len(calls)
                settled = Deadline(settle)
                times = [clock(calls[k], device)]
                while settled.left > 0 or len(times) < 1 + (settle > 0):
                    times.append(clock(calls[k], device))
                samples[k].append(statistics.median(times[len(times) // 2 :]))
    return samples


def captured(calls: Sequence[Call], device: torch.device) -> tuple[list[Call], str]:
    """On a GPU, the calls as replays of CUDA graphs, if all can be captured; and how they are timed."""
    if device.type != "cuda":
        return [*calls], "clock"
    replays: list[Call] = []
    for call in calls:
        try:
            graph, _ = capture(call)
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            return [*calls], f"events, since capture raised {error}"
        replays.append(graph.replay)
    return replays, "graph"


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call and what the call returned. Warmed up first, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Product(NamedTuple):
    """A large square matrix product, and its operations: what calls are measured against."""

    call: Call
    flop: int


def fastest_product(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Product:
    """The size with the most operations per second within ``seconds``: which it is depends on the machine."""
    measured: list[tuple[float, Product]] = []
    sizes = (4096, 8192) if device.type == "cuda" else (768, 1152, 1536)
    for size in sizes:
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        product = Product(partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * size**3)
        (times,) = interleave([product.call], device, seconds=seconds / len(sizes), min_rounds=3)
        measured.append((product.flop / min(times), product))
    return max(measured, key=lambda m: m[0])[1]


def cache_level(size: int) -> str:
    """The smallest of a core's caches that holds ``size`` bytes; empty where the system does not tell."""
    folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    try:
        caches = sorted(
            (int((f / "size").read_text().strip().removesuffix("K")) * 1024, int((f / "level").read_text()))
            for f in folders
            if (f / "type").read_text().strip() != "Instruction"
        )
    except (OSError, ValueError):
        return ""
    if not caches:
        return ""
    return next((f"L{level}" for held, level in caches if size <= held), "RAM")


def idle_cpus(seconds: float = 1.0) -> float | None:
    """How many CPUs had nothing to do during the next ``seconds``; None where the system does not tell.

    A parallel loop ends when its last thread does. If threads share a CPU with other work, each loop waits
    for the scheduler, and times grow tenfold and more: better to use the CPUs that are free.
    """
    try:
        before = _cpu_ticks()
        time.sleep(seconds)
        ticks = [after - then for after, then in zip(_cpu_ticks(), before, strict=True)]
    except OSError:
        return None
    return (os.cpu_count() or 1) * (ticks[3] + ticks[4]) / max(1, sum(ticks))


def set_threads(asked: int | None, idle: float | None) -> str:
    """Sets torch's CPU threads: as many as asked for, else its own choice where that many CPUs are idle.

    Args:
        asked: how many; none for the choice.
        idle: what :func:`idle_cpus` found.

    Returns:
        A warning if the machine is busy; else nothing.
    """
    usual = torch.get_num_threads()
    free = usual if idle is None else max(1, round(idle))
    torch.set_num_threads(asked or min(usual, free))
    if free >= usual:
        return ""
    return (
        f"The machine is busy, {idle:.1f} CPUs are idle: times with {torch.get_num_threads()} of {usual}"
        " threads (--threads chooses), worth less than on a quiet machine."
    )


def _cpu_ticks() -> list[int]:
    """Of all CPUs: user, nice, system, idle, iowait, irq, softirq, steal."""
    return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


CPU_MEMORY_METHOD = "growth of the process's resident set at its highest point during one call"
CUDA_MEMORY_METHOD = "growth of torch's allocated CUDA memory at its highest point during one call"


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that one call needs at its highest point beyond what is there before it.

    CPU: Linux's high-water mark of the process's resident memory, reset just before the call. It counts every
    touched page: tensors, the scratch buffers libraries allocate out of torch's sight, autograd's own nodes.
    The free pages of the C heap are handed back first, or a call would run in what an earlier one left
    behind. Run the call a few times before: its first run also loads code. The heap grows in steps of about
    0.1 MB, so a smaller difference says nothing.
    GPU: what torch's caching allocator handed out.

    Returns:
        None where the operating system keeps no such mark (it is Linux's).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _proc_status("VmRSS")
        call()
        return max(0, _proc_status("VmHWM") - before)
    except (AttributeError, OSError, TypeError):  # no glibc, no /proc, or a sandbox without the marks
        return None


def _proc_status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024
