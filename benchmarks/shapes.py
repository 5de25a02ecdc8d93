"""What is measured: cells, sizes and modes, and how many operations each of them needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODES = ("inference", "training")


@dataclass(frozen=True)
class Cell:
    """A layer class, by the name it has in both ``torch.nn`` and ``fusedrnn``, and its number of gates."""

    name: str
    gates: int

    def layer(self, package: Any, shape: Shape, **options: Any) -> torch.nn.RNNBase:
        return getattr(package, self.name)(shape.I, shape.H, **options)


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer call. Packed: the lengths fall evenly from T to about T/B. T=1: streaming, a step a
    call."""

    T: int
    B: int
    I: int
    H: int
    packed: bool = False

    def __str__(self) -> str:
        return f"T{self.T} B{self.B} I{self.I} H{self.H}" + (" packed" if self.packed else "")

    @property
    def whole(self) -> bool:
        """Whether it is one of the padded sequences that the means are taken over."""
        return not self.packed and self.T > 1

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


CELLS = (Cell("LSTM", 4), Cell("GRU", 3), Cell("RNN", 1))

SHAPES = (
    Shape(100, 1, 64, 64),
    Shape(100, 8, 80, 128),
    Shape(60, 32, 128, 128),
    Shape(60, 32, 256, 256),
    Shape(64, 1, 512, 512),
    Shape(32, 16, 320, 512),
    Shape(60, 32, 128, 128, packed=True),
    Shape(1, 1, 64, 64),
    Shape(1, 1, 512, 512),
)

QUICK_SHAPES = (SHAPES[0], SHAPES[2], SHAPES[6])


def step_bytes(cell: Cell, shape: Shape, element: int) -> int:
    """Bytes of W_hh, which every step reads whole: what bounds a step with few rows."""
    return cell.gates * shape.H * shape.H * element


def flop(cell: Cell, shape: Shape, mode: str) -> int:
    """Operations of the matrix products one call cannot do without.

    Forward: W_ih x and W_hh h. Backward: for each of the two, the gradient of the operand and of the weight.
    Pointwise work and recomputed products do not count: the same call counts the same for everyone.
    """
    forward = 2 * shape.rows * cell.gates * shape.H * (shape.I + shape.H)
    return forward if mode == "inference" else 3 * forward
