"""The Triton backend in Triton's interpreter: every schedule and kind of plan, against the reference.

The interpreter runs the programs of a launch one after the other, so what they hand over is proven for a
launch per step, and waiting by itself; tests/triton_proof.py compiles the same kernels for GPUs.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fusedrnn
from fusedrnn import libraries
from fusedrnn.cells import CELL_BY_ID, CELLS, Cell, register_cell
from fusedrnn.functional import sequence
from fusedrnn.triton import call, launch, ops, schedule
from fusedrnn.triton.plan import DEMANDS, Device, Plan, Problem, cost, explain, persistent_plans, plans
from fusedrnn.triton.sequence import arrive, narrow, wait

from . import triton_proof
from .problems import Shape, make_problem, relative_error
from .proof import triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Relative L2 error against the reference in the same dtype. It adds in another order, and carries in fp32 the
# gradients of gates, which the kernels round for their products. Unit roundoff: 6e-8; of 16 bits 4e-3, 5e-4.
TOLERANCE = {F64: 1e-12, F32: 2e-6, BF16: 2e-2, F16: 3e-3}
ON_CHIP = Plan("grid", 100, 2, 2, 8, 16, 16, 1, 2)
# For 20 units, two slices of them, neither full where there are two.
PLANS = {
    "block": Plan("block", 100, 1, 1, 16, 32, 32, 1, 4),
    "on chip": ON_CHIP,
    "from L2": ON_CHIP._replace(chunks=0, at_once=1),  # and a launch for each group
    "one slice": Plan("grid", 100, 1, 2, 8, 32, 16, 1, 4),
    "stepwise": None,
}
H200 = Device(multiprocessors=132, shared_bytes=227 << 10)
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "minimal_gated_unit.py"
PAGE = ROOT / "docs" / "writing_a_cell.md"


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Whatever is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan | None], None]:
    return lambda plan: monkeypatch.setattr(schedule, "_candidates", lambda *_: [plan])


@pytest.fixture(scope="module")
def mgu() -> Iterator[Cell]:
    """The cell that the example registers."""
    spec = importlib.util.spec_from_file_location("minimal_gated_unit", EXAMPLE)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield CELLS["mgu"]
    del CELL_BY_ID[CELLS.pop("mgu").id]


def assert_equals_reference(problem, tolerance=None):
    tolerance = tolerance or TOLERANCE[problem.x.dtype]
    for i, (a, b) in enumerate(zip(problem.results("triton"), problem.results("reference"), strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert relative_error(a, b) < tolerance, f"result {i} of {problem.cell}"  # NaN fails


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_equals_reference(run_by, plan, cell):
    run_by(PLANS[plan])
    reverse = [cell == "gru"]
    assert_equals_reference(make_problem(cell, Shape(3, 3, 5, 20), dtype=F32, reverse=reverse, packed=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_recurrences_and_batch_tiles(run_by, plan, packed):
    run_by(PLANS[plan])
    problem = make_problem("rnn_tanh", Shape(3, 17, 5, 20), dtype=F32, reverse=[False, True], packed=packed)
    assert_equals_reference(problem)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_16_bits(run_by, plan, dtype):
    run_by(PLANS[plan])
    cell = "lstm" if dtype == BF16 else "gru"
    assert_equals_reference(make_problem(cell, Shape(2, 2, 5, 20), dtype=dtype, bias=False))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [Shape(3, 4, 5, 7), Shape(3, 5, 6, 20, 11), Shape(1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_doubles_and_projections_go_step_by_step(cell, shape, packed):
    if not (shape.P and CELLS[cell].reads_h):
        assert_equals_reference(make_problem(cell, shape, reverse=[False, True], packed=packed))


def test_more_recurrences_than_a_launch_takes():
    reverse = [n % 3 == 0 for n in range(32)]
    assert_equals_reference(make_problem("rnn_tanh", Shape(2, 2, 3, 4), reverse=reverse, packed=True))


@pytest.mark.parametrize("plan", PLANS)
def test_runs_repeat_to_the_bit_and_inference_is_the_same(run_by, plan):
    run_by(PLANS[plan])
    problem = make_problem("lstm", Shape(2, 2, 3, 20), dtype=F32)
    first = problem.results("triton")
    with torch.no_grad():
        y, final = problem.run("triton")
    for a, b in zip([y, *final], first, strict=False):
        assert torch.equal(a, b)
    for a, b in zip(problem.results("triton"), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("outputs", [[0], [2]], ids=str)
@pytest.mark.parametrize("plan", ["block", "stepwise"])
def test_outputs_without_a_gradient(run_by, plan, outputs):
    run_by(PLANS[plan])
    problem = make_problem("lstm", Shape(3, 3, 5, 18), dtype=F32)
    grads = []
    for backend in ("triton", "reference"):
        leaves = problem.with_inputs([t.detach().requires_grad_() for t in problem.inputs])
        y, final = leaves.run(backend)
        grads.append(torch.autograd.grad([(y, *final)[i].pow(2).sum() for i in outputs], leaves.inputs))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < TOLERANCE[F32]


@pytest.mark.parametrize("plan", ["block", "on chip", "stepwise"])
def test_nan_stays_in_its_sample(run_by, plan):
    run_by(PLANS[plan])
    problem = make_problem("gru", Shape(3, 3, 5, 20), dtype=F32)
    with torch.no_grad():
        clean, _ = problem.run("triton")
        problem.x[1, 1] = math.nan
        y, _ = problem.run("triton")
    assert torch.equal(y[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(y[0], clean[0])
    assert y[1:, 1].isnan().all()


def test_half_overflow_becomes_inf(run_by):
    """GradScaler relies on it: a gradient beyond fp16's range is inf, not the largest number."""
    run_by(PLANS["block"])
    problem = make_problem("rnn_relu", Shape(2, 2, 3, 20), dtype=F16)
    inputs = [t.abs().requires_grad_() for t in problem.inputs]
    y, _ = problem.with_inputs(inputs).run("triton")
    grads = torch.autograd.grad(y, inputs, torch.full_like(y, 60000))
    assert any(g.isinf().any() for g in grads)
    assert not any(g.isnan().any() for g in grads)


def test_an_empty_batch():
    problem = make_problem("lstm", Shape(3, 0, 4, 20), dtype=F32, reverse=[False, True])
    for a, b in zip(problem.results("triton"), problem.results("reference"), strict=True):
        assert torch.equal(a, b)


def test_a_packed_batch_inside_a_cuda_graph(monkeypatch):
    """Its steps travel with kernels: a graph may hold no copy from host memory, nor what others overwrite."""
    problem = make_problem("gru", Shape(5, 4, 5, 20), dtype=F32, packed=True)
    problem.results("triton")
    one, other = (
        call.Call(CELLS["gru"], problem.x, problem.state, *map(list, problem.weights), [False], sizes, False)
        for sizes in (problem.batch_sizes, problem.batch_sizes)
    )
    kept = one.steps
    assert other.steps is kept
    monkeypatch.setattr(call, "capturing", lambda x: True)
    monkeypatch.setattr(Tensor, "to", None)
    captured = call._steps(one)
    assert captured is not kept
    assert torch.equal(captured, kept)
    lengths = (problem.batch_sizes[:, None] > torch.arange(4)).sum(0)
    assert captured.tolist() == [0, *problem.batch_sizes.cumsum(0).tolist(), *lengths.tolist()]


def test_the_first_call_cannot_be_captured(run_by, monkeypatch):
    run_by(PLANS["block"])
    problem = make_problem("lstm", Shape(2, 2, 3, 4), dtype=F32)
    monkeypatch.setattr(schedule, "capturing", lambda x: True)
    with torch.no_grad():
        problem.run("triton")  # another call has come before
        monkeypatch.setattr(schedule, "_status", {})
        with pytest.raises(RuntimeError, match="first call of a persistent kernel on cpu cannot be captured"):
            problem.run("triton")


def test_strided_tensors(run_by):
    run_by(PLANS["block"])
    problem = make_problem("gru", Shape(3, 3, 5, 18), dtype=F32, reverse=[False, True])
    strided = problem.with_inputs([torch.stack([t, t], -1)[..., 0] for t in problem.inputs])
    for a, b in zip(strided.results("triton"), problem.results("triton"), strict=True):
        assert torch.equal(a, b)


def test_opcheck():
    problem = make_problem("gru", Shape(2, 2, 3, 4), reverse=[True], packed=True, dtype=F32)
    inputs = [t.requires_grad_() for t in problem.inputs]
    assert all(t.requires_grad for t in inputs)
    weights = map(list, problem.weights)
    args = (1, problem.x, problem.state, *weights, problem.reverse, problem.batch_sizes, False)
    torch.library.opcheck(torch.ops.fusedrnn_triton.sequence_forward, args)


@pytest.mark.feature("torch.compile", backends=["triton"])
def test_compiles_to_one_graph():
    layer = fusedrnn.GRU(3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T, B in ((3, 2), (2, 3)):
        x = torch.randn(T, B, 3)
        results = []
        for module in (compiled, layer):
            with fusedrnn.use_backend("triton"):
                y, _ = module(x)
            results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(layer.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_bad_arguments_are_refused():
    problem = make_problem("lstm", Shape(2, 2, 3, 4), dtype=F32)
    layer = (0, problem.x, problem.state, *map(list, problem.weights), [False], None, False)
    y, final, saved = ops.sequence_forward(*layer)
    for arguments, message in (
        ((y[:1], saved, y, final), "y does not fit x"),
        ((y, [], y, final), "what sequence_forward returned"),
        ((y, [s.half() for s in saved], y, final), "what sequence_forward returned"),
        ((y, saved, y[:1], final), "dy does not fit x"),
        ((y, saved, y, final[:1]), "one gradient per state"),
        ((y, saved, y, [final[0], final[1][:, :1]]), "dfinal"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fusedrnn_triton.sequence_backward(*layer, *arguments, True, True)
    with pytest.raises(RuntimeError, match="no cell has number 99"):
        torch.ops.fusedrnn_triton.sequence(99, *layer[1:])


# Schedules


def test_a_schedule_can_be_demanded(monkeypatch):
    f32 = make_problem("gru", Shape(2, 2, 3, 4), dtype=F32)
    for demand, problem, message in (
        (
            "block",
            make_problem("gru", Shape(2, 2, 3, 4)),
            "cannot run gru forward: float64 runs step by step",
        ),
        ("grid", make_problem("lstm", Shape(2, 2, 3, 4, 2), dtype=F32), "a projection runs step by step"),
        ("block", f32, "FUSEDRNN_SCHEDULE=block cannot run gru forward: ieee fp32 products are too slow"),
        (
            "cluster",
            f32,
            "FUSEDRNN_SCHEDULE=cluster: choose stepwise, block, grid, grid:16, grid:32 or grid:64",
        ),
    ):
        monkeypatch.setenv("FUSEDRNN_SCHEDULE", demand)
        with pytest.raises(RuntimeError, match=message):
            problem.run("triton")
    used = []
    monkeypatch.setattr(launch, "forward", lambda call, f, plan, steps: used.append(plan) or call.state)
    for demand in ("stepwise", "block", "grid", "grid:32"):
        monkeypatch.setenv("FUSEDRNN_SCHEDULE", demand)
        make_problem("gru", Shape(2, 2, 3, 40), dtype=BF16).run("triton")
    assert [plan and plan.name for plan in used] == [None, "block", "grid:16", "grid:32"]


def test_the_fastest_plan_is_kept(monkeypatch):
    """The choice among timed plans, without a device: a plan that does not fit is passed over."""
    slow, misfit, fast = (ON_CHIP._replace(at_once=i) for i in range(3))
    clock = iter([5.0, 1.0])

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None

        def elapsed_time(self, end):
            return next(clock)

    def run(plan):
        if plan == misfit:
            raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert schedule._fastest([slow, misfit, fast], run) == fast


def test_registers_are_bound_until_nothing_is_spilled(monkeypatch):
    problem = make_problem("gru", Shape(2, 2, 3, 4), dtype=F32)
    layer = call.Call(
        CELLS["gru"], problem.x, problem.state, *map(list, problem.weights), [False], None, False
    )
    plan, spills, tried = ON_CHIP._replace(registers=224), {}, []
    assert sorted(plan.bounds) == sorted({0, 192, 224, 255})
    for found in (8, 2, 6, 4):
        tried.append(launch.bound_to_run(plan.bounds, spills, layer))
        spills[tried[-1]] = found
    assert tuple(tried) == plan.bounds
    assert tried[0] == 224
    assert launch.bound_to_run(plan.bounds, spills, layer) == tried[1]  # all spill: it does so least
    assert launch.bound_to_run(plan.bounds, {224: 8, 0: 0}, layer) == 0
    monkeypatch.setattr(launch, "capturing", lambda x: True)
    assert launch.bound_to_run(plan.bounds, {224: 8}, layer) == 224
    assert launch.bound_to_run(plan.bounds, {}, layer) == 224


def test_spills_are_remembered(run_by, monkeypatch):
    """A compiled kernel says how much it spills: the interpreter's stand in for them here."""
    run_by(ON_CHIP)
    kernel, asked = launch.persistent_forward, []

    class Spilling:
        def __getitem__(self, grid):
            def run(maxnreg, **arguments):
                asked.append(maxnreg)
                kernel[grid](**arguments)
                return SimpleNamespace(n_spills=8 if maxnreg is None else 0)

            return run

    monkeypatch.setattr(launch, "persistent_forward", Spilling())
    monkeypatch.setattr(launch, "_spills", {})
    problem = make_problem("rnn_tanh", Shape(1, 2, 3, 20), dtype=F32)
    with torch.no_grad():
        ys = [problem.run("triton")[0] for _ in range(3)]
    assert asked == [None, 255, 255]
    assert torch.equal(ys[0], ys[1])


passes = st.builds(
    Problem,
    backward=st.booleans(),
    gates=st.integers(1, 4),
    element_bytes=st.sampled_from([2, 4]),
    tensor_cores=st.booleans(),
    N=st.integers(1, 50),
    B=st.integers(0, 5000),
    H=st.integers(1, 50000),
)
devices = st.builds(
    Device, multiprocessors=st.integers(1, 200), shared_bytes=st.integers(48 << 10, 227 << 10)
)


@given(problem=passes, device=devices)
def test_every_plan_fits(problem, device):
    p = problem
    for plan in persistent_plans(p, device):
        assert plan.slices * plan.block_u >= p.H
        if plan.slices > 1:  # its programs wait for each other
            assert 0 < plan.slices * plan.at_once <= device.multiprocessors
        if plan.chunks:
            assert plan.chunks * plan.block_k >= p.H
            weights = p.gates * plan.chunks * plan.block_k * plan.block_u * p.element_bytes
            assert weights < device.shared_bytes
        assert p.N * p.B * p.gates * p.H < 1 << 31
        assert plan.block_u & (plan.block_u - 1) == 0
        assert p.tensor_cores or not plan.chunks  # no tile of ieee products is unrolled over all of K
    best, *others = plans(p, device)
    assert all(cost(best, p, device) <= cost(other, p, device) for other in others)
    told = explain(p, device)
    assert (told.schedule == "stepwise") == (best is None)
    assert {*told.candidates, *told.rejected} - {"weights on chip"} == set(DEMANDS) - {"grid"}
    assert (told.bytes_on_chip > 0) == bool(best and best.chunks)
    assert told.bytes_on_chip <= device.multiprocessors * device.shared_bytes


def test_plans_of_an_h200():
    def best(H, B=16, *, tensor_cores=True, backward=False):
        return plans(Problem(backward, 4, 2 if tensor_cores else 4, tensor_cores, 1, B, H), H200)[0]

    assert best(64).exchange == "block"
    for H in (512, 1024):  # weights stay on chip, in programs that leave none of the device waiting
        assert best(H).exchange == "grid"
        assert best(H).chunks
        assert best(H).slices * best(H).at_once <= H200.multiprocessors
    assert best(512, tensor_cores=False).chunks == 0
    assert best(4096, 256) is None
    assert best(100, 0) is None


def test_a_plan_is_explained():
    wide = Problem(False, 4, 2, True, 1, 100, 512)
    told = explain(wide, H200)
    assert (told.schedule, told.exchange, told.candidates[0]) == ("persistent", "grid", "grid:32")
    assert told.plan == "grid of 16 with 32 units of 16 sequences each, weights on chip"
    assert told.tiles["slices"] * told.tiles["at_once"] <= H200.multiprocessors
    assert (told.launches, told.tiles["at_once"]) == (1, 7)
    assert told.bytes_on_chip == told.tiles["at_once"] * 4 * 512 * 512 * 2
    assert "H=512 is above the 128 units" in told.rejected["block"]
    assert "times as long" in told.rejected["stepwise"]
    for problem, device, demand, chosen, name, why in (
        (wide._replace(single_step=True), H200, None, "stepwise", "grid:16", "a single step does not repay"),
        (wide._replace(double=True), H200, None, "stepwise", "block", "float64 runs step by step"),
        (wide._replace(projected=True), H200, None, "stepwise", "grid:64", "a projection runs step by step"),
        (wide._replace(B=0), H200, None, "stepwise", "block", "the batch is empty"),
        (wide._replace(B=1 << 20), H200, None, "stepwise", "grid:16", "would not fit 32 bits"),
        (wide, H200, "stepwise", "stepwise", "grid:32", "FUSEDRNN_SCHEDULE=stepwise"),
        (wide, H200._replace(multiprocessors=9), None, "stepwise", "grid:16", "its 32 programs wait"),
        (wide._replace(H=2048), H200, "grid", "persistent", "weights on chip", "H=2048 is above"),
        (wide._replace(H=992), Device(132, 99 << 10), "grid:64", "persistent", "weights on chip", "512 KiB"),
        (wide._replace(tensor_cores=False), H200, None, "persistent", "weights on chip", "ieee fp32"),
        (
            wide._replace(H=100),
            Device(132, 99 << 10),
            None,
            "persistent",
            "block",
            "128 KiB of a program, 87",
        ),
    ):
        told = explain(problem, device, demand)
        assert told.schedule == chosen
        assert why in told.rejected[name]


def test_waiting_ends_with_patience():
    @triton.jit
    def hand_over(counter, status, left, ARRIVALS: tl.constexpr):
        for _ in tl.static_range(ARRIVALS):
            arrive(counter)
        tl.store(left, wait(counter, 2, 5, status))

    for arrivals, patience, failed in ((2, 5, 0), (1, 0, 1)):
        counter, status, left = (torch.zeros(1, dtype=torch.int32) for _ in range(3))
        hand_over[(1,)](counter, status, left, arrivals)
        assert (left.item(), status.item()) == (patience, failed)


def test_a_wait_that_ended_is_reported_by_the_next_call(run_by):
    run_by(PLANS["block"])
    problem = make_problem("lstm", Shape(2, 2, 3, 4), dtype=F32)
    with torch.no_grad():
        problem.run("triton")
        schedule._status[problem.x.device].fill_(1)
        with pytest.raises(
            RuntimeError, match=r"\(lstm forward, block of 1 .*set FUSEDRNN_SCHEDULE=stepwise"
        ):
            problem.run("triton")
        problem.run("triton")


def test_rounds_to_nearest_even():
    @triton.jit
    def round_all(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y + i, narrow(tl.load(x + i, i < n, 0.0), y.dtype.element_ty), i < n)

    x = torch.cat(
        [torch.randn(1000), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 1.00390625])]
    )
    for dtype in (BF16, F16):
        y = torch.empty(x.numel(), dtype=dtype)
        round_all[(1,)](x, y, x.numel(), 1024)
        torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


# Backend


def test_why_triton_is_not_available(monkeypatch):
    reason = libraries.triton_reason.__wrapped__
    assert reason() == ""
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "needs triton 3.6 or newer, this is 3.5.1" in reason()
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(np, "__version__", "2.4.0")
    assert "needs numpy older than 2.4" in reason()
    monkeypatch.setattr(np, "__version__", "2.3.9")
    assert reason() == ""
    monkeypatch.setattr(triton, "__version__", "3.7.1+git1234")
    assert reason() == ""
    monkeypatch.delenv("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        assert "no CUDA device, and TRITON_INTERPRET=1 is not set" in reason()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "changed after triton had been imported" in reason()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton could not be imported" in reason()


def in_a_new_process(code: str, **settings: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "import sys, torch\n" + code]
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    return done.stdout


def test_a_model_through_the_triton_code():
    """As a user does it: a module, the backend forced by the environment, a schedule too."""
    code = (
        "import fusedrnn\n"
        "print('triton' in sys.modules)\n"
        "model = fusedrnn.LSTM(4, 20, bidirectional=True).bfloat16()\n"
        "y, _ = model(torch.randn(2, 3, 4).bfloat16())\n"
        "y.float().pow(2).sum().backward()\n"
        "print(all(p.grad.isfinite().all() for p in model.parameters()), y.grad_fn.name())\n"
    )
    said = in_a_new_process(code, TRITON_INTERPRET="1", FUSEDRNN_BACKEND="triton", FUSEDRNN_SCHEDULE="block")
    imported, finite, name = said.split(maxsplit=2)
    assert (imported, finite) == ("False", "True")
    assert "fusedrnn_triton" in name


def test_the_import_asks_for_neither_triton_nor_a_gpu():
    """Where there is a GPU as well: what is imported does not depend on it."""
    code = (
        "asked = []\n"
        "torch.cuda.is_available = lambda: asked.append(1) or True\n"
        "import fusedrnn\n"
        "print('triton' in sys.modules, len(asked))\n"
        "one, w = torch.ones(1, 1, 1), torch.ones(1, 1)\n"
        "try:\n"
        "    torch.ops.fusedrnn_triton.sequence(2, one, [one], [w], [w], [], [], [], [False], None, False)\n"
        "except RuntimeError as error:\n"
        "    print('triton' in sys.modules, error)\n"
    )
    first, second = in_a_new_process(code).splitlines()
    assert first == "False 0"
    assert second == "True x must be on a CUDA device, is on cpu"


def test_what_is_compiled_first_is_traced_without_the_kernels():
    code = (
        "import fusedrnn\n"
        "layer, x = fusedrnn.GRU(3, 4), torch.randn(2, 2, 3)\n"
        "compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')\n"
        "y, _ = compiled(x)\n"
        "y.sum().backward()\n"
        "print(torch.equal(y, layer(x)[0]), layer.weight_hh_l0.grad.isfinite().all().item())\n"
    )
    said = in_a_new_process(code, TRITON_INTERPRET="1", FUSEDRNN_BACKEND="triton")
    assert said.split() == ["True", "True"]


# A cell of one's own


def test_the_page_about_writing_a_cell(tmp_path):
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code) == 5
    program = tmp_path / "mgu.py"  # Triton reads the source of its functions
    program.write_text("\n".join([*code, "print(layer)\n"]))
    environment = {k: v for k, v in os.environ.items() if k not in ("FUSEDRNN_BACKEND", "FUSEDRNN_SCHEDULE")}
    done = subprocess.run(
        [sys.executable, program],
        env=environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    assert done.stdout == "Layer('mgu', 4, 20)\n"


@pytest.mark.parametrize("plan", PLANS)
def test_a_registered_cell_has_every_schedule(run_by, mgu, plan):
    run_by(PLANS[plan])
    assert_equals_reference(make_problem(mgu.name, Shape(2, 3, 5, 20), dtype=F32, packed=True))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_a_registered_cell(mgu, packed):
    problem = make_problem(mgu.name, Shape(2, 2, 2, 2), reverse=[packed], packed=packed)
    inputs = [t.requires_grad_() for t in problem.inputs]

    def run(*inputs):
        y, final = problem.with_inputs(list(inputs)).run("triton")
        return y, *final

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert packed or torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert_equals_reference(problem)


def test_a_registered_cell_as_a_layer(mgu):
    layer = fusedrnn.Layer("mgu", 3, 4, bidirectional=True, batch_first=True, dtype=F64)
    assert [tuple(p.shape) for p in layer.parameters()] == 2 * [(8, 3), (8, 4), (8,), (8,)]
    assert repr(layer) == "Layer('mgu', 3, 4, batch_first, bidirectional)"
    assert layer(torch.randn(2, 5, 3, dtype=F64))[0].shape == (2, 5, 8)  # by the reference: nothing is forced
    sequences = [torch.randn(n, 3, dtype=F64) for n in (2, 4, 3)]
    packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    state = (torch.randn(2, 3, 4, dtype=F64),)
    with fusedrnn.use_backend("triton"):
        y, final = layer(packed, state)
        padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        for i, x in enumerate(sequences):
            alone, (h,) = layer(x[None], (state[0][:, i : i + 1],))
            torch.testing.assert_close(padded[i, : lengths[i]], alone[0])
            torch.testing.assert_close(final[0][:, i : i + 1], h)


def test_a_layer_of_a_builtin_cell_is_torchs():
    ours, theirs = fusedrnn.Layer("lstm", 3, 4, bidirectional=True), torch.nn.LSTM(3, 4, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    (y, final), (y_theirs, final_theirs) = ours(x), theirs(x)
    for a, b in zip((y, *final), (y_theirs, *final_theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_what_serves_a_registered_cell(mgu):
    problem = make_problem("mgu", Shape(2, 2, 3, 4), dtype=F32)
    for backend, why in (
        ("cpu", "no kernel for the cell 'mgu'"),
        ("emulator", "no kernel for the cell 'mgu'"),
        ("torch", "the built-in has no cell 'mgu'"),
    ):
        with pytest.raises(RuntimeError, match=why):
            problem.run(backend)
    register_cell("torch_only", mgu.step, gates=2)
    try:
        problem.cell = "torch_only"
        assert torch.equal(problem.run()[0], problem.run("reference")[0])
        with pytest.raises(RuntimeError, match="no kernel for the cell 'torch_only'"):
            problem.run("triton")
    finally:
        del CELL_BY_ID[CELLS.pop("torch_only").id]
    with pytest.raises(ValueError, match="'gru' is registered already"):
        register_cell("gru", mgu.step, gates=2)
    with pytest.raises(ValueError, match="at least one gate and one state, got 0 and 1"):
        register_cell("none", mgu.step, gates=0)
    with pytest.raises(ValueError, match="unknown cell 'mgru'"):
        sequence("mgru", problem.x, problem.state, problem.weights)


# For a GPU


def test_compiles_ahead_of_time():
    """Every kind of plan of one cell and dtype; `make proof` compiles the others."""
    options = ["--architectures", "90", "--cells", "gru", "--dtypes", "bf16", "--brief"]
    rows = triton_proof.rows(*options, "--sizes", "128", "1041")
    assert {row["kernel"] for row in rows} == set(triton_proof.KERNELS)
    assert {row["kind"] for row in rows} == {"block", "grid, on chip", "grid, from L2", "stepwise"}
    assert [fault for row in rows if (fault := triton_kernels.faults(row))] == []


def test_faults_of_a_compiled_kernel():
    row = {
        "triton": "3.9.0", "kernel": "persistent_forward", "cell": "gru", "dtype": "tf32", "H": 64,
        "plan": "grid of 4 with 16 units of 8 sequences each, weights on chip", "architecture": 80,
        "stack": 0, "shared": 163 << 10, "acquires": 1, "releases": 1,
    }  # fmt: skip
    assert triton_kernels.faults(row) == ""
    assert triton_kernels.faults(row | {"stack": 8}).endswith("sm_80: 8 bytes of stack")
    assert "166913 bytes of shared" in triton_kernels.faults(row | {"shared": (163 << 10) + 1})
    assert "0 acquires and 1 releases" in triton_kernels.faults(row | {"acquires": 0})
    alone = row | {"plan": row["plan"].replace("of 4", "of 1")}
    assert "1 acquires and 1 releases" in triton_kernels.faults(alone)
    assert triton_kernels.faults(alone | {"acquires": 0, "releases": 0}) == ""
