"""Chooses a backend for a problem: a pure function of the problem and of which backends are available."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .cells import CELLS

KERNELS = ("cuda", "triton", "cpu", "emulator")  # backends that are kernels of this package
_COMPILED = ("cuda", "cpu", "emulator")
_CAPABILITY = (8, 0)
_UNPACKED_ROWS = 8  # for so few the CPU kernels read the weights where they are (csrc/cpu/forward.h)
# What kernels do of the options of the modules.
_OPTIONS = {"cpu": ("peephole",)}
_STATE_GRADIENTS = ("cpu",)  # backends that differentiate the states of all steps
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """What the choice depends on. Sizes as in the dims legend: T, B, I, H, P (0: no projection).

    ``transformed``: inside transforms that only the reference has rules for. ``mapped``: inside those that
    our ops have rules for: vmap of ``torch.func``, and one of its gradients. ``compiling``: traced
    by torch.compile or torch.export. ``capability``: a CUDA device's compute capability. ``interpreted``:
    Triton's kernels run on the CPU. ``options``: what the recurrences do beyond their cell
    (:meth:`fusedrnn.variation.Variation.names`). ``all_states``: the states of all steps are wanted.
    ``one_step``: the call is a cell's.
    """

    cell: str
    device: str
    dtype: torch.dtype
    T: int
    B: int
    I: int
    H: int
    P: int
    reverse: tuple[bool, ...]
    training: bool
    packed: bool
    autocast: bool
    transformed: bool
    mapped: bool = False
    compiling: bool = False
    capability: tuple[int, int] | None = None
    interpreted: bool = False
    options: tuple[str, ...] = ()
    all_states: bool = False
    one_step: bool = False


class Plan(NamedTuple):
    """The chosen backend, and for every backend that was not chosen the reason."""

    backend: str
    rejected: dict[str, str]


def make_plan(problem: Problem, available: dict[str, str], forced: str | None = None) -> Plan:
    """Chooses the backend.

    Args:
        problem: the layer call.
        available: for every backend, why it is not available ("" if it is).
        forced: a backend that must serve the problem.

    Raises:
        RuntimeError: the forced backend cannot serve the problem; the message says why.
    """
    rejected: dict[str, str] = {}
    for backend in (forced,) if forced else _preference(problem):
        reason = available[backend] or cannot_serve(backend, problem)
        if not reason:
            return Plan(backend, rejected)
        rejected[backend] = reason
    raise RuntimeError(
        "; ".join(f"backend {name!r} cannot serve this call: {why}" for name, why in rejected.items())
    )


def cannot_serve(backend: str, problem: Problem) -> str:
    """Why the backend cannot serve the problem; empty if it can."""
    if backend in KERNELS:
        device = _device_of(backend, problem)
        if problem.device != device:
            return f"it serves {device} tensors, these are on {problem.device}"
        if problem.capability is not None and problem.capability < _CAPABILITY:
            return (
                "its kernels need the tensor cores and asynchronous copies of compute capability "
                f"{_CAPABILITY[0]}.{_CAPABILITY[1]}; this device has {problem.capability[0]}."
                f"{problem.capability[1]}"
            )
        if problem.dtype not in _FLOATING:
            return f"it has no kernel for {problem.dtype}"
        if problem.transformed:
            return "its ops have no rule for torch.func's gradients of gradients and for forward mode"
        cell = CELLS[problem.cell]
        if not (cell.compiled if backend in _COMPILED else cell.compiled or cell.triton):
            return f"it has no kernel for the cell {cell.name!r}"
        if missing := [name for name in problem.options if name not in _OPTIONS.get(backend, ())]:
            return f"its kernels have no {', '.join(missing)}"
        several = problem.all_states and cell.states > 1
        if problem.mapped and (problem.options or several):
            return "its ops have no rule for torch.func's vmap of options or of the states of all steps"
        if several and problem.training and backend not in _STATE_GRADIENTS:
            return "its backward takes no gradients of the states of all steps"
    if backend == "torch":
        if problem.options:
            return f"the built-in has no {', '.join(problem.options)}"
        if problem.all_states and CELLS[problem.cell].states > 1:
            return "the built-in keeps no states but h and the last"
        if not CELLS[problem.cell].builtin:
            return f"the built-in has no cell {problem.cell!r}"
        if problem.one_step and problem.P:
            return "the built-in's cells have no projection"
        if problem.reverse not in ((False,), (False, True)):
            return "the built-in runs one forward recurrence, or one forward and one reverse"
        if problem.dtype not in _FLOATING:
            return f"the built-in has no kernel for {problem.dtype}"
    return ""


def _device_of(backend: str, problem: Problem) -> str:
    """The type of device whose tensors the kernels of a backend take."""
    if backend == "triton":
        return "cpu" if problem.interpreted and problem.device == "cpu" else "cuda"
    return "cpu" if backend == "emulator" else backend


def _preference(problem: Problem) -> tuple[str, ...]:
    if problem.transformed:  # composed of operations that have every rule
        return ("reference",)
    if problem.mapped:  # the built-in would go through the examples one by one
        return ("cpu" if problem.device == "cpu" else "cuda", "triton", "reference")
    if problem.device == "cpu":
        return ("torch", "cpu", "reference") if _builtin_is_faster(problem) else ("cpu", "torch", "reference")
    return ("cuda", "triton", "torch", "reference")


def _builtin_is_faster(problem: Problem) -> bool:
    if problem.compiling:  # the choice must hold for every T and B, and the built-in would be unrolled
        return False
    if problem.packed or problem.autocast:  # under autocast the built-in has no fp16 LSTM on most CPUs
        return False
    if problem.P:  # which the built-in warns of, and runs slowly
        return False
    # A step repays neither packing the weights nor what is recorded, unless the built-in packs them as well.
    recorded = problem.training and problem.cell != "lstm"
    return problem.one_step or (problem.T == 1 and (problem.B > _UNPACKED_ROWS or recorded))
