"""Layer calls to test with: random problems for any cell, dtype and shape, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.functional import Weights, sequence


class Shape(NamedTuple):
    T: int
    B: int
    I: int
    H: int
    P: int = 0


# Odd sizes on both sides of every vector width and tile height, and one of each that fits exactly.
SHAPES = (
    Shape(1, 1, 1, 1),
    Shape(4, 3, 5, 7),
    Shape(6, 9, 5, 33),
    Shape(5, 13, 17, 70),
    Shape(3, 16, 8, 64),
    Shape(3, 1, 30, 200),
    Shape(2, 40, 3, 129),
)
KERNELS = ("cpu", "emulator")  # the backends that run kernels of this package on CPU tensors
BACKENDS = ("reference", "torch", *KERNELS)
DIRECTIONS = ([False], [True], [False, True])


def served(
    names: Sequence[str], by_triton: Sequence[str], backends: Sequence[str] = BACKENDS
) -> list[tuple[str, str]]:
    """Parameters of a test: every name by every backend, some by triton, whose interpreter takes its time."""
    return [*product(names, backends), *product(by_triton, ["triton"])]


@dataclass
class Problem:
    cell: str
    x: Tensor
    state: list[Tensor]
    weights: Weights
    reverse: list[bool]
    batch_sizes: Tensor | None = None

    def run(self, backend: str | None = None) -> tuple[Tensor, list[Tensor]]:
        if backend is None:
            return sequence(self.cell, self.x, self.state, self.weights, **self.options)
        with fusedrnn.use_backend(backend):
            return self.run()

    @property
    def options(self) -> dict:
        return {"reverse": self.reverse, "batch_sizes": self.batch_sizes}

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, *self.state, *(w for group in self.weights for w in group)]

    def with_inputs(self, inputs: list[Tensor]) -> Problem:
        rest = iter(inputs)
        x = next(rest)
        state = [next(rest) for _ in self.state]
        weights = Weights(*([next(rest) for _ in group] for group in self.weights))
        return Problem(self.cell, x, state, weights, self.reverse, self.batch_sizes)

    def to(self, dtype: torch.dtype) -> Problem:
        return self.with_inputs([t.to(dtype) for t in self.inputs])

    def results(self, backend: str) -> list[Tensor]:
        """y, the final states, and the gradient of every input for fixed random gradients of both."""
        leaves = self.with_inputs([t.detach().requires_grad_() for t in self.inputs])
        y, final = leaves.run(backend)
        generator = torch.Generator().manual_seed(5)
        seeds = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, *final)]
        grads = torch.autograd.grad([y, *final], leaves.inputs, seeds)
        return [t.detach() for t in (y, *final)] + list(grads)


def make_problem(
    cell: str,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float64,
    reverse: list[bool] | None = None,
    packed: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    T, B, I, H, P = shape
    G, reverse = CELLS[cell].gates, reverse or [False]
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:  # as torch.nn initialises weights
        return ((torch.rand(*size, generator=generator, dtype=torch.float64) * 2 - 1) / H**0.5).to(dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    weights = Weights(
        [uniform(G * H, I) for _ in reverse],
        [uniform(G * H, P or H) for _ in reverse],
        [uniform(G * H) for _ in reverse] if bias else [],
        [uniform(G * H) for _ in reverse] if bias else [],
        [uniform(P, H) for _ in reverse] if P else [],
    )
    state = [0.5 * normal(len(reverse), B, P or H)]
    state += [normal(len(reverse), B, H) for _ in range(CELLS[cell].states - 1)]
    batch_sizes = None
    if packed:
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        lengths[0] = T
        batch_sizes = torch.tensor([int((lengths > t).sum()) for t in range(T)])
        x = normal(int(batch_sizes.sum()), I)
    else:
        x = normal(T, B, I)
    return Problem(cell, x, state, weights, reverse, batch_sizes)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b; NaN if either holds one."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
