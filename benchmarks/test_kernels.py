"""The table's kernels under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

For looking closely at a few kernels (``-k``, ``--benchmark-compare``); ratios to report come from
``python -m benchmarks``, which measures the two side by side and checks the results.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import fusedrnn
from fusedrnn.bench.sets import SHAPES
from fusedrnn.trial import CELLS, MODES, Cell, Shape, call, make_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = {"builtin": torch.nn, "fusedrnn": fusedrnn}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape).replace(" ", "-"))
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_kernel(benchmark, cell: Cell, shape: Shape, mode: str, implementation: ModuleType) -> None:
    torch.manual_seed(0)
    layer = cell.layer(implementation, shape).to(DEVICE)
    inputs = make_inputs(cell, shape, torch.float32, DEVICE, seed=0)

    def run() -> None:
        call(layer, inputs, mode)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{cell.name} {shape} {mode}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(run, warmup_rounds=2, rounds=20)
