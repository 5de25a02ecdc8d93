"""Which schedule runs a pass: what FUSEDRNN_SCHEDULE demands, what was fastest, or the planner's choice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import env
from .call import Call, capturing
from .plan import INTERPRETED, Device, Plan, Problem, choose, device_limits

_TIMED_STEPS = 32
_log = logging.getLogger(__name__)

# What was timed best, by device and problem: kept for the life of the process.
_best: dict[tuple, Plan | None] = {}


def run(call: Call, backward: bool, run_by: Callable[[Plan | None, int], Any]) -> Any:
    """Runs a pass by a schedule. ``run_by(plan, steps)`` runs its first steps; no plan stands for stepwise.

    Raises:
        RuntimeError: FUSEDRNN_SCHEDULE demands what cannot be.
    """
    candidates = _candidates(call, backward)
    if len(candidates) > 1 and call.x.is_cuda:
        key = (call.x.device, call.cell.name, call.dtype, call.tf32, call.packed, _problem(call, backward))
        if key in _best:
            candidates = [_best[key], *candidates]
        elif not (
            capturing(call.x) or torch.are_deterministic_algorithms_enabled()
        ):  # timing waits for the device, and picks by chance between plans that round differently
            _best[key] = _fastest(candidates, lambda plan: run_by(plan, min(call.T, _TIMED_STEPS)))
            candidates = [_best[key], *candidates]
    for plan in candidates[:-1]:
        try:
            return run_by(plan, call.T)
        except triton.runtime.errors.OutOfResources as error:
            _say_once(f"{describe(call, backward)}: {plan} does not fit this device ({error})")
    return run_by(candidates[-1], call.T)


def describe(call: Call, backward: bool) -> str:
    return f"{call.cell.name} {'backward' if backward else 'forward'}"


def _candidates(call: Call, backward: bool) -> list[Plan | None]:
    return choose(_problem(call, backward), _device(call.x), env.schedule(), describe(call, backward))


def _problem(call: Call, backward: bool) -> Problem:
    return Problem.of(
        call.cell,
        call.dtype,
        backward=backward,
        tf32=call.tf32,
        T=call.T,
        N=call.N,
        B=call.B,
        H=call.H,
        projected=call.projected,
    )


def _device(x: Tensor) -> Device:
    return device_limits(x.device.index) if x.is_cuda else INTERPRETED


def _fastest(candidates: list[Plan | None], run_by: Callable[[Plan | None], Any]) -> Plan | None:
    times = {}
    for plan in candidates:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            for _ in plan.bounds if plan else (None,):
                run_by(plan)  # compiles, again while registers are spilled
            start.record()
            for _ in range(3):
                run_by(plan)
            end.record()
        except triton.runtime.errors.OutOfResources:
            continue
        end.synchronize()
        times[plan] = start.elapsed_time(end)
    return min(times, key=lambda plan: times[plan]) if times else None


@cache
def _say_once(line: str) -> None:
    _log.warning(line)


# What a persistent kernel writes if its patience ends, and the launch that may have written it.
_status: dict[torch.device, Tensor] = {}
_launched: dict[torch.device, str] = {}


def status_of(call: Call, backward: bool, plan: Plan) -> Tensor:
    """The word of host memory for a launch: set if a program waited for one that never came."""
    device = call.x.device
    if device not in _status:
        if capturing(call.x):  # pinned memory cannot be allocated then
            raise RuntimeError(
                f"the first call of a persistent kernel on {device} cannot be captured in a CUDA graph: "
                "run it once before"
            )
        _status[device] = torch.zeros(1, dtype=torch.int32, pin_memory=call.x.is_cuda)
    _launched[device] = f"{describe(call, backward)}, {plan}"
    return _status[device]


def check_earlier_launches(x: Tensor) -> None:
    """Raises if a launch on the device of x failed that nobody was told of: they return before they end."""
    status = _status.get(x.device)
    if status is not None and status.item():
        status.zero_()
        raise RuntimeError(
            f"a persistent kernel ({_launched[x.device]}) waited for a program that never came; the results "
            f"of that call are void; set {env.SCHEDULE}=stepwise"
        )
