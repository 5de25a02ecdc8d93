"""Checks, stages made of them, and the records they leave."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fusedrnn.bench.timing import Deadline

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
NEVER_CAME = "that never came"  # in what the ops raise once a kernel's patience ended

Record = dict[str, Any]  # of a check: "check", "verdict", "why", "seconds", and its figures


class Failed(Exception):
    """A result is wrong; ``figures`` go into the record all the same."""

    def __init__(self, why: str, **figures: Any) -> None:
        super().__init__(why)
        self.figures = figures


class NotRun(Exception):
    """A check that has no meaning here, and why."""


class Settings(NamedTuple):
    """What is checked. ``backend`` has the kernels: ``cuda``, or ``emulator`` for CPU tensors."""

    device: torch.device
    backend: str
    quick: bool
    seed: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Context:
    """What a running check knows: ``broken`` names the schedules of which a launch has hung in this run."""

    deadline: Deadline
    broken: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Check:
    """One entry of a stage.

    Attributes:
        name: unique in its stage.
        run: does the work and returns figures for the record; raises if something is wrong.
        schedule: what it forces; the check is not run once a launch of that schedule has hung.
        facts: what the record holds however the check ends.
        patience: seconds after which a supervisor takes it for hung.
        alone: whether it could spoil the process for others.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    schedule: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    patience: float = 60.0
    alone: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        seconds: how long it takes on an H200; its share of the time is measured by it.
        checks: what it consists of; cheap, and the same in every process.
        show: prints its table.
        needs_gpu: whether it means nothing elsewhere.
        supervised: whether its checks run kernels in this process, and so may hang or kill it.
    """

    name: str
    title: str
    seconds: float
    checks: Callable[[Settings], Sequence[Check]]
    show: Callable[[Sequence[Record], Console], None]
    needs_gpu: bool = False
    supervised: bool = True


def not_run(name: str, why: str) -> Record:
    return {"check": name, "verdict": NOT_RUN, "why": why, "seconds": 0.0}


def failed(name: str, why: str, seconds: float = 0.0, **figures: Any) -> Record:
    return {"check": name, "verdict": FAILED, "why": why, "seconds": seconds, **figures}


def run_check(check: Check, context: Context) -> Record:
    """Runs one check; whatever it raises ends up in the record."""
    return check.facts | _run(check, context)


def _run(check: Check, context: Context) -> Record:
    if context.deadline.left <= 0:
        return not_run(check.name, "the stage's share of the time is used up")
    if check.schedule in context.broken:
        return not_run(check.name, f"a launch of {check.schedule} has hung before")
    start = time.monotonic()
    try:
        figures = check.run(context)
    except NotRun as reason:
        return not_run(check.name, str(reason))
    except Failed as error:
        record = failed(check.name, str(error), time.monotonic() - start, **error.figures)
    except Exception as error:  # of whatever kind: it fails this check, and the next are still worth having
        why = "".join(traceback.format_exception_only(error)).strip()
        place = traceback.extract_tb(error.__traceback__)[-1]
        record = failed(check.name, why, time.monotonic() - start, at=f"{place.filename}:{place.lineno}")
        if NEVER_CAME in why and check.schedule:
            context.broken.add(check.schedule)
    else:
        seconds = time.monotonic() - start
        record = {"check": check.name, "verdict": PASSED, "why": "", "seconds": seconds, **figures}
    return record


def run_checks(checks: Sequence[Check], context: Context) -> Iterator[Record]:
    for check in checks:
        yield run_check(check, context)
