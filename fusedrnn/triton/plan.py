"""How the Triton kernels may run a sequence: pure functions of the problem and the device.

A plan whose programs wait for one another has no more of them in a launch than the device has
multiprocessors, and is launched cooperatively: the driver starts all of them or none.
"""

from __future__ import annotations

from typing import NamedTuple

_ROWS = 16  # sequences of a program: the rows of a tensor-core product
_WARP_UNITS = 8  # and its columns, so many for each warp
_MOST_HELD = 1024  # units of K: products with weights on chip are unrolled
# The compiler saves registers so that programs can share a multiprocessor, and spills for it; but they do not
# come to share one. Told so, in a forward pass of several chunks it loads all of them at once and spills too,
# and with operands of tf32 it needs a few more than these.
_REGISTERS = 224
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


class Problem(NamedTuple):
    """One pass over a sequence. ``tensor_cores``: its products are not of ieee fp32."""

    backward: bool
    gates: int
    element_bytes: int
    tensor_cores: bool
    N: int
    B: int
    H: int


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
        registers: of a thread, at most; 0: as many as the compiler likes.
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

    def groups(self, problem: Problem) -> int:
        return problem.N * -(-problem.B // self.block_b)

    def __str__(self) -> str:
        weights = "on chip" if self.chunks else "from L2"
        share = f"{self.block_u} units of {self.block_b} sequences"
        return f"{self.exchange} of {self.slices} with {share} each, weights {weights}"


def plans(problem: Problem, device: Device) -> list[Plan | None]:
    """The plans worth trying, by the model the fastest first. None stands for the stepwise schedule."""
    found: list[Plan | None] = [*persistent_plans(problem, device), None]
    found.sort(key=lambda plan: cost(plan, problem, device))
    return [p for p in found if cost(p, problem, device) <= _NEAR * cost(found[0], problem, device)]


def persistent_plans(problem: Problem, device: Device) -> list[Plan]:
    """Every persistent plan that the device can run."""
    p = problem
    if not p.B or p.H**2 >= 1 << 31 or p.N * p.B * p.gates * p.H >= 1 << 31:  # offsets of 32 bits
        return []
    found = []
    fits = device.shared_bytes - _RESERVED
    units = max(16, 1 << (p.H - 1).bit_length())
    if p.tensor_cores and units <= 128 and p.gates * units * units * p.element_bytes <= fits:
        warps = min(8, units // _WARP_UNITS)
        found.append(Plan("block", 1 << 20, 1, 1, _ROWS, units, units, 1, warps, _REGISTERS))
    for units in (16, 32, 64):
        slices = -(-p.H // units)
        if slices > device.multiprocessors:
            continue
        rows = 8 if units == 16 else _ROWS  # fewer than units: Triton spreads warps over the longer side
        block_k = (64 if units > 16 or p.backward else 128) if p.tensor_cores else 16
        chunks = -(-p.H // block_k)
        held = p.gates * chunks * block_k * units * p.element_bytes
        if not p.tensor_cores or p.H > _MOST_HELD or held > fits:
            block_k, chunks = 128 // p.element_bytes if p.tensor_cores else 16, 0
        several = chunks > 1 and not p.backward
        registers = 0 if several or (p.element_bytes == 4 and p.tensor_cores) else _REGISTERS
        stages = 3 if p.tensor_cores else 1  # products without them take longer than their loads
        plan = Plan("grid", 0, slices, chunks, rows, units, block_k, stages, units // _WARP_UNITS, registers)
        at_once = min(plan.groups(p), device.multiprocessors // slices)
        found.append(plan._replace(at_once=at_once))
    return found


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
