"""The mutation test: without any one of their ordering operations, the kernels must be found to be wrong.

An *operation* is a function of csrc/cuda/primitives that carries its place. A *site* is a call of one in the
kernels. It is mutated in every kernel that runs it: left out, and, where the operation does something beside
ordering memory, weakened to that: threads still meet in a barrier, a flag still gets its value, a store
still arrives, a wait still waits, but what was written before need not be seen after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .emulator import SHAPES, Call, Kernel, run

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# What the emulator is asked for that orders no memory: it needs no place.
ORDERLESS = {"thread_index", "block_index", "threads_of_block", "shared_memory", "cluster_rank"}
ORDERLESS |= {"copy_async", "mma"}


class ScanError(Exception):
    """The sources are not as this scan needs them."""


def operations(primitives: Path) -> set[str]:
    """The functions that carry their place: those that order memory."""
    found = set()
    for header in sorted(primitives.glob("*.h")):
        text = header.read_text()
        for name, arguments, body in re.findall(
            r"inline \w+ (\w+)\(([^{;]*)\) (\{\n.*?\n\}|\{[^\n]*\})", text, re.S
        ):
            called = set(re.findall(r"emulator::(\w+)\(", body))
            if "Site site = Site::current()" in arguments:
                found.add(name)
            elif called - ORDERLESS:
                raise ScanError(f"{header.name}: {name} calls {called - ORDERLESS} without a place")
    if not found:
        raise ScanError(f"no operation in {primitives}")
    return found


def _blanked(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def scan(folder: Path = CUDA) -> dict[str, str]:
    """The operation at every site, ``file.h:line``, of the kernels in that folder."""
    call = re.compile(rf"\b({'|'.join(sorted(operations(folder / 'primitives')))})\s*\(")
    sites: dict[str, str] = {}
    for source in sorted([*folder.glob("*.h"), *folder.glob("*.cuh")]):
        text = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', _blanked, source.read_text(), flags=re.S)
        for match in call.finditer(text):
            site = f"{source.name}:{text.count(chr(10), 0, match.start()) + 1}"
            if site in sites:
                raise ScanError(f"two operations at {site}: each needs a line of its own")
            sites[site] = match[1]
    return sites


@dataclass(frozen=True)
class Mutant:
    kernel: Kernel
    site: str
    operation: str
    weakened: bool
    impatient: bool  # run only where a wait was given up

    def __str__(self) -> str:
        return (
            f"{self.kernel} {'with a weaker' if self.weakened else 'without'} {self.operation} at {self.site}"
        )


def base(kernel: Kernel) -> Call:
    """The run that is mutated: both directions, more steps than buffers, several warps and blocks."""
    return Call(kernel, SHAPES[kernel.schedule][0])


def attempts(mutant: Mutant) -> Iterator[Call]:
    """Runs that may find it, those first that are cheap and likely to."""
    call = base(mutant.kernel).with_(without=mutant.site, weakened=mutant.weakened)
    race = call.with_(flavour="tsan")
    if not mutant.impatient:
        if not mutant.weakened:
            yield call.with_(order="random")
            yield call.with_(seeds=4)
        yield race.with_(order="random")
        yield race.with_(seeds=2)
        if mutant.weakened:
            yield call.with_(seeds=4)
    yield call.with_(seeds=16, impatient=True)
    yield call.with_(seeds=4, flavour="asan")
    yield call.with_(seeds=4, flavour="asan", impatient=True)


def mutants(kernel: Kernel) -> list[Mutant]:
    """All of a kernel, those included that only a block whose patience ended runs.

    Raises:
        ValueError: the kernel is found to be wrong as it is.
    """
    found: dict[tuple[str, bool], Mutant] = {}
    for call in (base(kernel), base(kernel).with_(seeds=4, impatient=True)):
        outcome = run(call.with_(list_sites=True))
        if outcome.finding:
            raise ValueError(f"not mutated: {outcome}")
        for site in outcome.sites:
            for weakened in (False, True) if site["weakens"] else (False,):
                mutant = Mutant(kernel, site["site"], site["operation"], weakened, call.impatient)
                found.setdefault((mutant.site, weakened), mutant)
    return list(found.values())


def verdict(mutant: Mutant) -> str:
    """How it is found to be wrong; empty: it survives."""
    for call in attempts(mutant):
        if finding := run(call).finding:
            return f"{finding}, a wait given up" if call.impatient else finding
    return ""
