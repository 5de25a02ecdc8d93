"""Writes docs/proof.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedrnn.lib import _testing
from tests import triton_proof
from tests.test_plan import DEVICES, persistent_pass

from .compilation import ROOT, Resources
from .emulator import PERSISTENT_KERNELS, STEPWISE_KERNELS, Kernel
from .mutation import Mutant
from .triton_kernels import Row, Version

RESULTS = ROOT / "benchmarks" / "results"
REFERENCE_B, REFERENCE_SIZES = 16, (1024, 512, 256, 128, 64)
NO_GPU = ("cpu", "emulator", "local")  # folders of other results
NOT_YET = "not yet"

INTRODUCTION = """\
# What is proven about the kernels without a GPU

Written by `make proof`; to change it, change what it is about. First of the CUDA kernels; those in
[Triton](#triton-kernels) stand at the end. {holds}

- **Compiled.** Every instantiation, by {compiler}, for {targets}.
  Registers, spills and stack, in bytes of a thread, are what `ptxas -v` says.
  Of {kernels} kernels, each compiled for each of these, {spilling} spill and {stacked} have a stack frame.
  Shared memory is that of a block in the plan for an H200, for B={B} and the largest H of {sizes}
  that has one; none is static.
- **Emulated.** The same sources, compiled for the CPU, with a fiber for each CUDA thread: under
  {schedules:,} seeded schedules, in guarded memory that holds NaN until it is written. Results are
  compared with a reference in double precision, step by step, and between schedules byte by byte.
  Some runs are under ThreadSanitizer, for which only the kernels' own barriers, flags and waits order
  anything; some under AddressSanitizer; and some lose patience: a bounded wait is given up at any
  time, and the kernel must still end, in bounds, and say so.
- **Mutated.** At each of the {sites} places where a kernel calls an operation that orders memory, the
  operation is left out and, if it does anything beside, weakened to that: threads still meet and
  values still arrive, but nothing that was written before need be seen after.
  {caught} of {mutants} mutants were caught: {percent} %.

What only a GPU can show is speed, and that the PTX does what its counterpart here does.

## Mutants

In how many kernels each was caught, of those that run the operation, and how. *Broken rule*: of a
barrier, an mbarrier, or a block that ends. A place that no kernel runs would be a failure.
"""


TRITON_TITLE = "## Triton kernels\n"
TRITON = """\
{title}
The same passes as Triton kernels, for GPUs that the CUDA kernels were not built for. {holds}

- **Compiled** ahead of time by {versions}, for {targets}: what every launch of inference and of a
  training step compiles, by every kind of plan; in bf16, tf32 and fp32, by the newest, by every plan.
  Inference keeps no states; cells of one state never do, and have one forward kernel. Where a kernel
  spills, it is compiled with other bounds on its registers, as calls do. Sizes are H = {sizes};
  of those that 16 does not divide, elements are loaded one by one. Of {count} kernels {stacked} have a
  stack, which is where spills would go.{absent}
- **Interpreted.** `make test` runs every schedule in Triton's interpreter against the reference, forward and
  backward; programs that would wait for one another run step by step there.

Registers of a thread, stack and shared memory are the largest of the plans compiled, as the binaries
have them. That programs which wait for one another do so by acquire and release was read from the PTX.

"""


@dataclass
class Proof:
    """What was found of the CUDA kernels.

    Attributes:
        compiler: its name and version.
        architectures: those compiled for.
        resources: of every kernel on each of them.
        schedules: how many each kernel ran under, correctly.
        sites: the operation at every place the scan of the sources found.
        verdicts: how each mutant was found to be wrong; empty if it was not.
        failures: what is not as it must be, in words.
    """

    compiler: str
    architectures: Sequence[str]
    resources: list[Resources] = field(default_factory=list)
    schedules: Counter[Kernel] = field(default_factory=Counter)
    sites: dict[str, str] = field(default_factory=dict)
    verdicts: dict[Mutant, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def score(self, kernel: Kernel) -> tuple[int, int]:
        """Of its mutants, how many were caught, and how many there are."""
        found = [how for mutant, how in self.verdicts.items() if mutant.kernel == kernel]
        return sum(map(bool, found)), len(found)


@dataclass
class TritonProof:
    """What was found of the Triton kernels.

    Attributes:
        versions: of Triton, also those that could not be had.
        rows: what each kernel needs.
        failures: what is not as it must be, in words.
    """

    versions: list[Version]
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def reference_plan(kernel: Kernel) -> tuple[int, int]:
    """The largest reference size for which an H200 has a plan with that exchange, and its shared memory."""
    pass_ = persistent_pass(kernel.cell, kernel.dtype, kernel.pass_ == "backward")
    for H in REFERENCE_SIZES:
        for plan in _testing.plan_persistent(pass_, 1, REFERENCE_B, H, DEVICES["H200"]):
            if plan.exchange.name == kernel.schedule:
                return H, plan.shared_bytes(pass_)
    raise ValueError(f"no plan for {kernel}")


def runs_on(kernel: Kernel | None, architecture: str) -> bool:
    """Whether a plan can choose it there: on a device without clusters, their kernels only trap."""
    return kernel is None or kernel.schedule != "cluster" or int(re.sub(r"\D", "", architecture)) >= 90


def gpu_dates(results: Path = RESULTS) -> dict[tuple[str, str, str], str]:
    """(schedule, cell, precision) -> date of the latest check on a GPU that passed in all its cases.

    Reads the records that a check on a GPU leaves, wherever they stand in ``<gpu>/<date>*.json``.
    """
    dates: dict[tuple[str, str, str], str] = {}
    files = [file for file in results.glob("*/*.json") if file.parent.name not in NO_GPU]
    for file in sorted(files, key=lambda file: file.name):
        date = re.match(r"\d{4}-\d\d-\d\d", file.name)
        verdicts: dict[tuple[str, str, str], set[str]] = {}
        for record in _records(json.loads(file.read_text())):
            key = (record["schedule"], record["cell"], record["precision"])
            verdicts.setdefault(key, set()).add(record["verdict"])
        dates |= {key: date[0] for key, found in verdicts.items() if date and found == {"passed"}}
    return dates


def _records(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if {"verdict", "schedule", "cell", "precision"} <= value.keys():
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _records(item)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _of_architectures(proof: Proof, found: list[Resources]) -> list[str]:
    """Registers, spills, stack and where it was compiled for, of one kernel."""
    by = {r.architecture: r for r in found if runs_on(r.kernel, r.architecture)}

    def each(name: str) -> str:
        values = [str(getattr(by[a], name)) if a in by else "–" for a in proof.architectures]
        return values[0] if len(set(values) - {"–"}) == 1 and name != "registers" else " / ".join(values)

    worst = {name: max((getattr(r, name) for r in by.values()), default=0) for name in ("spills", "stack")}
    return [
        each("registers"),
        str(worst["spills"]),
        str(worst["stack"]),
        " ".join(a for a in proof.architectures if a in by),
    ]


def _kernel_tables(proof: Proof) -> Iterator[str]:
    dates = gpu_dates()
    registers = "registers " + " / ".join(proof.architectures)
    found: dict[Kernel, list[Resources]] = {}
    for r in proof.resources:
        if r.kernel:
            found.setdefault(r.kernel, []).append(r)
    kernels = [k for k in (*PERSISTENT_KERNELS, *STEPWISE_KERNELS) if k in proof.schedules]
    for schedule, pass_ in dict.fromkeys((k.schedule, k.pass_) for k in kernels):
        rows = []
        for k in kernels:
            if (k.schedule, k.pass_) != (schedule, pass_):
                continue
            used, spills, stack, compiled = _of_architectures(proof, found.get(k, []))
            H, shared = reference_plan(k) if schedule != "stepwise" else (0, 0)
            caught, mutants = proof.score(k)
            rows.append(
                [
                    *(k.cell, k.dtype, used, spills, stack),
                    f"{-(-shared // 1024)} KiB, H={H}" if shared else "0",
                    compiled,
                    proof.schedules[k] or NOT_YET,
                    f"{caught} of {mutants}" if mutants else "nothing to mutate",
                    dates.get((schedule, k.cell, k.dtype), NOT_YET),
                ]
            )
        head = ["cell", "dtype", registers, "spills", "stack", "shared memory", "compiled for"]
        yield f"### {schedule.capitalize()} {pass_}\n"
        yield _table([*head, "schedules emulated", "mutants caught", "run on a GPU"], rows) + "\n"
    yield "### Helpers\n"
    yield "They belong to no cell. The emulator runs them with those that need them.\n"
    helpers: dict[str, list[Resources]] = {}
    for r in proof.resources:
        if not r.kernel:
            helpers.setdefault(r.name, []).append(r)
    rows = [[f"`{name}`", *_of_architectures(proof, helpers[name])] for name in sorted(helpers)]
    yield _table(["kernel", registers, "spills", "stack", "compiled for"], rows) + "\n"


def _site_table(proof: Proof) -> str:
    rows = []
    for site, operation in proof.sites.items():
        columns = []
        for weakened in (False, True):
            found = [how for m, how in proof.verdicts.items() if (m.site, m.weakened) == (site, weakened)]
            ways = ", ".join(f"{how} {n}" for how, n in sorted(Counter(found).items()) if how)
            counted = f"{sum(map(bool, found))} of {len(found)}"
            columns.append((f"{counted}: {ways}" if ways else counted) if found else "no such form")
        rows.append([f"`{site}`", f"`{operation}`", *columns])
    return _table(["place", "operation", "left out", "weakened"], rows)


_TRITON_ORDER = ("block", "grid, on chip", "grid, from L2", "stepwise")


def _triton(proof: TritonProof) -> Iterator[str]:
    names = sorted({r["triton"] for r in proof.rows})
    yield TRITON.format(
        title=TRITON_TITLE,
        holds=_holds(proof.failures),
        versions=" and ".join(f"Triton {name}" for name in names),
        targets=", ".join(f"sm_{a}" for a in triton_proof.ARCHITECTURES),
        count=len(proof.rows),
        stacked=sum(r["stack"] > 0 for r in proof.rows),
        sizes=", ".join(map(str, sorted(triton_proof.SIZES))),
        absent="".join(f"\n  Triton {v.name} could not be had: {v.why}." for v in proof.versions if v.why),
    )
    architectures = " / ".join(map(str, triton_proof.ARCHITECTURES))
    dates = gpu_dates()
    for kind in _TRITON_ORDER:
        rows = []
        of_kind = [r for r in proof.rows if r["kind"] == kind]
        for kernel, cell, dtype in dict.fromkeys((r["kernel"], r["cell"], r["dtype"]) for r in of_kind):
            found = [r for r in of_kind if (r["kernel"], r["cell"], r["dtype"]) == (kernel, cell, dtype)]
            registers = [
                " / ".join(
                    str(
                        max(
                            (r["registers"] for r in found if (r["triton"], r["architecture"]) == (name, a)),
                            default="–",
                        )
                    )
                    for a in triton_proof.ARCHITECTURES
                )
                for name in names
            ]
            rows.append(
                [
                    *(f"`{kernel}`", cell, dtype, *registers, max(r["stack"] for r in found)),
                    f"{-(-max(r['shared'] for r in found) // 1024)} KiB",
                    len({r["plan"] for r in found}),
                    dates.get((f"triton {kind.partition(',')[0]}", cell, dtype), NOT_YET),
                ]
            )
        head = ["kernel", "cell", "dtype", *(f"registers {architectures}, by {name}" for name in names)]
        yield f"### Triton: {kind}\n"
        yield _table([*head, "stack", "shared memory", "plans", "run on a GPU"], sorted(rows)) + "\n"


def _holds(failures: list[str]) -> str:
    lines = "".join(f"- {failure.splitlines()[0]}\n" for failure in failures)
    return f"**Not all of it holds:**\n\n{lines}" if failures else "All of it holds."


def text(cuda: Proof | None, triton: TritonProof | None, before: str = "") -> str:
    """The whole document. Of the kernels that nothing is given of, what was said ``before`` is kept."""
    first, title, last = before.partition(TRITON_TITLE)
    if cuda:
        first = "\n".join(_cuda(cuda)) + "\n"
    return first + ("\n".join(_triton(triton)) if triton else title + last)


def _cuda(proof: Proof) -> Iterator[str]:
    caught, mutants = sum(map(bool, proof.verdicts.values())), len(proof.verdicts)
    yield INTRODUCTION.format(
        holds=_holds(proof.failures),
        compiler=proof.compiler,
        targets=", ".join(f"sm_{a}" for a in proof.architectures),
        kernels=len({(r.name, r.kernel) for r in proof.resources}),
        spilling=len({(r.name, r.kernel) for r in proof.resources if r.spills}),
        stacked=len({(r.name, r.kernel) for r in proof.resources if r.stack}),
        B=REFERENCE_B,
        sizes=", ".join(map(str, REFERENCE_SIZES)),
        schedules=proof.schedules.total(),
        sites=len(proof.sites),
        caught=caught,
        mutants=mutants,
        percent=f"{100 * caught / max(mutants, 1):.4g}",
    )
    yield _site_table(proof)
    yield "\n## Kernels\n"
    yield from _kernel_tables(proof)
