"""The CPU kernels of AVX512-BF16, and the emulation that executes them where the processor lacks it."""

from __future__ import annotations

import math
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from fusedrnn import functional, reference
from fusedrnn.cells import CELLS
from fusedrnn.lib import _testing
from fusedrnn.variation import Variation

from . import instruction_sets
from .problems import Problem, Shape, make_problem

ROOT = Path(__file__).parents[1]
EMULATED = "avx512bf16" not in instruction_sets.supported()
# Not emulated: no compiler makes them of the kernels.
REFUSED = ("masked", "256 bits")

pytestmark = pytest.mark.skipif(
    "avx512bf16" not in instruction_sets.executable(),
    reason="the processor has no AVX-512 to emulate it with",
)


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


TINY, HUGE = Fraction(2) ** -126, Fraction(2) ** 128


def without_subnormal(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < TINY else value


def multiply_add(a: float, b: float, total: float) -> float:
    """a * b + total, rounded once to a float, to the nearest and even; subnormals are zeros."""
    a, b, total = map(without_subnormal, (a, b, total))
    product = a * b  # exact in fp64
    if not math.isfinite(product) or not math.isfinite(total):
        return product + total
    exact = Fraction(product) + Fraction(total)
    if exact == 0:
        return product + total  # with its sign
    exponent = math.floor(math.log2(abs(exact.numerator))) - math.floor(math.log2(exact.denominator))
    exponent -= abs(exact) < Fraction(2) ** exponent
    ulp = Fraction(2) ** (exponent - 23)
    rounded = round(exact / ulp) * ulp  # ties to even
    if abs(rounded) >= HUGE:
        return math.copysign(math.inf, exact)
    return without_subnormal(math.copysign(float(abs(rounded)), exact))


def expected_dot(total: int, a: int, b: int) -> float:
    """The odd values of a pair first."""
    odd = multiply_add(float_of(a & 0xFFFF0000), float_of(b & 0xFFFF0000), float_of(total))
    return multiply_add(float_of(a << 16 & 0xFFFFFFFF), float_of(b << 16 & 0xFFFFFFFF), odd)


SPECIAL = (0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x8080, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF7F, 0x3F80)


def random_lanes(generator: random.Random, special: bool) -> tuple[list[int], list[int], list[int]]:
    """Sums and two vectors of pairs: ordinary, or zeros, subnormals, infinities, NaNs and the largest."""

    def value() -> int:
        if special and generator.random() < 0.4:
            return generator.choice(SPECIAL)
        if special and generator.random() < 0.5:
            return generator.randrange(0x10000)
        return bits_of(generator.gauss(0, 1)) >> 16

    def total() -> int:
        return value() << 16 | (generator.randrange(0x10000) if generator.random() < 0.5 else 0)

    def pair() -> int:
        return value() | value() << 16

    return [total() for _ in range(16)], [pair() for _ in range(16)], [pair() for _ in range(16)]


@pytest.fixture
def emulation():
    if EMULATED:
        _testing.emulate_bf16_dot()


@pytest.mark.parametrize("form", [form for form in _testing.bf16_dot_forms() if form not in REFUSED])
@pytest.mark.parametrize("special", [False, True])
def test_instruction(emulation, form, special):
    """By a processor that has it, too: then it is the reference that is put to the test."""
    generator = random.Random(form)
    before = _testing.bf16_dots()
    for _ in range(50):
        total, a, b = random_lanes(generator, special)
        found = _testing.bf16_dot(form, total, a, b)
        if form == "broadcast":
            b = b[:1] * 16
        for lane in range(16):
            expected = expected_dot(total[lane], a[lane], b[lane])
            if math.isnan(expected):
                assert math.isnan(float_of(found[lane]))
            else:
                assert found[lane] == bits_of(expected), (total[lane], a[lane], b[lane])
    assert _testing.bf16_dots() - before == 50 * EMULATED


@pytest.mark.skipif(not EMULATED, reason="the processor has the instruction")
@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_emulated_ends_the_process(form, emulate):
    zeros = [0] * 16
    script = f"""
from fusedrnn.lib import _testing
if {emulate}: _testing.emulate_bf16_dot()
_testing.bf16_dot({form!r}, {zeros}, {zeros}, {zeros})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGILL


def check_steps(problem: Problem, peephole: Sequence[torch.Tensor] = ()) -> None:
    """Every step of a forward pass against the same step in fp64, from the states that the kernel had."""
    cell, N, H = CELLS[problem.cell], len(problem.reverse), problem.state[-1].size(-1)
    leaves = problem.with_inputs([t.detach().requires_grad_() for t in problem.inputs])
    y, _, _ = functional.layer(
        problem.cell,
        leaves.x,
        leaves.state,
        leaves.weights,
        **problem.options,
        variation=Variation(peephole=peephole),
    )
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == (*y.shape[:-1], N, H)]
    kept = saved[len(saved) - cell.states + 1 :]  # after h as it is before a projection
    assert all(t.dtype == torch.float32 for t in kept)
    states = [y.detach().flatten(0, -2).unflatten(-1, (N, -1)), *(t.detach().flatten(0, -3) for t in kept)]
    x = problem.x.flatten(0, -2)
    packed = problem.batch_sizes is not None
    sizes = problem.batch_sizes.tolist() if packed else [problem.x.size(1)] * problem.x.size(0)
    offsets = [0, *accumulate(sizes)]
    exact = problem.to(torch.float64)
    for n, backwards in enumerate(problem.reverse):
        weights = [group[n : n + 1] for group in exact.weights]
        one = Variation(peephole=[p.double() for p in peephole[n : n + 1]])
        for t, size in enumerate(sizes):
            before = t + 1 if backwards else t - 1
            alive = min(size, sizes[before]) if 0 <= before < len(sizes) else 0
            state = []
            for initial, steps in zip(exact.state, states, strict=True):
                reached = steps[offsets[before] :][:alive, n] if alive else steps[:0, n]
                state.append(torch.cat([reached.double(), initial[n, alive:size]])[None])
            rows = slice(offsets[t], offsets[t] + size)
            _, after, _ = reference.layer(cell, x[None, rows].double(), state, *weights, [False], None, one)
            for s, (steps, expected) in enumerate(zip(states, after, strict=True)):
                found = steps[rows, n].double()
                # h has half a unit of bfloat16, what is carried in fp32 a few of its own
                rtol = 2**-8 if s == 0 else 1e-6
                torch.testing.assert_close(found, expected[0], rtol=rtol, atol=2e-6)


# Odd and even widths of x and h; one row and several; chunks of the batch and slices of the units; one window
# of x and more. W_ih is not packed for up to 8 rows of x; nor is W_hh for one row, if a thread has over a
# megabyte of it.
CASES = (
    ("lstm", Shape(7, 3, 5, 33)),
    ("lstm", Shape(3, 16, 8, 64)),
    ("lstm", Shape(16, 9, 33, 20)),
    ("lstm", Shape(4, 5, 8, 40, 11)),
    ("lstm", Shape(1, 1, 7, 19)),
    ("lstm", Shape(1, 1, 9, 16, 5)),
    ("lstm", Shape(10, 1, 33, 401)),
    ("lstm", Shape(9, 1, 8, 520)),
    ("lstm_peephole", Shape(7, 3, 5, 33)),
    ("lstm_peephole", Shape(3, 1, 8, 70)),
    ("gru", Shape(6, 9, 5, 33)),
    ("gru", Shape(1, 3, 33, 40)),
    ("gru", Shape(3, 1, 8, 256)),
    ("gru", Shape(9, 1, 1, 601)),
    ("rnn_tanh", Shape(5, 4, 33, 130)),
    ("rnn_tanh", Shape(2, 4, 1, 130)),
    ("rnn_tanh", Shape(12, 1, 3, 201)),
    ("rnn_relu", Shape(17, 9, 20, 17)),
)


def check_forward() -> None:
    """What the test below runs in a process of its own."""
    instruction_sets.emulate_bf16_dot()
    assert _testing.isa() == "avx512bf16"
    generator = torch.Generator().manual_seed(1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for cell, shape in CASES:
            wide = shape.H > 400
            for packed in (False,) if wide or shape.T == 1 else (False, True):
                before = _testing.bf16_dots()
                problem = make_problem(
                    cell.removesuffix("_peephole"),
                    shape,
                    dtype=torch.bfloat16,
                    reverse=[False] if wide else [False, True],
                    packed=packed,
                    bias=shape.H != 64,
                )
                print(cell, shape, packed, threads, file=sys.stderr)
                peephole = torch.randn(len(problem.reverse), 3, shape.H, generator=generator).bfloat16()
                check_steps(problem, [*peephole] if "peephole" in cell else [])
                assert (_testing.bf16_dots() > before) == EMULATED
    print("equal")


def run_in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSEDRNN_BACKEND": "cpu", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_step_of_the_forward_pass():
    code = "from tests.test_bf16_dot import check_forward; check_forward()"
    done = run_in_process(code, MALLOC_PERTURB_="85")  # memory that nobody wrote is a large number
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_dtypes_have_the_bits_of_avx512(dtype, tmp_path):
    code = f"""
import torch
from tests import instruction_sets
from tests.problems import Shape, make_problem
instruction_sets.emulate_bf16_dot()
problem = make_problem("lstm", Shape(6, 9, 5, 33), dtype={dtype})
torch.save(problem.results("cpu"), {str(tmp_path / "results")!r})
"""
    found = []
    for isa in ("avx512", "avx512bf16"):
        done = run_in_process(code, FUSEDRNN_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / "results"))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_stays_in_the_cache_is_bfloat16():
    code = """
import torch, fusedrnn
from tests import instruction_sets
instruction_sets.emulate_bf16_dot()
found = fusedrnn.explain(fusedrnn.LSTM(8, 64).bfloat16(), torch.zeros(3, 2, 8, dtype=torch.bfloat16))
for run in found.layers[0].passes:
    print(run.direction, run.on_chip["cache"] * run.tiles["unit_slices"])
"""
    done = run_in_process(code, FUSEDRNN_CPU_ISA="avx512bf16")
    assert done.stdout == f"forward {4 * 64 * 64 * 2}\nbackward {4 * 64 * 64 * 4}\n", done.stderr


def test_the_set_is_not_forced_on_a_processor_that_lacks_it():
    done = run_in_process(
        "from fusedrnn.lib import _testing; print(_testing.isa())", FUSEDRNN_CPU_ISA="avx512bf16"
    )
    if EMULATED:
        assert "FUSEDRNN_CPU_ISA=avx512bf16: this processor lacks it" in done.stderr
    else:
        assert done.stdout == "avx512bf16\n"
