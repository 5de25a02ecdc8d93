"""Calls of recurrent layers to check and to time: cells, sizes, random inputs, and the call itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

MODES = ("inference", "training")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, as in the dims legend.

    Packed: the lengths fall evenly from T to about T/B. T=1: streaming, a step a call. Resets: the share of
    steps at which a sequence starts anew, from zeros. Heads: blocks on the diagonal of W_hh.
    """

    T: int
    B: int
    I: int
    H: int
    packed: bool = False
    layers: int = 1
    bidirectional: bool = False
    P: int = 0
    resets: float = 0.0
    heads: int = 1

    def __str__(self) -> str:
        words = [f"T{self.T} B{self.B} I{self.I} H{self.H}"]
        words += [f"P{self.P}"] if self.P else []
        words += [f"{self.heads} heads"] if self.heads > 1 else []
        words += [f"L{self.layers}"] if self.layers > 1 else []
        words += ["both ways"] if self.bidirectional else []
        words += [f"resets {self.resets:.0%}"] if self.resets else []
        return " ".join(words + ["packed"] * self.packed)

    @property
    def whole(self) -> bool:
        """Whether it is one of the padded sequences that means are taken over."""
        return not self.packed and self.T > 1

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> list[int]:
        if not self.packed:
            return [self.T] * self.B
        return [max(1, round(self.T * (self.B - b) / self.B)) for b in range(self.B)]

    @property
    def rows(self) -> int:
        """Time steps of all sequences together."""
        return sum(self.lengths)

    @property
    def batch_sizes(self) -> Tensor:
        """How many sequences are alive at each step, int64 [T]."""
        return torch.tensor([sum(length > t for length in self.lengths) for t in range(self.T)])

    @property
    def recurrent(self) -> int:
        """Features of h that a unit sees."""
        return (self.P or self.H) // self.heads

    @property
    def output(self) -> int:
        """Features of y."""
        return self.directions * (self.P or self.H)

    def inputs_of_layers(self) -> Iterator[int]:
        """Features of each layer's input."""
        for layer in range(self.layers):
            yield self.output if layer else self.I


@dataclass(frozen=True)
class Cell:
    """A layer class, by the name it has in both ``torch.nn`` and ``fusedrnn``, and its number of gates."""

    name: str
    gates: int
    nonlinearity: str = ""

    def __str__(self) -> str:
        return self.name + (f" {self.nonlinearity}" if self.nonlinearity else "")

    @property
    def states(self) -> int:
        return 2 if self.name == "LSTM" else 1

    @property
    def registered(self) -> str:
        """The cell's name in the registry."""
        return f"rnn_{self.nonlinearity or 'tanh'}" if self.name == "RNN" else self.name.lower()

    def layer(self, package: Any, shape: Shape) -> Any:
        options: dict[str, Any] = {"num_layers": shape.layers, "bidirectional": shape.bidirectional}
        if self.nonlinearity:
            options["nonlinearity"] = self.nonlinearity
        if shape.P:
            options["proj_size"] = shape.P
        if shape.heads > 1 and package is torch.nn:
            return BlockDiagonal(self.layer(package, replace(shape, heads=1)), shape.heads)
        if shape.heads > 1:
            options["num_heads"] = shape.heads
        return getattr(package, self.name)(shape.I, shape.H, **options)


class BlockDiagonal(torch.nn.Module):
    """What a user of ``torch.nn`` writes for heads: the layer with zeros outside the blocks of its W_hh.

    Its parameters are those of ``fusedrnn`` with ``num_heads``: W_hh is ``[G*H, H/heads]``.
    """

    def __init__(self, layer: torch.nn.RNNBase, heads: int) -> None:
        super().__init__()
        self._heads, self._layer = heads, [layer]  # in a list: its parameters are not the module's
        for name, p in layer.named_parameters():
            own = p.detach()[:, : layer.hidden_size // heads] if "weight_hh" in name else p.detach()
            self.register_parameter(name, torch.nn.Parameter(own.clone()))

    def forward(self, x: Any, state: Any) -> tuple[Any, Any]:
        weights: dict[str, Tensor] = dict(self.named_parameters())
        for name, w in weights.items():
            if "weight_hh" in name:
                H = w.size(1) * self._heads
                gates = [torch.block_diag(*gate.chunk(self._heads)) for gate in w.split(H)]
                weights[name] = torch.cat(gates)
        return functional_call(self._layer[0], weights, (x, state))


CELLS = (Cell("LSTM", 4), Cell("GRU", 3), Cell("RNN", 1))
CELL_BY_NAME = {"lstm": CELLS[0], "gru": CELLS[1], "rnn": CELLS[2], "rnn_relu": Cell("RNN", 1, "relu")}


def step_bytes(cell: Cell, shape: Shape, element: int) -> int:
    """Bytes of a recurrence's W_hh, which every step reads whole: what bounds a step with few rows."""
    return cell.gates * shape.H * shape.recurrent * element


def flop(cell: Cell, shape: Shape, mode: str) -> int:
    """Operations of the matrix products one call cannot do without.

    Forward: W_ih x, W_hh h and the projection. Backward: for each of them, the gradient of the operand and
    of the weight. Pointwise work and recomputed products do not count: one call counts the same for everyone.
    """
    forward = sum(
        2 * shape.rows * shape.directions * shape.H * (cell.gates * (features + shape.recurrent) + shape.P)
        for features in shape.inputs_of_layers()
    )
    return forward if mode == "inference" else 3 * forward


class Inputs(NamedTuple):
    """One call's tensors: x [T, B, I] or packed rows [rows, I], states [L*D, B, H], y's gradient like y."""

    x: Tensor
    state: list[Tensor]
    dy: Tensor
    dstate: list[Tensor]
    batch_sizes: Tensor | None
    reset: Tensor | None = None  # [T, B] bool

    def to(self, dtype: torch.dtype) -> Inputs:
        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        states = ([*map(cast, self.state)], cast(self.dy), [*map(cast, self.dstate)])
        return Inputs(cast(self.x), *states, self.batch_sizes, self.reset)


def make_inputs(cell: Cell, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Draws all tensors of a call from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, needs_gradient: bool = False) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_(needs_gradient)

    steps = (shape.rows,) if shape.packed else (shape.T, shape.B)
    stacked = shape.layers * shape.directions
    states = [(stacked, shape.B, shape.P or shape.H), (stacked, shape.B, shape.H)][: cell.states]
    return Inputs(
        x=normal(*steps, shape.I, needs_gradient=True),
        state=[normal(*size, needs_gradient=True) for size in states],
        dy=normal(*steps, shape.output),
        dstate=[normal(*size) for size in states],
        batch_sizes=shape.batch_sizes if shape.packed else None,
        reset=(torch.rand(steps, generator=generator) < shape.resets).to(device) if shape.resets else None,
    )


class Trio(NamedTuple):
    """The same layer three times: torch's, ours, and torch's in fp64, with the inputs of a call."""

    builtin: Any
    ours: torch.nn.RNNBase
    referee: torch.nn.Module
    inputs: Inputs


def make_trio(cell: Cell, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Trio:
    """Makes the three layers with the same weights, drawn as ``torch.nn`` draws them."""
    import fusedrnn

    torch.manual_seed(seed)
    builtin = cell.layer(torch.nn, shape).to(device, dtype)
    ours = cell.layer(fusedrnn, shape).to(device, dtype)
    ours.load_state_dict(builtin.state_dict())
    return Trio(builtin, ours, copy.deepcopy(builtin).double(), make_inputs(cell, shape, dtype, device, seed))


def call(layer: torch.nn.Module, inputs: Inputs, mode: str) -> dict[str, Tensor]:
    """Runs one layer call, as it is checked and as it is timed.

    Inference returns y and the final states, under ``torch.inference_mode``. Training also returns the
    gradients of the input, the initial states and the weights.
    """
    if mode == "inference":
        with torch.inference_mode():
            return _forward(layer, inputs)
    outputs = _forward(layer, inputs)
    sources = {
        "x": inputs.x,
        **{f"state{i}": s for i, s in enumerate(inputs.state)},
        **dict(layer.named_parameters()),
    }
    gradients = torch.autograd.grad([*outputs.values()], [*sources.values()], [inputs.dy, *inputs.dstate])
    return outputs | {f"d{name}": g for name, g in zip(sources, gradients, strict=True)}


def _forward(layer: torch.nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    x: Any = inputs.x if inputs.batch_sizes is None else PackedSequence(inputs.x, inputs.batch_sizes)
    state: Any = tuple(inputs.state) if len(inputs.state) > 1 else inputs.state[0]
    if inputs.reset is None:
        y, final = layer(x, state)
    elif type(layer).__module__.startswith("fusedrnn."):
        y, final = layer(x, state, reset=inputs.reset)
    else:
        y, final = _by_steps(layer, x, state, inputs.reset)
    states = final if isinstance(final, tuple) else (final,)
    return {
        "y": y if inputs.batch_sizes is None else y.data,
        **{f"final{i}": s for i, s in enumerate(states)},
    }


def _by_steps(layer: torch.nn.Module, x: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
    """What a user of ``torch.nn`` writes for resets: a step a call, with the state masked before it."""
    outputs = []
    for x_t, reset_t in zip(x.unbind(0), reset.unbind(0), strict=True):
        kept = ~reset_t[:, None]
        state = tuple(s * kept for s in state) if isinstance(state, tuple) else state * kept
        y, state = layer(x_t[None], state)
        outputs.append(y)
    return torch.cat(outputs), state
