"""How the Triton kernels may run a sequence: pure functions of the problem and the device.

A plan whose programs wait for one another has no more of them in a launch than the device has
multiprocessors, and is launched cooperatively: the driver starts all of them or none.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from .. import env
from ..cells import Cell

_ROWS = 16  # sequences of a program: the rows of a tensor-core product
_WARP_UNITS = 8  # and its columns, so many for each warp
_UNITS = (16, 32, 64)  # of a program that is one of several
_MOST_IN_BLOCK = 128
_MOST_HELD = 1024  # units of K: products with weights on chip are unrolled
# The compiler saves registers so that programs can share a multiprocessor, and spills for it; but they do not
# come to share one. Told so, it loads several chunks at once and spills too.
_REGISTERS = 255
_BOUNDS = (255, 0, 224, 192)
# Bytes of K that are multiplied at once where weights are read at every step: what a thread loads of all
# gates must fit its registers, since only aligned sizes are copied past them.
_READ_BYTES = 64
_ALIGNED = 16  # what sizes are divisible by that Triton takes to be aligned
_SINGLE_WARPS = 4  # at least, to share loads of single elements, each of which takes a register
_RESERVED = 12 << 10  # bytes of shared memory for operands and for changes of layout
_NEAR = 4.0  # a plan that the model expects to take longer, relative to the best, is not worth trying

# A model of a step in microseconds, there only to put plans in order. Rates are those of a Hopper
# multiprocessor from published measurements, times are estimates: none was measured by this project.
_STEP = {"block": 1.0, "grid": 3.0}  # pointwise part, and the hand-over
_SHARED_RATE, _L2_RATE = 218e3, 65e3  # bytes per microsecond and multiprocessor
_STEP_LAUNCH = 5.0  # of a kernel or a product
_PRODUCTS = {True: 1e6, False: 1e5}  # multiplications per microsecond and multiprocessor, with tensor cores


class Device(NamedTuple):
    multiprocessors: int
    shared_bytes: int  # that a program can have


INTERPRETED = Device(multiprocessors=132, shared_bytes=227 << 10)  # what the interpreter stands in for


@cache
def device_limits(index: int) -> Device:
    """Those of a CUDA device."""
    properties: Any = torch.cuda.get_device_properties(index)  # its stub lacks a field
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


class Problem(NamedTuple):
    """One pass over a sequence.

    Attributes:
        tensor_cores: its products are not of ieee fp32.
        double: it is of float64.
        projected: h has a projection.
        single_step: T is 1.
    """

    backward: bool
    gates: int
    element_bytes: int
    tensor_cores: bool
    N: int
    B: int
    H: int
    double: bool = False
    projected: bool = False
    single_step: bool = False

    @classmethod
    def of(
        cls,
        cell: Cell,
        dtype: torch.dtype,
        *,
        backward: bool,
        tf32: bool,
        T: int,
        N: int,
        B: int,
        H: int,
        projected: bool,
    ) -> Problem:
        """That of a layer call. ``tf32``: products of float32 may take tf32 operands."""
        tensor_cores, double = dtype != torch.float32 or tf32, dtype == torch.float64
        return cls(
            backward, cell.gates, dtype.itemsize, tensor_cores, N, B, H, double, projected, single_step=T == 1
        )


class Plan(NamedTuple):
    """A persistent schedule.

    Attributes:
        exchange: ``block``: h stays in the registers of one program. ``grid``: it goes through L2.
        at_once: groups of a launch; more are left to launches after it.
        slices: programs of a group.
        chunks: parts of K whose weights stay on chip, or 0: they are read at every step.
        block_b: sequences of a program.
        block_u: units of a program.
        block_k: units of K that are multiplied at once.
        stages: loads under way where weights are read at every step.
        warps: of a program.
        registers: of a thread, at most; 0: as many as the compiler likes. Where that spills, the others of
            ``bounds`` are tried.
    """

    exchange: str
    at_once: int
    slices: int
    chunks: int
    block_b: int
    block_u: int
    block_k: int
    stages: int
    warps: int
    registers: int = 0

    @property
    def bounds(self) -> tuple[int, ...]:
        """On the registers of a thread, in the order in which they are tried until nothing is spilled.

        What the compiler makes of a bound depends on its version, the device and the cell: the first is only
        the one that suits most.
        """
        return self.registers, *(bound for bound in _BOUNDS if bound != self.registers)

    def groups(self, problem: Problem) -> int:
        return problem.N * -(-problem.B // self.block_b)

    def bytes_held(self, problem: Problem) -> int:
        """Of weights, on chip, in a program."""
        return problem.gates * self.chunks * self.block_k * self.block_u * problem.element_bytes

    @property
    def name(self) -> str:
        """What FUSEDRNN_SCHEDULE demands it by."""
        return self.exchange if self.exchange == "block" else f"{self.exchange}:{self.block_u}"

    def __str__(self) -> str:
        weights = "on chip" if self.chunks else "from L2"
        share = f"{self.block_u} units of {self.block_b} sequences"
        return f"{self.exchange} of {self.slices} with {share} each, weights {weights}"


class Explanation(NamedTuple):
    """How a pass would run. Schedules and plans are named as FUSEDRNN_SCHEDULE demands them.

    Attributes:
        schedule: ``stepwise`` or ``persistent``.
        exchange: ``block`` or ``grid``; empty for the stepwise schedule.
        plan: the plan in words.
        tiles: its sizes: slices of a group, groups at once, sequences and units of a program, units of K that
            are multiplied at once, warps. Empty for the stepwise schedule.
        launches: of kernels, for the pass or, of the stepwise schedule, for a step, products included.
        bytes_on_chip: of weights, in the programs that run at once; 0 where they are read at every step.
        candidates: what the first such call on a GPU times, to keep the fastest; the first is the one above.
        rejected: for every other one why it was not chosen, and why the weights are not on chip.
    """

    schedule: str
    exchange: str
    plan: str
    tiles: dict[str, int]
    launches: int
    bytes_on_chip: int
    candidates: list[str]
    rejected: dict[str, str]


STEPWISE = "stepwise"
DEMANDS = (STEPWISE, "block", "grid", *(f"grid:{units}" for units in _UNITS))


def choose(problem: Problem, device: Device, demand: str | None, what: str) -> list[Plan | None]:
    """The plans worth trying, the planner's choice first. None stands for the stepwise schedule.

    Args:
        problem: the pass.
        device: what it runs on.
        demand: one of :data:`DEMANDS`, or None.
        what: the pass in words, for the message of an error.

    Raises:
        RuntimeError: the schedule demanded cannot be.
    """
    if demand is None:
        return plans(problem, device)
    if demand not in DEMANDS:
        listed = f"{', '.join(DEMANDS[:-1])} or {DEMANDS[-1]}"
        raise RuntimeError(f"{env.SCHEDULE}={demand}: choose {listed} (units of a program)")
    if demand == STEPWISE:
        return [None]
    considered = _considered(problem, device)
    asked = {name: found for name, found in considered.items() if demand in (name, name.partition(":")[0])}
    fitting: list[Plan | None] = [found for found in asked.values() if isinstance(found, Plan)]
    if not fitting:
        why = "; ".join(dict.fromkeys(map(str, asked.values())))
        raise RuntimeError(f"{env.SCHEDULE}={demand} cannot run {what}: {why}")
    return fitting


def plans(problem: Problem, device: Device) -> list[Plan | None]:
    """The plans worth trying, by the model the fastest first. None stands for the stepwise schedule."""
    if problem.single_step:  # it does not repay loading the weights
        return [None]
    found: list[Plan | None] = [*persistent_plans(problem, device), None]
    found.sort(key=lambda plan: cost(plan, problem, device))
    return [p for p in found if cost(p, problem, device) <= _NEAR * cost(found[0], problem, device)]


def explain(problem: Problem, device: Device, demand: str | None = None) -> Explanation:
    """What the planner chooses, and why not the others.

    Raises:
        RuntimeError: the schedule demanded cannot be.
    """
    candidates = choose(problem, device, demand, "this pass")
    best, considered = candidates[0], _considered(problem, device)
    rejected = {}
    for name, found in {**considered, STEPWISE: None}.items():
        if found == best:
            continue
        if isinstance(found, str):
            rejected[name] = found
        elif problem.single_step:
            rejected[name] = "a single step does not repay loading the weights"
        elif demand is not None:
            rejected[name] = f"{env.SCHEDULE}={demand}"
        else:
            ratio = cost(found, problem, device) / cost(best, problem, device)
            rejected[name] = f"by the planner's model it takes {ratio:.1f} times as long"
    if best is None:
        launches, on_chip, tiles = 1 + problem.N, 0, {}
    else:
        groups = best.groups(problem)
        launches = -(-groups // best.at_once)
        resident = min(groups, best.at_once, device.multiprocessors // best.slices)
        on_chip = best.bytes_held(problem) * best.slices * resident
        names = ("slices", "at_once", "block_b", "block_u", "block_k", "warps")
        tiles = {name: getattr(best, name) for name in names} | {"at_once": min(groups, best.at_once)}
        if not best.chunks:
            rejected["weights on chip"] = _why_not_held(problem, device, best.block_u)
    return Explanation(
        schedule=STEPWISE if best is None else "persistent",
        exchange="" if best is None else best.exchange,
        plan=str(best or "step by step"),
        tiles=tiles,
        launches=launches,
        bytes_on_chip=on_chip,
        candidates=[plan.name if plan else STEPWISE for plan in candidates],
        rejected=rejected,
    )


def persistent_plans(problem: Problem, device: Device) -> list[Plan]:
    """Every persistent plan that the device can run."""
    return [found for found in _considered(problem, device).values() if isinstance(found, Plan)]


def _considered(problem: Problem, device: Device) -> dict[str, Plan | str]:
    """Every persistent plan by its name: the plan, or why it cannot be."""
    p, why = problem, ""
    if p.double:
        why = "float64 runs step by step"
    elif p.projected:
        why = "a projection runs step by step"
    elif not p.B:
        why = "the batch is empty"
    elif p.H**2 >= 1 << 31 or p.N * p.B * p.gates * p.H >= 1 << 31:
        why = "offsets within the weights of a gate, or the gates of a step, would not fit 32 bits"
    if why:
        return dict.fromkeys(("block", *(f"grid:{units}" for units in _UNITS)), why)
    found = {"block": _in_block(p, device)}
    return found | {f"grid:{units}": _over_grid(p, device, units) for units in _UNITS}


def _in_block(p: Problem, device: Device) -> Plan | str:
    units = max(16, 1 << (p.H - 1).bit_length())
    bytes_held, fits = p.gates * units * units * p.element_bytes, device.shared_bytes - _RESERVED
    if not p.tensor_cores:
        return "ieee fp32 products are too slow for one program"
    if units > _MOST_IN_BLOCK:
        return f"H={p.H} is above the {_MOST_IN_BLOCK} units that a program's products are unrolled for"
    if bytes_held > fits:
        return f"the weights take {bytes_held >> 10} KiB of a program, {fits >> 10} are free"
    warps = min(8, units // _WARP_UNITS)
    return Plan("block", 1 << 20, 1, 1, _ROWS, units, units, 1, warps, _REGISTERS)


def _over_grid(p: Problem, device: Device, units: int) -> Plan | str:
    slices = -(-p.H // units)
    if slices > device.multiprocessors:
        return f"its {slices} programs wait for one another, and there are {device.multiprocessors} at once"
    # Fewer than units: Triton spreads warps over the longer side. Without tensor cores a thread has its rows
    # and columns of the operands in registers, of all gates.
    rows = 8 if units == 16 or (p.backward and not p.tensor_cores) else _ROWS
    if _why_not_held(p, device, units):
        block_k, chunks = _READ_BYTES // p.element_bytes if p.tensor_cores else 16, 0
    else:
        block_k = _held_block_k(p, units)
        chunks = -(-p.H // block_k)
    registers = 0 if chunks or (p.backward and not p.tensor_cores) else _REGISTERS
    # Products without tensor cores take longer than their loads, and each load of a single element that is
    # under way would need an address in registers.
    stages = 4 if p.tensor_cores and p.H % _ALIGNED == 0 else 1
    warps = units // _WARP_UNITS
    if p.H % _ALIGNED:
        warps = max(warps, _SINGLE_WARPS)
    plan = Plan("grid", 0, slices, chunks, rows, units, block_k, stages, warps, registers)
    return plan._replace(at_once=min(plan.groups(p), device.multiprocessors // slices))


def _held_block_k(p: Problem, units: int) -> int:
    if p.backward or p.H % _ALIGNED:  # of all gates, or element by element: as much as fits the registers
        return 32
    return 64 if units > 16 else 128


def _why_not_held(p: Problem, device: Device, units: int) -> str:
    """Why the weights of so many units cannot stay on chip; empty if they can."""
    if not p.tensor_cores:
        return "ieee fp32 products are not unrolled over all of K"
    if p.H % _ALIGNED and (p.element_bytes == 4 or units > 16):
        return f"H={p.H} is no multiple of {_ALIGNED}: loads of single elements would fill the registers"
    if p.H > _MOST_HELD:
        return f"H={p.H} is above the {_MOST_HELD} units of K that products are unrolled for"
    block_k = _held_block_k(p, units)
    held = p.gates * -(-p.H // block_k) * block_k * units * p.element_bytes
    fits = device.shared_bytes - _RESERVED
    return f"they take {held >> 10} KiB of a program, {fits >> 10} are free" if held > fits else ""


def cost(plan: Plan | None, problem: Problem, device: Device) -> float:
    """Microseconds of one step of all groups, as the model has it."""
    p = problem
    rate = _PRODUCTS[p.tensor_cores]
    if plan is None:
        return _STEP_LAUNCH * (p.N + 1) + p.N * p.B * p.gates * p.H**2 / (rate * device.multiprocessors)
    at_once = min(plan.at_once, device.multiprocessors // plan.slices)
    K = p.H * p.element_bytes
    step = _STEP[plan.exchange] + plan.block_b * plan.block_u * p.gates * p.H / rate
    step += p.gates * plan.block_u * K / (_SHARED_RATE if plan.chunks else _L2_RATE)
    if plan.exchange == "grid":
        step += plan.block_b * K * (p.gates if p.backward else 1) / _L2_RATE
    return step * -(-plan.groups(p) // at_once)
