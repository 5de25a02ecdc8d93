"""Stages run in a process that may die: a kernel that hangs or writes astray must not take the run with it.

A worker gets a line of JSON for each command and answers with one for each event, on a pipe of its own: a
check begins, its record, the rest needs a fresh process, the stage is at its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from fusedrnn.bench.timing import Deadline

from .checks import FAILED, Context, Record, Settings, Stage, failed, not_run, run_check

STARTING = 90.0  # seconds that a worker may take to load torch and answer
MOST_DEATHS = 6  # of workers in one stage, before the rest of it is given up


def serve(settings: Settings, stages: Mapping[str, Stage], commands: IO[str], events: IO[str]) -> None:
    """The worker: runs the checks that it is told to run, until there are no more commands."""

    def send(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    fresh = True
    for line in commands:
        command = json.loads(line)
        checks = stages[command["stage"]].checks(settings)
        context = Context(Deadline(command["seconds"]), set(command["broken"]))
        for index, check in enumerate(checks[command["first"] :], command["first"]):
            if check.alone and not fresh:
                send(restart=index)
                return
            known = {"name": check.name, "schedule": check.schedule, "facts": check.facts}
            send(begin=index, patience=check.patience, **known)
            record = run_check(check, context)
            send(record=record, broken=sorted(context.broken))
            fresh = False
            if check.alone or (record["verdict"] == FAILED and not _alive(settings)):
                send(restart=index + 1 if index + 1 < len(checks) else None)
                return
        send(end=True)


def _alive(settings: Settings) -> bool:
    """Whether the device still takes work from this process: after an illegal access it does not."""
    try:
        return bool(torch.ones(2, device=settings.device).sum().item() == 2)
    except RuntimeError:
        return False


class Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, arguments: list[str]) -> None:
        """Starts one; ``arguments`` are the command line's, ``--worker FD`` is added."""
        read, write = os.pipe()
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed by who ends the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check", *arguments, "--worker", str(write)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            text=True,
        )
        os.close(write)
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()

    def _listen(self, read: int) -> None:
        # Its last words may be cut short.
        with os.fdopen(read) as pipe, contextlib.suppress(json.JSONDecodeError):
            for line in pipe:
                self._events.put(json.loads(line))
        self._events.put(None)

    def ask(self, stage: str, first: int, seconds: float, broken: set[str]) -> None:
        command = {"stage": stage, "first": first, "seconds": seconds, "broken": sorted(broken)}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: the next event says so
            print(json.dumps(command), file=self._process.stdin, flush=True)

    def event(self, patience: float) -> dict[str, Any] | None:
        """The next event; None once the process has died.

        Raises:
            TimeoutError: there was none within ``patience`` seconds.
        """
        try:
            return self._events.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> str:
        """Ends the process and says how it ended, with the end of its output."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # there are no more commands
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
        try:
            ended = f"exit status {self._process.wait(20)}"
        except subprocess.TimeoutExpired:
            ended = "it cannot be killed"
        return f"{ended}; its output ends: {self.output()[-600:].strip() or 'there is none'}"

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()


class Supervisor:
    """Runs stages in workers, one after the other, replacing those that die."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._worker: Worker | None = None
        self.output: list[str] = []  # of workers that are gone

    def run(self, stage: Stage, context: Context) -> Iterator[Record]:
        """Yields a record for each check. ``context.broken`` grows with what has hung."""
        first: int | None = 0
        deaths = 0
        while first is not None:
            rest = f"{stage.name}, from check {first + 1} on"
            if first and context.deadline.left <= 0:
                yield not_run(rest, "the stage's share of the time is used up")
                return
            if deaths == MOST_DEATHS:
                yield failed(rest, f"given up, since {deaths} workers have died")
                return
            first, died = yield from self._run_from(stage, first, context)
            deaths += died

    def _run_from(
        self, stage: Stage, first: int, context: Context
    ) -> Generator[Record, None, tuple[int | None, bool]]:
        """Yields records until the stage or the worker ends.

        Returns:
            Where to go on, None if there is no more, and whether the worker has died.
        """
        worker = self._worker = self._worker or Worker(self._arguments)
        worker.ask(stage.name, first, context.deadline.left, context.broken)
        current: dict[str, Any] = {"begin": None, "name": f"{stage.name}, start of a worker"}
        while True:
            patience = current.get("patience", STARTING)
            try:
                event, why = worker.event(patience), "the process died"
            except TimeoutError:
                event, why = None, f"hung: no answer within {patience:.0f} s"
                if current.get("schedule"):
                    context.broken.add(current["schedule"])
            if event is None:
                yield current.get("facts", {}) | failed(current["name"], f"{why}; {self._end()}")
                return (None if current["begin"] is None else current["begin"] + 1), True
            if "end" in event:
                return None, False
            if "restart" in event:
                self._end()
                return event["restart"], False
            if "record" in event:
                context.broken |= set(event["broken"])
                yield event["record"]
                current = {"begin": current["begin"], "name": f"after {current['name']}"}
            else:
                current = event

    def _end(self) -> str:
        """Ends the worker, so that whatever comes next gets a fresh one."""
        if self._worker is None:
            return ""
        ended = self._worker.stop()
        self.output.append(self._worker.output())
        self._worker.log.close()
        self._worker = None
        return ended

    def close(self) -> None:
        self._end()
