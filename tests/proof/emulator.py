"""Calls the programs that run the CUDA kernels on the CPU: ``emulate`` and its two sanitized flavours."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import fusedrnn
from fusedrnn.cells import CELLS

Flavour = Literal["plain", "tsan", "asan"]

LIB = Path(fusedrnn.__file__).parent / "lib"
PROGRAMS: dict[Flavour, Path] = {
    "plain": LIB / "emulate",
    "tsan": LIB / "emulate_tsan",
    "asan": LIB / "emulate_asan",
}
PASSES = ("forward", "backward")
EXCHANGES = ("block", "cluster", "grid")
DTYPES = ("bf16", "fp16", "tf32", "fp32")
STEPWISE_DTYPES = ("bf16", "fp16", "fp32", "fp64")  # its kernels do not multiply: tf32 is fp32
ORDERS = 4  # in which fibers run: round robin, random, one block starved, one warp starved
SECONDS = 300  # a hundred times what the longest run takes

T = TypeVar("T")
R = TypeVar("R")


class EmulatorError(Exception):
    """A program was called wrongly, or did not end as a program of its kind does."""


class Kernel(NamedTuple):
    """One instantiation; ``schedule`` is an exchange, or ``stepwise``."""

    pass_: str
    schedule: str
    cell: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.schedule} {self.pass_} {self.cell} {self.dtype}"


PERSISTENT_KERNELS = tuple(
    Kernel(p, e, c, d) for p in PASSES for e in EXCHANGES for c in CELLS for d in DTYPES
)
STEPWISE_KERNELS = tuple(Kernel(p, "stepwise", c, d) for p in PASSES for c in CELLS for d in STEPWISE_DTYPES)


@dataclass(frozen=True)
class Shape:
    """Dims as in csrc/sequence.h, with the plan that runs them; what is 0 is left to the program.

    ``reverse``: recurrence N - 1 runs backwards, and every second before it.
    """

    T: int
    B: int
    N: int
    H: int
    reverse: int = 0
    packed: int = 0
    unit_tiles: int = 0
    k_splits: int = 0
    batch_tiles: int = 0
    slices: int = 0
    groups: int = 0

    @property
    def options(self) -> list[str]:
        return [
            word
            for f in fields(self)
            if (value := getattr(self, f.name))
            for word in (f"--{f.name.replace('_', '-')}", str(value))
        ]


# Each list: padded tails of every dim, both directions, T odd and even; several launches; a single step; and
# so many steps of K that the weights of some are in shared memory.
BLOCK_SHAPES = (
    Shape(T=5, B=5, N=2, H=27, reverse=1, packed=1, unit_tiles=2, k_splits=2),
    Shape(T=4, B=11, N=3, H=13, reverse=1, k_splits=3, batch_tiles=2, groups=2),
    Shape(T=1, B=1, N=1, H=16),
    Shape(T=2, B=17, N=1, H=90, unit_tiles=6),
    Shape(T=6, B=9, N=1, H=33, packed=1, unit_tiles=3, k_splits=2, batch_tiles=2),
)
CLUSTER_SHAPES = (
    Shape(T=5, B=5, N=2, H=27, reverse=1, packed=1, k_splits=2),
    Shape(T=4, B=11, N=3, H=45, reverse=1, k_splits=3, batch_tiles=2, slices=4, groups=2),
    Shape(T=1, B=1, N=1, H=20),
    Shape(T=2, B=9, N=1, H=150, unit_tiles=2, slices=8),
    Shape(T=6, B=9, N=1, H=61, packed=1, unit_tiles=2, k_splits=4),
)
GRID_SHAPES = (
    Shape(T=5, B=5, N=2, H=27, reverse=1, packed=1, k_splits=2),
    Shape(T=4, B=11, N=3, H=45, reverse=1, k_splits=3, batch_tiles=2, groups=2),
    Shape(T=1, B=1, N=1, H=20),
    Shape(T=2, B=9, N=1, H=150, unit_tiles=2),
    Shape(T=6, B=9, N=1, H=61, packed=1, unit_tiles=2, k_splits=4),
)
STEPWISE_SHAPES = (
    Shape(T=3, B=5, N=3, H=27, reverse=1, packed=1),
    Shape(T=2, B=1, N=1, H=1),
)
SHAPES = {
    "block": BLOCK_SHAPES,
    "cluster": CLUSTER_SHAPES,
    "grid": GRID_SHAPES,
    "stepwise": STEPWISE_SHAPES,
}


@dataclass(frozen=True)
class Call:
    """A run of a program: ``seeds`` schedules in each of the four orders, or in one of them.

    ``without`` is the ``file.h:line`` of an operation to leave out, or to weaken: to do in all but its
    ordering of memory. ``impatient`` lets any bounded wait be given up.
    """

    kernel: Kernel
    shape: Shape
    flavour: Flavour = "plain"
    seeds: int = 1
    order: str = ""
    without: str = ""
    weakened: bool = False
    impatient: bool = False
    list_sites: bool = False

    @property
    def command(self) -> list[str]:
        k = self.kernel
        schedule = ["--schedule"] if k.schedule == "stepwise" else ["--exchange"]
        words = [*schedule, k.schedule, "--pass", k.pass_, "--cell", k.cell, "--dtype", k.dtype]
        words += [*self.shape.options, "--seeds", str(self.seeds)]
        words += ["--order", self.order] if self.order else []
        words += ["--without", self.without] if self.without else []
        words += [
            f"--{name.replace('_', '-')}"
            for name in ("weakened", "impatient", "list_sites")
            if getattr(self, name)
        ]
        return [str(PROGRAMS[self.flavour]), *words]

    @property
    def schedules(self) -> int:
        return self.seeds * (1 if self.order else ORDERS)

    def with_(self, **changes: Any) -> Call:
        return replace(self, **changes)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        runs: what each schedule left, as the program printed it.
        sites: ``site``, ``operation`` and ``weakens`` of each operation that orders memory and was run.
        finding: how a fault was found, or nothing if none was.
        report: what was found, in the program's own words.
    """

    command: list[str]
    runs: list[dict[str, Any]] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    finding: str = ""
    report: str = ""

    def __str__(self) -> str:
        called = " ".join([Path(self.command[0]).name, *self.command[1:]])
        said = self.report.strip("=\n")  # a sanitizer's begins with a line of these
        return f"{self.finding or 'ok'}: {called}: {said}"


def run_program(command: list[str]) -> Outcome:
    """Runs a program to its end.

    Raises:
        EmulatorError: it was called wrongly, crashed, or did not end.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise EmulatorError(f"{' '.join(command)} did not end in {SECONDS} s") from None
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    runs = [line for line in lines if "ok" in line]
    sites = [site for line in lines for site in line.get("sites", [])]
    if done.returncode == 0:
        return Outcome(command, runs, sites)
    if done.returncode == 66 and "WARNING: ThreadSanitizer" in done.stderr:  # else it could not begin
        return Outcome(command, runs, sites, "race", done.stderr)
    if done.returncode == 1 and "ERROR: AddressSanitizer" in done.stderr:
        return Outcome(command, runs, sites, "sanitizer", done.stderr)
    if done.returncode == 1 and runs and not runs[-1]["ok"]:
        last = runs[-1]
        report = " ".join([last["error"] or "", *last["expired"]]).strip()
        return Outcome(command, runs, sites, _kind(last), report)
    raise EmulatorError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")


def run(call: Call) -> Outcome:
    return run_program(call.command)


def _kind(last: dict[str, Any]) -> str:
    """How the last of a program's runs was found to be wrong."""
    error = last["error"] or ""
    if last["given_up"] or last["expired"]:
        return "endless wait"
    if error.startswith("deadlock"):
        return "deadlock"
    if "outside the bounds" in error or "its shared memory" in error:
        return "guard"
    if ", not " in error or "not that of the first run" in error:
        return "wrong result"
    return "broken rule"  # of a barrier, an mbarrier, a launch


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The function's results, in order, with as many calls under way as there are cores."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(function, items)
    finally:  # at an error, or where no more is asked for, what has not begun is dropped
        pool.shutdown(cancel_futures=True)
