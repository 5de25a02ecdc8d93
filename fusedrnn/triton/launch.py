"""Runs a pass over a sequence: by launches of a persistent kernel, or step by step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward import persistent_backward
from .call import Call, capturing, columns, multiply
from .forward import persistent_forward
from .plan import Plan
from .schedule import status_of
from .sequence import ONE_STEP
from .stepwise import previous_rows, step_backward, step_forward

_RECURRENCES = 30  # of a launch: their directions are the bits of a number
_BLOCK = 1024  # elements of a program of the stepwise kernels
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass
class Forward:
    """Tensors of a forward pass. ``kept[0]``: h before its projection; the others: states of all steps."""

    gx: Tensor  # [rows, N, G, H]
    y: Tensor  # [rows, N, P]
    kept: list[Tensor | None]  # [rows, N, H]


@dataclass
class Backward:
    """Tensors of a backward pass. ``gx``, ``gh``: what gates are computed from again, where needed."""

    gx: Tensor | None  # [rows, N, G, H]
    gh: Tensor | None  # [rows, N, G, H]
    h_previous: Tensor  # [rows, N, P]: the h that each row's step started from
    y: Tensor  # [rows, N, P]
    kept: list[Tensor | None]  # as the forward left them
    dy: Tensor | None  # [rows, N, P]
    dfinal: list[Tensor]
    dgx: Tensor  # [rows, N, G, H]
    dgh: Tensor  # [rows, N, G, H]; dgx for a cell whose gates share their gradient
    dprojected: Tensor | None  # [rows, N, P]: gradient of the projected h of each step


def device_of(x: Tensor) -> Any:
    """A context in which the device of x is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(call: Call, f: Forward, plan: Plan | None, steps: int) -> list[Tensor]:
    """Runs the first steps, fills in y and kept, and returns the states they end in."""
    if plan is None:
        return _forward_by_steps(call, f, steps)
    arguments = {
        "gx": f.gx,
        "h0": call.state[0].contiguous(),
        "kept": tuple(f.gx if k is None else k for k in f.kept),
        "y": f.y,
        "CELL": call.forward,
        "KEEP": any(k is not None for k in f.kept),
    }
    return _launch(call, plan, False, persistent_forward, steps, call.state, arguments)


def backward(call: Call, p: Backward, plan: Plan | None, steps: int) -> list[Tensor]:
    """Runs the first steps, fills in dgx, dgh and dprojected, and returns the gradients they end in."""
    if plan is None:
        return _backward_by_steps(call, p, steps)
    # What is not there is not read: any pointer stands for it.
    arguments = {
        "gx": p.dgx if p.gx is None else p.gx,
        "gh": p.dgx if p.gh is None else p.gh,
        "state0": tuple(s.contiguous() for s in call.state),
        "h_previous": p.h_previous,
        "y": p.y,
        "kept": tuple(p.y if k is None else k for k in p.kept),
        "dy": p.y if p.dy is None else p.dy,
        "dgx": p.dgx,
        "dgh": p.dgh,
        "CELL": call.backward,
        "SHARED": call.cell.shares_gates,
        "RECOMPUTE": p.gx is not None,
        "HAS_DY": p.dy is not None,
    }
    return _launch(call, plan, True, persistent_backward, steps + 1, p.dfinal, arguments)


def _launch(
    call: Call,
    plan: Plan,
    is_backward: bool,
    kernel: Any,
    steps: int,
    initial: list[Tensor],
    arguments: dict[str, Any],
) -> list[Tensor]:
    cooperative = plan.slices > 1
    one_step = ONE_STEP.value and cooperative
    given = [s.to(call.compute, copy=True).contiguous() if one_step else s.contiguous() for s in initial]
    left = given if one_step else [torch.empty_like(s) for s in given]
    tiles = -(-call.B // plan.block_b)
    arguments |= _weights(call) | {
        "carried_in": tuple(given),
        "carried_out": tuple(left),
        "steps": call.steps,
        "counters": torch.zeros(call.N * tiles, dtype=torch.int32, device=call.x.device),
        "status": status_of(call, is_backward, plan),
        "slices": plan.slices,
        "T": call.T,
        "B": call.B,
        "H": call.H,
        "N": call.N,
        "G": call.G,
        "S": call.S,
        "A": _TYPES[call.compute],
        "PACKED": call.packed,
        "ALONE": plan.slices == 1,
        "IN_BLOCK": plan.exchange == "block",
        "CHUNKS": plan.chunks,
        "BLOCK_B": plan.block_b,
        "BLOCK_U": plan.block_u,
        "BLOCK_K": plan.block_k,
        "STAGES": plan.stages,
        "PRECISION": "tf32" if call.tf32 else "ieee",
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        "launch_cooperative_grid": cooperative,
    }
    # What decides how the kernel is compiled: Triton knows of a size whether it is 1 or divisible by 16.
    known = (call.B == 1, call.B % 16 == 0, call.N == 1, call.N % 16 == 0, call.H)
    sizes = (*known, call.dtype, call.x.device, call.cell.name, plan._replace(at_once=0))
    flags = tuple(value for value in arguments.values() if isinstance(value, bool | str))
    spills = _spills.setdefault((is_backward, sizes, flags), {})
    bound = bound_to_run(plan.bounds, spills, call)
    arguments["maxnreg"] = bound or None
    for first_n, count, reverse in _recurrences(call):
        for first in range(0, count * tiles, plan.at_once):
            grid = (min(plan.at_once, count * tiles - first) * plan.slices,)
            for step in range(0, steps, 1 if one_step else steps):
                end = step + 1 if one_step else steps
                compiled = kernel[grid](
                    first_step=step,
                    end_step=end,
                    first_group=first,
                    first_n=first_n,
                    reverse=reverse,
                    **arguments,
                )
                spills[bound] = getattr(compiled, "n_spills", 0)  # the interpreter has none
    return [s.to(call.dtype) for s in left]


# By what a persistent kernel was compiled for: the spills that each bound on its registers led to.
_spills: dict[tuple, dict[int, int]] = {}


def bound_to_run(bounds: tuple[int, ...], spills: dict[int, int], call: Call) -> int:
    """The bound under which nothing is spilled; until it is known, each call tries the next.

    Whatever is spilled, results are right. Inside a CUDA graph nothing new is compiled.
    """
    untried = [bound for bound in bounds if bound not in spills]
    if spills and (not untried or 0 in spills.values() or capturing(call.x)):
        return min(spills, key=lambda bound: spills[bound])
    return untried[0]


def _weights(call: Call) -> dict[str, Any]:
    weight = call.stacked(call.weight_hh)
    bias_ih, bias_hh = call.stacked(call.bias_ih), call.stacked(call.bias_hh)
    return {
        "weight_hh": weight,
        "bias_ih": weight if bias_ih is None else bias_ih,
        "bias_hh": weight if bias_hh is None else bias_hh,
        "BIAS": bias_ih is not None,
    }


def _recurrences(call: Call) -> list[tuple[int, int, int]]:
    """Of each launch: its first recurrence, how many it has, and their directions as bits."""
    parts = []
    for first in range(0, call.N, _RECURRENCES):
        part = call.reverse[first : first + _RECURRENCES]
        parts.append((first, len(part), sum(1 << i for i, backwards in enumerate(part) if backwards)))
    return parts


def fill_previous(call: Call, y: Tensor, h_previous: Tensor) -> None:
    """The h that each row's step started from: y of the step before, or the initial h."""
    h0 = call.state[0].contiguous()
    for first_n, count, reverse in _recurrences(call):
        grid = (call.T * triton.cdiv(call.B * call.P, _BLOCK), count)
        previous_rows[grid](
            h0,
            y,
            h_previous,
            call.steps,
            first_n,
            reverse,
            call.T,
            call.B,
            call.P,
            call.N,
            call.packed,
            _BLOCK,
        )


class _Steps:
    """The rows of each step: where they begin and how many there are, in both directions at once."""

    def __init__(self, call: Call) -> None:
        self.call, self.counts = call, call.counts
        self.offsets = [0]
        for count in self.counts:
            self.offsets.append(self.offsets[-1] + count)

    def rows(self, n: int, s: int, backward: bool) -> slice:
        t = self.at(s, self.call.reverse[n] != backward)
        return slice(self.offsets[t], self.offsets[t + 1])

    def at(self, s: int, descending: bool) -> int:
        return self.call.T - 1 - s if descending else s

    def scalars(self, s: int, backward: bool) -> dict[str, int]:
        """Of step s, what a kernel is told: of forward and of reverse recurrences."""
        out: dict[str, int] = {}
        for name, descending in (("forward", backward), ("reverse", not backward)):
            t = self.at(s, descending)
            before = t + 1 if name == "reverse" else t - 1
            exists = 0 <= before < self.call.T
            out |= {f"row_{name}": self.offsets[t], f"count_{name}": self.counts[t]}
            if backward:
                out |= {
                    f"before_{name}": self.offsets[before] if exists else 0,
                    f"started_{name}": self.counts[before] if exists else 0,
                }
        return out


def _step_kernel(call: Call, kernel: Any, arguments: dict[str, Any]) -> Callable[[dict[str, int]], None]:
    arguments |= _weights(call)
    del arguments["weight_hh"]

    def run(scalars: dict[str, int]) -> None:
        most = max(scalars["count_forward"], scalars["count_reverse"])
        for first_n, count, reverse in _recurrences(call):
            kernel[(triton.cdiv(most * call.H, _BLOCK), count)](
                **arguments, **scalars, first_n=first_n, reverse=reverse, B=call.B, H=call.H, N=call.N,
                G=call.G, S=call.S, A=_TYPES[call.compute], PROJECTED=call.projected, BLOCK=_BLOCK,
            )  # fmt: skip

    return run


def _forward_by_steps(call: Call, f: Forward, steps: int) -> list[Tensor]:
    state = [
        s.to(call.compute if j else call.dtype, copy=True).contiguous() for j, s in enumerate(call.state)
    ]
    gh = call.empty(call.N, call.B, call.G * call.H, dtype=call.compute)
    arguments = {
        "gx": f.gx,
        "gh": gh,
        "state": tuple(state),
        "y": f.y,
        "kept": tuple(f.gx if k is None else k for k in f.kept),
        "CELL": call.forward,
        "KEEP": any(k is not None for k in f.kept[1:]),
    }
    step, of = _step_kernel(call, step_forward, arguments), _Steps(call)
    for s in range(steps):
        for n, weight in enumerate(call.weight_hh):
            rows = of.rows(n, s, False)
            count = rows.stop - rows.start
            multiply(gh[n, :count], state[0][n, :count], weight.t())
        step(of.scalars(s, False))
        for n, weight in enumerate(call.weight_hr):
            rows = of.rows(n, s, False)
            h = f.kept[0][rows, n] @ weight.t().to(call.compute)  # type: ignore[index]
            f.y[rows, n] = h
            state[0][n, : rows.stop - rows.start] = h
    return [s.to(call.dtype) for s in state]


def _backward_by_steps(call: Call, p: Backward, steps: int) -> list[Tensor]:
    N, B, H = call.N, call.B, call.H
    dstate = [d.to(call.compute, copy=True).contiguous() for d in p.dfinal]
    # A step's products leave `carried` for the step before it. That is the kernel's dh, unless a projection
    # stands between: then dy and the gradient of the final h are added here, not by the kernel.
    dh = call.x.new_zeros(N, B, H, dtype=call.compute)
    carried = dh
    if call.projected:
        carried, dstate[0] = dstate[0], torch.zeros_like(dh)
    dy = p.dy if p.dy is not None and not call.projected else None
    arguments = {
        "gx": p.dgx if p.gx is None else p.gx,
        "gh": p.dgx if p.gh is None else p.gh,
        "dh": dh,
        "state0": tuple(s.contiguous() for s in call.state),
        "h_previous": p.h_previous,
        "y": p.y,
        "kept": tuple(p.y if k is None else k for k in p.kept),
        "dy": p.y if dy is None else dy,
        "dstate": tuple(dstate),
        "dgx": p.dgx,
        "dgh": p.dgh,
        "CELL": call.backward,
        "SHARED": call.cell.shares_gates,
        "RECOMPUTE": p.gx is not None,
        "HAS_DY": dy is not None,
    }
    step, of = _step_kernel(call, step_backward, arguments), _Steps(call)
    for s in range(steps):
        for n, weight in enumerate(call.weight_hr):
            rows = of.rows(n, s, True)
            count = rows.stop - rows.start
            d = carried[n, :count] if p.dy is None else carried[n, :count] + p.dy[rows, n]
            p.dprojected[rows, n] = d  # type: ignore[index]
            torch.mm(d, weight.to(call.compute), out=dh[n, :count])
        step(of.scalars(s, True))
        for n, weight in enumerate(call.weight_hh):
            rows = of.rows(n, s, True)
            multiply(carried[n, : rows.stop - rows.start], columns(p.dgh[rows], n), weight)
    first = carried if call.projected else dh + dstate[0]
    return [d.to(call.dtype) for d in (first, *dstate[1:])]
