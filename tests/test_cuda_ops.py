"""The ops over the CUDA kernels, run on the CPU by the emulator: every schedule, against the reference.

A schedule that is forced runs or raises, so none of these tests can pass through another one. What the
kernels do beneath is proven in test_emulator.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from fusedrnn import ops
from fusedrnn.cells import CELLS
from fusedrnn.functional import Weights

from .problems import DIRECTIONS, Shape, make_problem, relative_error

PERSISTENT = ("block", "cluster", "grid")
SCHEDULES = ("stepwise", *PERSISTENT)
# More than one slice of units for a cluster and a grid, none of them full; one and several tiles of a batch.
SHAPES = (Shape(6, 3, 4, 20), Shape(4, 9, 5, 33), Shape(3, 17, 7, 40))
# Relative L2 error against the reference in the same dtype. It adds in another order, and carries in fp32 the
# gradients of gates, which the kernels round for their products. Unit roundoff: 6e-8; of 16 bits 4e-3, 5e-4.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TF32_TOLERANCE = 2e-3  # operands of 11 bits: a relative error of up to 5e-4 each


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Whatever is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda schedule: monkeypatch.setenv("FUSEDRNN_SCHEDULE", schedule)


@pytest.fixture
def allow_tf32(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def allow(yes: bool) -> None:
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32" if yes else "ieee")

    return allow


def assert_equals_reference(problem, tolerance):
    for i, (a, b) in enumerate(zip(problem.results("emulator"), problem.results("reference"), strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert relative_error(a, b) < tolerance, f"result {i} of {problem.cell}"  # NaN fails


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_reference(force, cell, schedule, dtype, shape):
    force(schedule)
    for reverse in DIRECTIONS:
        for packed in (False, True):
            problem = make_problem(
                cell, shape, dtype=dtype, reverse=reverse, packed=packed, bias=len(reverse) == 1
            )
            assert_equals_reference(problem, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "plan", ["block:1,3,2,1", "cluster:2,2,1,1", "cluster:4,1,8,4", "grid:3,1,4,2", "grid:5,1,1,1"]
)
@pytest.mark.parametrize("cell", CELLS)
def test_plan_of_the_users_choice(force, cell, plan):
    force(plan)
    problem = make_problem(cell, Shape(4, 19, 5, 45), dtype=torch.float32, reverse=[False, True])
    assert_equals_reference(problem, TOLERANCE[torch.float32])


@pytest.mark.parametrize("schedule", PERSISTENT)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32(force, allow_tf32, cell, schedule):
    force(schedule)
    problem = make_problem(cell, Shape(4, 9, 5, 33), dtype=torch.float32, reverse=[False, True], packed=True)
    exact = problem.results("emulator")
    allow_tf32(True)
    rounded = problem.results("emulator")
    for a, b in zip(rounded, exact, strict=True):
        assert relative_error(a, b) < TF32_TOLERANCE
    assert relative_error(rounded[0], exact[0]) > 1e-6  # it did take tf32 operands
    for dtype in (torch.bfloat16, torch.float16):  # the switch is for fp32 alone
        assert_equals_reference(problem.to(dtype), TOLERANCE[dtype])


def test_a_backward_uses_the_precision_of_its_forward(force, allow_tf32):
    force("block")
    problem = make_problem("gru", Shape(4, 3, 5, 12), dtype=torch.float32)
    exact = problem.results("emulator")[2:]
    leaves = problem.with_inputs([t.requires_grad_() for t in problem.inputs])
    y, final = leaves.run("emulator")
    generator = torch.Generator().manual_seed(5)
    seeds = [torch.randn(t.shape, generator=generator) for t in (y, *final)]
    allow_tf32(True)
    for a, b in zip(torch.autograd.grad([y, *final], leaves.inputs, seeds), exact, strict=True):
        assert torch.equal(a, b)


def test_tf32_is_read_while_tracing(allow_tf32):
    """One graph, and another one once the switch has moved."""
    problem = make_problem("lstm", Shape(3, 2, 4, 20), dtype=torch.float32)
    graphs = []

    def record(graph, _):
        graphs.append([node.args[-1] for node in graph.graph.nodes if "sequence" in str(node.target)])
        return graph

    @torch.compile(fullgraph=True, backend=record)
    def run(x, state):
        y, *_ = ops.sequence("emulator", CELLS["lstm"], x, state, *map(list, problem.weights), [False], None)
        return y

    for yes in (False, True):
        allow_tf32(yes)
        run(problem.x, problem.state)
    assert graphs == [[False], [True]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh", "rnn_relu"])
def test_projection(cell, dtype):
    for packed in (False, True):
        problem = make_problem(
            cell, Shape(4, 5, 8, 20, 11), dtype=dtype, reverse=[False, True], packed=packed
        )
        assert_equals_reference(problem, {torch.float64: 1e-12, **TOLERANCE}[dtype])


@pytest.mark.parametrize("cell", CELLS)
def test_doubles_go_step_by_step(cell):
    for shape in SHAPES:
        for reverse in DIRECTIONS:
            for packed in (False, True):
                assert_equals_reference(make_problem(cell, shape, reverse=reverse, packed=packed), 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_recurrences_than_a_launch_takes(force, schedule):
    force(schedule)
    reverse = [n % 3 == 0 for n in range(35)]
    for cell in ("lstm", "gru"):
        problem = make_problem(cell, Shape(2, 2, 3, 18), dtype=torch.float32, reverse=reverse, packed=True)
        assert_equals_reference(problem, TOLERANCE[torch.float32])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_single_step(force, schedule):
    force(schedule)
    assert_equals_reference(make_problem("lstm", Shape(1, 2, 3, 18), dtype=torch.float32), 2e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_the_planner_chooses(force, cell):
    """Nothing forced: also where no persistent kernel fits, and for a single unit."""
    force("")
    for shape in (Shape(3, 2, 4, 24), Shape(1, 3, 4, 24), Shape(2, 1, 1, 1), Shape(2, 1, 2, 2500)):
        if shape.H < 100 or cell == "rnn_relu":
            assert_equals_reference(make_problem(cell, shape, dtype=torch.float32), 2e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_runs_repeat_to_the_bit(force, cell, schedule):
    force(schedule)
    problem = make_problem(cell, Shape(4, 9, 5, 33), dtype=torch.float32, reverse=[False, True], packed=True)
    first = problem.results("emulator")
    for a, b in zip(problem.results("emulator"), first, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():  # and the op without autograd keeps to it
        y, final = problem.run("emulator")
    for a, b in zip((y, *final), first, strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("outputs", [[0], [2], [0, 1]], ids=str)
def test_outputs_without_a_gradient(force, schedule, outputs):
    force(schedule)
    problem = make_problem("lstm", Shape(4, 3, 5, 18), dtype=torch.float32, reverse=[False, True])
    grads = []
    for backend in ("emulator", "reference"):
        leaves = problem.with_inputs([t.detach().requires_grad_() for t in problem.inputs])
        y, final = leaves.run(backend)
        chosen = [(y, *final)[i].pow(2).sum() for i in outputs]
        grads.append(torch.autograd.grad(chosen, leaves.inputs))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_strided_tensors(force, schedule):
    force(schedule)
    problem = make_problem("gru", Shape(4, 3, 5, 18), dtype=torch.bfloat16, reverse=[False, True])
    strided = [torch.stack([t, t], -1)[..., 0] for t in problem.inputs]
    for a, b in zip(
        problem.with_inputs(strided).results("emulator"), problem.results("emulator"), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_sample(force, cell, schedule):
    force(schedule)
    problem = make_problem(cell, Shape(4, 9, 5, 20), dtype=torch.float32, reverse=[False, True])
    clean, _ = problem.run("emulator")
    problem.x[2, 4] = math.nan
    y, final = problem.run("emulator")
    others = [b for b in range(9) if b != 4]
    assert torch.equal(y[:, others], clean[:, others])
    assert y[2:, 4, :20].isnan().all()
    assert y[:3, 4, 20:].isnan().all()
    assert torch.equal(y[:2, 4, :20], clean[:2, 4, :20])
    assert all(s[:, 4].isnan().all() for s in final)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_half_overflow_becomes_inf(force, schedule):
    """GradScaler relies on it: a gradient beyond fp16's range is inf, not the largest number."""
    force(schedule)
    problem = make_problem("rnn_relu", Shape(2, 2, 3, 20), dtype=torch.float16)
    problem.weights = Weights(*([w.abs() for w in group] for group in problem.weights))
    inputs = [t.abs().requires_grad_() for t in problem.inputs]
    y, _ = problem.with_inputs(inputs).run("emulator")
    grads = torch.autograd.grad(y, inputs, torch.full_like(y, 60000))
    assert any(g.isinf().any() for g in grads)
    assert not any(g.isnan().any() for g in grads)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_empty_batch(force, schedule):
    force(schedule)
    problem = make_problem("lstm", Shape(3, 0, 4, 20), dtype=torch.float32, reverse=[False, True])
    for a, b in zip(problem.results("emulator"), problem.results("reference"), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def test_what_no_kernel_runs_is_refused_when_forced(force):
    f32 = torch.float32
    doubles, small = (
        make_problem("lstm", Shape(3, 2, 4, 20)),
        make_problem("gru", Shape(3, 2, 4, 7), dtype=f32),
    )
    projected = make_problem("lstm", Shape(3, 2, 4, 20, 5), dtype=f32)
    large = make_problem("rnn_tanh", Shape(2, 1, 2, 500), dtype=f32)
    for schedule, problem, message in (
        ("block", doubles, "FUSEDRNN_SCHEDULE=block cannot run lstm forward: float64 runs step by step"),
        ("cluster", projected, "cannot run lstm forward: a projection runs step by step"),
        ("grid", small, "no such plan fits this device and hidden size 7"),
        ("block", large, "cannot run rnn_tanh forward: no such plan fits this device and hidden size 500"),
        ("fast", small, "FUSEDRNN_SCHEDULE=fast: choose stepwise, block, cluster or grid"),
        ("grid:2,1,1", small, "FUSEDRNN_SCHEDULE=grid:2,1,1: choose stepwise, block, cluster or grid, or"),
        ("grid:2,1,1,1,1", small, "FUSEDRNN_SCHEDULE=grid:2,1,1,1,1: choose stepwise"),
        ("cluster:3,1,1,1", small, "FUSEDRNN_SCHEDULE=cluster:3,1,1,1 cannot run gru forward: no such plan"),
        ("cluster:2,1,1,2", small, "no such plan fits"),
        ("grid:2,9,1,1", small, "no such plan fits"),
        ("grid:2,-1,-8,1", small, "no such plan fits"),
    ):
        force(schedule)
        with pytest.raises(RuntimeError, match=message):
            problem.run("emulator")


def test_a_backward_that_cannot_be_as_demanded_is_refused(force):
    force("block")
    problem = make_problem("gru", Shape(3, 2, 4, 20), dtype=torch.float32)
    y, _ = problem.with_inputs([t.requires_grad_() for t in problem.inputs]).run("emulator")
    force("grid")
    assert torch.autograd.grad(y.sum(), problem.x, retain_graph=True)[0].isfinite().all()
    force("stepwise,")
    with pytest.raises(RuntimeError, match="choose stepwise, block, cluster or grid"):
        torch.autograd.grad(y.sum(), problem.x)


def test_a_model_through_the_cuda_code():
    """As a user does it: a module, the backend forced by the environment, a schedule too."""
    code = (
        "import torch, fusedrnn\n"
        "model = fusedrnn.LSTM(4, 20, 2, bidirectional=True).bfloat16()\n"
        "y, _ = model(torch.randn(5, 3, 4).bfloat16())\n"
        "y.float().pow(2).sum().backward()\n"
        "print(all(p.grad.isfinite().all() for p in model.parameters()), y.grad_fn.name())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSEDRNN_BACKEND": "emulator", "FUSEDRNN_SCHEDULE": "cluster"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stderr == ""
    assert result.stdout.startswith("True ")
    assert "fusedrnn_emulator" in result.stdout
