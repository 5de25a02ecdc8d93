"""How the layers of a module would run on an input, and why not otherwise: :func:`explain`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from . import autocast, backend, env, functional, ops
from .cells import Cell, compute_dtype
from .functional import Weights
from .modules import _Cell, _Layers
from .plan import KERNELS, Plan

_EXCHANGES = ("block", "cluster", "grid")  # in the order of Exchange, csrc/plan.h
_HEAD, _FIGURES = 6, 10  # of what csrc/ops/schedule.h calls candidates
_WORDS = {"resident": "weights and state stay in the caches of the cores", "builtin": "torch's own kernels"}
_WORDS |= {"loop": "a loop of torch operations", "stepwise": "a product and a kernel for each step"}


@dataclass(frozen=True)
class PassPlan:
    """How one pass over the sequence runs.

    Attributes:
        direction: ``forward`` or ``backward``.
        schedule: ``persistent``, ``stepwise``, ``resident`` (CPU), ``builtin`` or ``loop`` (the reference).
        exchange: of a persistent schedule, where h is handed over: ``block``, ``cluster``, ``grid``; else "".
        tiles: how the work is cut, by name: blocks, units and sequences of each, threads, ...
        on_chip: bytes that stay on chip for the whole sequence, by where: ``registers`` and ``shared`` of a
            block, ``cache`` of a core, or ``all programs`` of a launch.
        rejected: for each other schedule, why it was not chosen.
    """

    direction: str
    schedule: str
    exchange: str = ""
    tiles: dict[str, int] = field(default_factory=dict)
    on_chip: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{self.direction}: {self.schedule}"]
        if self.exchange:
            words.append(f"exchange {self.exchange}")
        words += [f"{name} {value}" for name, value in self.tiles.items()]
        words += [f"{_bytes(size)} in {place}" for place, size in self.on_chip.items()]
        if not self.tiles and self.schedule in _WORDS:
            words.append(_WORDS[self.schedule])
        lines = [f"  {', '.join(words)}"]
        return "\n".join(lines + [f"    not {name}: {why}" for name, why in self.rejected.items()])


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs.

    Attributes:
        module: the module's name in the model; "" is the model itself.
        layer: number of the layer in the module, if the module runs each of its layers as one.
        cell: its cell.
        sizes: T, B, I, H, P (0: no projection) and N, the recurrences side by side.
        dtype: that it is computed in.
        device: of its tensors.
        packed: whether rows are packed, as in a :class:`~torch.nn.utils.rnn.PackedSequence`.
        options: what it does beyond its cell.
        backend: what serves it.
        because: why it is that one, where it is not simply the first that can.
        rejected: for each backend that would have been preferred, why it was not chosen.
        passes: forward, and backward if gradients can be asked for.
    """

    module: str
    layer: int
    cell: str
    sizes: dict[str, int]
    dtype: str
    device: str
    packed: bool
    options: tuple[str, ...]
    backend: str
    because: str
    rejected: dict[str, str]
    passes: tuple[PassPlan, ...]

    def __str__(self) -> str:
        name = self.module or "(module)"
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes.items() if v or k != "P")
        head = f"{name} layer {self.layer}: {self.cell} {sizes}" + " packed" * self.packed
        if self.options:
            head += f" with {', '.join(self.options)}"
        lines = [f"{head}, {self.dtype} on {self.device}", f"  backend {self.backend}"]
        if self.because:
            lines[-1] += f": {self.because}"
        lines += [f"    not {other}: {why}" for other, why in self.rejected.items()]
        return "\n".join([*lines, *map(str, self.passes)])


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; printed, some lines for each layer.

    Attributes:
        layers: in the order in which they run.
        builtin: names of recurrent modules that are ``torch.nn``'s, which this package has no part in.
    """

    layers: tuple[LayerPlan, ...]
    builtin: tuple[str, ...]

    def __str__(self) -> str:
        lines = [*map(str, self.layers)]
        lines += [
            f"{name or '(module)'}: torch.nn's own; fusedrnn.convert makes it ours" for name in self.builtin
        ]
        return "\n".join(lines) or "no recurrent modules"

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers: what JSON can hold."""
        return asdict(self)


def explain(module: torch.nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Runs a module once and says by which backend, schedule and tiles each recurrent layer ran, and why.

    Grad mode, autocast, :func:`use_backend` and environment variables count as they are at the time of the
    call: under ``torch.no_grad()`` the answer is that for inference. Tensors of a GPU are needed to ask for a
    GPU's plan.

    Args:
        module: one of this package's modules, or any module that holds some.
        *inputs: what it is called with.
        **kwargs: likewise.

    Returns:
        An :class:`Explanation`: print it, or read its fields.

    Raises:
        What the module raises: RuntimeError if the input does not fit, or the forced backend or schedule
        cannot serve it.
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile, which plans once and then no more
    layers: list[LayerPlan] = []
    running: list[tuple[str, int]] = []  # names of the modules that are running, and layers seen before each

    def enter(name: str) -> Any:
        return lambda *_: running.append((name, len(layers)))

    def leave(*_: Any) -> None:
        running.pop()

    def planned(plan: Plan, cell: Cell, *call: Any) -> None:
        name, before = running[-1]
        layers.append(_explain(name, len(layers) - before, plan, cell, *call))

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            hooks.enter_context(part.register_forward_pre_hook(enter(name)))
            hooks.enter_context(part.register_forward_hook(leave, always_call=True))
        hooks.enter_context(functional.watched_plans(planned))
        module(*inputs, **kwargs)
    builtin = tuple(
        name
        for name, part in module.named_modules()
        if isinstance(part, (RNNBase, RNNCellBase)) and not isinstance(part, (_Layers, _Cell))
    )
    return Explanation(tuple(layers), builtin)


def _explain(
    name: str,
    number: int,
    plan: Plan,
    cell: Cell,
    x: Tensor,
    weights: Weights,
    reverse: Sequence[bool],
    batch_sizes: Tensor | None,
    variation: Any = None,
    *_: Any,
) -> LayerPlan:
    N, H = len(reverse), weights.hh[0].size(0) // cell.gates
    P = weights.hr[0].size(0) if weights.hr else 0
    B = int(batch_sizes[0]) if batch_sizes is not None else x.size(1)
    T = len(batch_sizes) if batch_sizes is not None else x.size(0)
    state = [x.new_zeros(N, B, (P or H) if s == 0 else H) for s in range(cell.states)]
    needs_gradient = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, *(w for group in weights for w in group))
    )
    args: Any = (x.detach(), state, *([w.detach() for w in group] for group in weights))
    device = x.device.type
    if autocast.enabled(x) and plan.backend != "torch":
        args = autocast.cast(cell, device, args, promote=batch_sizes is not None)
    dtype = args[0].dtype
    call = (cell, *args, reverse, batch_sizes)
    sizes = {"T": T, "B": B, "I": x.size(-1), "H": H, "P": P, "N": N}
    return LayerPlan(
        module=name,
        layer=number,
        cell=cell.name,
        sizes=sizes,
        dtype=str(dtype).removeprefix("torch."),
        device=str(x.device),
        packed=batch_sizes is not None,
        options=tuple(variation.names()) if variation is not None else (),
        backend=plan.backend,
        because=_because(plan.backend, plan.rejected),
        rejected=dict(plan.rejected),
        passes=tuple(
            _pass(plan.backend, sizes, dtype, call, backward=backward)
            for backward in ((False, True) if needs_gradient else (False,))
        ),
    )


def _because(chosen: str, rejected: dict[str, str]) -> str:
    if backend.forced():
        return f"it is forced, by fusedrnn.use_backend or {env.BACKEND}"
    if chosen == "torch" and not rejected:
        return "the planner expects torch's own kernels to be the faster ones here"
    if chosen == "reference" and not rejected:
        return "inside a transform, which needs operations that have every rule"
    return ""


def _pass(
    chosen: str, sizes: dict[str, int], dtype: torch.dtype, call: tuple[Any, ...], *, backward: bool
) -> PassPlan:
    direction = "backward" if backward else "forward"
    if chosen not in KERNELS:
        return PassPlan(direction, "builtin" if chosen == "torch" else "loop")
    if chosen == "triton":
        return _triton_pass(direction, call, backward)
    figures = ops.plan(chosen, *call, backward=backward)
    if chosen == "cpu":
        return _cpu_pass(direction, sizes, dtype, call[0], figures)
    return _cuda_pass(direction, sizes, dtype, figures)


def _cpu_pass(
    direction: str, sizes: dict[str, int], dtype: torch.dtype, cell: Cell, figures: list[int]
) -> PassPlan:
    threads, chunks, slices, vector, isa = figures
    pairs = direction == "forward" and dtype == torch.bfloat16 and env.CPU_ISAS[isa] == "avx512bf16"
    element = (dtype if pairs else compute_dtype(dtype)).itemsize
    weights = cell.gates * sizes["H"] * (sizes["P"] or sizes["H"]) * element
    tiles = {"threads": threads, "batch_chunks": chunks, "unit_slices": slices, "vector_bytes": vector}
    return PassPlan(direction, "resident", tiles=tiles, on_chip={"cache": -(-weights // slices)})


def _cuda_pass(direction: str, sizes: dict[str, int], dtype: torch.dtype, figures: list[int]) -> PassPlan:
    multiprocessors, shared, cluster, cooperative, index, stepwise_cycles = figures[:_HEAD]
    rows = [figures[i : i + _FIGURES] for i in range(_HEAD, len(figures), _FIGURES)]
    demand = env.schedule()
    chosen = rows[index] if index >= 0 else None
    cycles = chosen[8] if chosen else stepwise_cycles

    def against(other: int) -> str:
        if demand:
            return f"{env.SCHEDULE}={demand} demands another"
        ratio = other / max(cycles, 1)
        return f"the planner's model expects {ratio:.1f} times the time for a step"

    def lacking(exchange: str) -> str:
        if exchange == "cluster" and not cluster:
            return "this device has no thread-block clusters"
        if exchange == "grid" and not cooperative:
            return "this device cannot start a grid whose blocks are all resident"
        place = {"block": "one block", "cluster": f"a cluster of {cluster} blocks"}
        place["grid"] = f"{multiprocessors} blocks"
        if exchange == "grid" and sizes["H"] <= 16:
            return f"{sizes['H']} hidden units are the share of a single block"
        return (
            f"weights and state of {sizes['H']} hidden units do not fit registers and shared memory "
            f"({_bytes(shared)} each) of {place[exchange]}"
        )

    rejected = {}
    always = _always_stepwise(sizes, dtype, demand)
    for number, exchange in enumerate(_EXCHANGES):
        of = [row for row in rows if row[0] == number]
        kept = [row for row in of if row[9]]
        for row in of:
            if not row[9] and (chosen is None or rows.index(row) < index):
                rejected[f"{exchange} of {row[1]}"] = "this device cannot keep its blocks resident"
        if chosen is not None and chosen[0] == number:
            continue
        if always:
            rejected[exchange] = always
        elif not of:
            rejected[exchange] = lacking(exchange)
        elif kept:
            rejected[exchange] = against(min(row[8] for row in kept))
    if chosen is None:
        return PassPlan(direction, "stepwise", rejected=rejected)
    rejected["stepwise"] = against(stepwise_cycles)
    _, slices, unit_tiles, k_splits, batch_tiles, groups, shared_bytes, registers, _, _ = chosen
    tiles = {
        "groups": groups,
        "blocks": slices,
        "units": 16 * unit_tiles,
        "sequences": 8 * batch_tiles,
        "k_splits": k_splits,
        "threads": 32 * unit_tiles * k_splits,
    }
    on_chip = {"registers": registers, "shared": shared_bytes}
    return PassPlan(direction, "persistent", _EXCHANGES[chosen[0]], tiles, on_chip, rejected)


def _always_stepwise(sizes: dict[str, int], dtype: torch.dtype, demand: str | None) -> str:
    """Why no persistent schedule can run, whatever its plan; empty if one can."""
    if demand == "stepwise":
        return f"{env.SCHEDULE}=stepwise"
    if dtype == torch.float64:
        return "float64 runs step by step"
    if sizes["P"]:
        return "a projection runs step by step"
    if sizes["T"] == 1 and not demand:
        return "a single step does not repay loading the weights"
    return ""


def _triton_pass(direction: str, call: tuple[Any, ...], backward: bool) -> PassPlan:
    from .triton import plan, schedule
    from .triton.call import Call

    made = Call.of(call[0].id, *call[1:], ops._tf32_allowed(call[1]))
    found = plan.explain(schedule._problem(made, backward), schedule._device(made.x), env.schedule())
    on_chip = {"all programs": found.bytes_on_chip} if found.bytes_on_chip else {}
    return PassPlan(direction, found.schedule, found.exchange, found.tiles, on_chip, found.rejected)


def _bytes(size: int) -> str:
    return f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} B"
