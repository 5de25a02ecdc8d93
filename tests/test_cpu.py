"""The CPU kernels: native units, instruction sets, threads, memory, repeatability."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fusedrnn
from fusedrnn import env
from fusedrnn.cells import CELLS, PEEPHOLE, lstm_step
from fusedrnn.lib import _testing

from . import instruction_sets
from .problems import Shape, make_problem, relative_error

ROOT = Path(__file__).parent.parent


NATIVE = {**CELLS, PEEPHOLE.name: PEEPHOLE}
PARAMS = {PEEPHOLE.name: 3}


@pytest.mark.parametrize("name", NATIVE)
def test_cell_forward_is_the_reference_step(name):
    cell, native = NATIVE[name], getattr(_testing, name)
    param = torch.randn(PARAMS.get(name, 0), 1, dtype=torch.float64)
    gx, gh = torch.randn(2, 20, cell.gates, 1, dtype=torch.float64)
    state = torch.randn(cell.states, 20, 1, dtype=torch.float64)
    others = {"peephole": param} if name in PARAMS else {}
    expected = (lstm_step if others else cell.step)(gx, gh, tuple(state), **others)
    for i in range(20):
        values, _ = native.forward(
            gx[i].flatten().tolist(),
            gh[i].flatten().tolist(),
            state[:, i].flatten().tolist(),
            param.flatten().tolist(),
        )
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64), torch.stack([s[i, 0] for s in expected])
        )


@pytest.mark.parametrize("name", NATIVE)
def test_cell_backward_is_the_derivative_of_its_forward(name):
    """Central differences of the C++ forward in fp64, through every output and every input."""
    cell, native = NATIVE[name], getattr(_testing, name)
    rng = np.random.default_rng(0)
    G, S, step = cell.gates, cell.states, 1e-6
    K = PARAMS.get(name, 0)
    for _ in range(10):
        inputs = rng.normal(size=2 * G + S + K)
        if name == "rnn_relu" and abs(inputs[0] + inputs[1]) < 0.01:
            continue  # not differentiable at zero

        def forward(v):
            return native.forward(*map(list, np.split(v, [G, 2 * G, 2 * G + S])))

        dnext = rng.normal(size=S)
        state, saved = forward(inputs)
        *_, before, param = map(list, np.split(inputs, [G, 2 * G, 2 * G + S]))
        dgx, dgh, dstate, dparam = native.backward(list(dnext), saved, before, state, param)
        for i, analytic in enumerate([*dgx, *dgh, *dstate, *dparam]):
            offset = np.zeros_like(inputs)
            offset[i] = step
            numeric = np.dot(dnext, np.subtract(forward(inputs + offset)[0], forward(inputs - offset)[0])) / (
                2 * step
            )
            assert math.isclose(numeric, analytic, rel_tol=1e-6, abs_tol=1e-8)


@pytest.mark.parametrize("name", CELLS)
def test_cell_refuses_wrong_counts(name):
    with pytest.raises(ValueError, match="expected"):
        getattr(_testing, name).forward([0.0] * 9, [0.0] * 9, [0.0])


@pytest.mark.parametrize(
    ("function", "exact"), [("tanh", np.tanh), ("sigmoid", lambda x: 1 / (1 + np.exp(-x)))]
)
def test_vector_functions_are_accurate(function, exact):
    magnitudes = np.float32(2.0) ** np.linspace(-30, 6.4, 40001, dtype=np.float32)
    x = np.concatenate([-magnitudes, magnitudes, [0.0]]).astype(np.float32)
    ours = np.array(_testing.apply(function, x.tolist()), dtype=np.float32)
    expected = exact(x.astype(np.float64))
    # Where the result is a normal number. A polynomial, a reconstruction and a division: a few roundings.
    normal = np.abs(expected) > np.finfo(np.float32).tiny
    ulp = np.spacing(np.abs(expected[normal]).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(ours[normal] - expected[normal]) / ulp) < 4
    assert np.all(np.abs(ours[~normal] - expected[~normal]) < 1e-37)


@pytest.mark.parametrize("function", ["tanh", "sigmoid"])
def test_vector_functions_at_the_edges(function):
    values = _testing.apply(function, [math.inf, -math.inf, math.nan, 1e38, -1e38, 0.0])
    low = -1.0 if function == "tanh" else 0.0
    assert values[0] == values[3] == 1.0
    assert values[1] == pytest.approx(low, abs=1e-37)
    assert values[4] == pytest.approx(low, abs=1e-37)
    assert math.isnan(values[2])
    assert values[5] == (0.0 if function == "tanh" else 0.5)


@pytest.mark.parametrize(("function", "dtype"), [("bfloat16", torch.bfloat16), ("half", torch.float16)])
def test_rounding_is_that_of_torch(function, dtype):
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32)
    ties = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + 2**15
    )  # half way between two bf16 values
    small = torch.randn(100_000) * 1e-6  # subnormal in fp16
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), small, small * 1e9])
    x = x[(x.abs() > 2.0**-126) | x.isnan() | (x == 0)]  # arithmetic on fp32 subnormals may flush them
    ours = torch.tensor(_testing.apply(function, x.tolist()))
    expected = x.to(dtype).float()
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(7, math.inf, -math.inf), expected.nan_to_num(7, math.inf, -math.inf))


# N, B, H, bytes_hh, projected, units_per_slice, threads, cache_bytes -> row_chunks, unit_slices
MB = 1 << 20
PLANS = {
    "one thread": ((1, 32, 256, MB // 2, False, 64, 1, MB), (1, 1)),
    "a direction a thread": ((2, 32, 256, MB // 2, False, 64, 2, MB), (1, 1)),
    "batch over threads": ((1, 32, 256, MB // 2, False, 64, 2, MB), (2, 1)),
    "directions and batch": ((2, 32, 256, MB // 2, False, 64, 8, MB), (4, 1)),
    "one row, short step": ((1, 1, 64, MB // 16, False, 64, 2, MB), (1, 1)),
    "one row, long step": ((1, 1, 512, 4 * MB, False, 64, 2, MB), (1, 2)),
    "few rows, weights beyond the cache": ((1, 8, 512, 4 * MB, False, 64, 2, MB), (1, 2)),
    "few rows, weights in the cache": ((1, 8, 128, MB // 4, False, 64, 2, MB), (2, 1)),
    "many rows, weights that leave no room in the cache": ((1, 64, 256, MB, False, 64, 2, MB), (1, 2)),
    "no more slices than units": ((1, 1, 512, 4 * MB, False, 64, 64, MB), (1, 8)),
    "no more slices than the hand-over holds": ((1, 1, 8192, 1024 * MB, False, 64, 256, MB), (1, 64)),
    "a projection is not cut": ((1, 1, 512, 4 * MB, True, 64, 2, MB), (1, 1)),
    "no more chunks than rows": ((1, 3, 64, MB // 16, False, 64, 8, MB), (3, 1)),
    "empty batch": ((1, 0, 64, MB // 16, False, 64, 8, MB), (1, 1)),
}


@pytest.mark.parametrize("name", PLANS)
def test_resident_plan(name):
    arguments, expected = PLANS[name]
    assert _testing.plan_resident(*arguments) == expected


def test_balanced_rows():
    assert _testing.balanced_rows([4, 4, 4], 2) == [0, 2, 4]
    # One long sequence and three short ones: the long one is a chunk of its own.
    assert _testing.balanced_rows([4, 1, 1, 1], 2) == [0, 1, 4]
    assert _testing.balanced_rows([3] * 5, 3) == [0, 1, 2, 3]
    for sizes in ([5, 5, 3, 1], [9], [2, 1], [7, 7, 7, 6, 1, 1, 1]):
        for chunks in range(1, sizes[0] + 1):
            bounds = _testing.balanced_rows(sizes, chunks)
            assert bounds[0] == 0
            assert bounds[-1] == sizes[0]
            assert len(bounds) == chunks + 1
            assert all(a < b for a, b in pairwise(bounds))


# Wide and narrow, projected and packed; H=200 at B=1 is cut by units, and bf16 rounds at every step. Of few
# rows the weights are not packed; of many the input is multiplied for some steps at a time.
SCRIPT = """
import sys, torch
from fusedrnn.lib import _testing
from tests import instruction_sets
from tests.problems import Shape, make_problem, relative_error
if sys.argv[1] == "avx512bf16":
    instruction_sets.emulate_bf16_dot()
assert _testing.isa() == sys.argv[1] or sys.argv[1] == "any", _testing.isa()
for threads in (1, 2):
    torch.set_num_threads(threads)
    for cell, *shape in (
        ("lstm", 3, 9, 5, 33),
        ("gru", 3, 7, 5, 70),
        ("rnn_tanh", 4, 1, 3, 200),
        ("rnn_relu", 2, 5, 3, 64),
        ("lstm", 3, 1, 8, 256),
        ("gru", 3, 1, 8, 256),
        ("lstm", 3, 5, 8, 40, 11),
        ("lstm", 1, 1, 7, 19),
        ("gru", 1, 3, 33, 40),
        ("rnn_tanh", 2, 4, 1, 130),
        ("lstm", 1, 1, 9, 16, 5),
        ("gru", 20, 9, 9, 48),
        ("rnn_relu", 17, 9, 20, 17),
    ):
        for packed in (False, True):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)):
                problem = make_problem(cell, Shape(*shape), dtype=dtype, reverse=[False, True], packed=packed)
                for a, b in zip(problem.results("cpu"), problem.results("reference"), strict=True):
                    assert relative_error(a, b) < tolerance, (cell, shape, packed, dtype)
# bfloat16 weights are read as they are: one step is that of floats. Pairs are added up in another order.
rtol, atol = (2**-7, 1e-6) if _testing.isa() == "avx512bf16" else (0, 0)
for cell in ("lstm", "gru", "rnn_tanh"):
    for B, I, H in ((1, 64, 64), (1, 19, 35), (9, 33, 40), (16, 64, 80)):
        problem = make_problem(cell, Shape(1, B, I, H), dtype=torch.bfloat16)
        (y, final), (exact_y, exact_final) = problem.run("cpu"), problem.to(torch.float32).run("cpu")
        for a, b in zip((y, *final), (exact_y, *exact_final), strict=True):
            assert torch.allclose(a, b.bfloat16(), rtol, atol), (cell, B, I, H)
print("equal")
"""


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("isa", env.CPU_ISAS)
def test_every_instruction_set(isa):
    result = run_script(isa, FUSEDRNN_CPU_ISA=isa)
    if isa in instruction_sets.executable():
        assert result.stdout == "equal\n", result.stderr
    else:
        assert f"FUSEDRNN_CPU_ISA={isa}: this processor lacks it" in result.stderr


def test_unknown_instruction_set_is_refused():
    result = run_script("any", FUSEDRNN_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "FUSEDRNN_CPU_ISA=sse9: choose one of avx512bf16, avx512, avx2, portable" in result.stderr


def test_memory_nobody_wrote_is_not_read():
    """The C library fills what it allocates with a large number; torch's allocations are poisoned below."""
    result = run_script("any", MALLOC_PERTURB_="85")
    assert result.stdout == "equal\n", result.stderr


@pytest.fixture
def poisoned():
    """torch.empty yields NaN, for the ops' outputs and workspaces too; only deterministic algorithms run."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_poisoned_memory_and_bit_equal_repeats(poisoned, cell, packed):
    assert torch.empty(3).isnan().all()
    for shape in (Shape(6, 9, 5, 33), Shape(5, 1, 4, 200), *([Shape(4, 5, 8, 40, 11)] * (cell == "lstm"))):
        for dtype in (torch.float32, torch.bfloat16):
            problem = make_problem(cell, shape, dtype=dtype, reverse=[False, True], packed=packed)
            first = problem.results("cpu")
            assert all(t.isfinite().all() for t in first)
            for _ in range(5):
                assert all(torch.equal(a, b) for a, b in zip(problem.results("cpu"), first, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("cell", CELLS)
def test_any_number_of_threads_gives_the_same_recurrence(threads, cell):
    """More threads than cores included, down to one row a thread, whose cells are run in pairs of units.

    Only whole-sequence products may differ, in their last bits.
    """
    for shape in (Shape(20, 1, 8, 300), Shape(9, 13, 8, 65), Shape(60, 8, 8, 70)):
        problem = make_problem(cell, shape, dtype=torch.float32)
        threads(1)
        single = problem.results("cpu")
        for count in (2, 3, 8):
            threads(count)
            for a, b in zip(problem.results("cpu"), single, strict=True):
                assert relative_error(a, b) < 1e-5


def test_called_from_several_threads_at_once():
    problems = [make_problem(cell, Shape(30, 1, 6, 300), dtype=torch.float32, seed=3) for cell in CELLS] * 3
    expected = [p.results("cpu") for p in problems]
    barrier = threading.Barrier(len(problems))

    def work(problem):
        barrier.wait()
        return [problem.results("cpu") for _ in range(5)]

    with ThreadPoolExecutor(len(problems)) as pool:
        for repeats, results in zip(pool.map(work, problems), expected, strict=True):
            for again in repeats:
                for a, b in zip(again, results, strict=True):
                    assert relative_error(a, b) < 1e-6


def test_called_inside_a_parallel_region():
    """Autograd's worker threads run backwards of independent graphs; a nested region gets one thread."""
    layer = fusedrnn.LSTM(8, 300)
    x = torch.randn(12, 1, 8)
    expected = layer(x)[0]
    futures = [torch.jit.fork(layer, x) for _ in range(8)]
    for future in futures:
        torch.testing.assert_close(torch.jit.wait(future)[0], expected)


class Encoded(Dataset):
    def __init__(self):
        self.layer = fusedrnn.GRU(4, 6)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(torch.full((3, 4), float(i)))[0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_inside_a_data_loader_worker(start):
    data = Encoded()
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=start)
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack([data[i] for i in range(6)]))


def resident_bytes():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow():
    problem = make_problem("lstm", Shape(20, 4, 16, 32), dtype=torch.float32, reverse=[False, True])
    packed = make_problem("gru", Shape(20, 4, 16, 32), dtype=torch.bfloat16, packed=True)

    def calls(n):
        for _ in range(n):
            problem.results("cpu")
            packed.results("cpu")
            packed.run("cpu")

    calls(50)
    before = resident_bytes()
    calls(350)  # over a thousand
    # A leaked y, 20 * 4 * 64 floats, would be 7 MB; a leaked tensor, 200 bytes in each of 20 places, 4 MB.
    assert resident_bytes() - before < 1_500_000
