"""One layer: every backend against the reference and against fp64, values, states and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedrnn
from fusedrnn import reference
from fusedrnn.cells import CELLS
from fusedrnn.functional import Weights, sequence

from .problems import DIRECTIONS, KERNELS, SHAPES, Shape, make_problem, relative_error

CELL_NAMES = tuple(CELLS)
PROJECTED = (Shape(4, 5, 8, 40, 11), Shape(3, 4, 8, 140, 70), Shape(1, 1, 2, 3, 1))

# Relative L2 error of a result against the reference in fp64. fp32: unit roundoff 6e-8 times sums of a few
# hundred terms. 16-bit: inputs, h and results are each rounded to 8 or 11 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def assert_close(problem, backend, tolerance, expected=None):
    ours = problem.results(backend)
    expected = problem.results("reference") if expected is None else expected
    assert len(ours) == len(expected)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.shape == b.shape
        assert relative_error(a, b) < tolerance, f"result {i} of {problem.cell}"  # NaN fails


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reverse", DIRECTIONS, ids=str)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_cpu_equals_reference(cell, reverse, dtype):
    for shape in SHAPES[1:]:
        for packed in (False, True):
            for bias in (True, False):
                problem = make_problem(cell, shape, dtype=dtype, reverse=reverse, packed=packed, bias=bias)
                assert_close(problem, "cpu", TOLERANCE[dtype])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_smallest_problem(cell, backend):
    assert_close(make_problem(cell, SHAPES[0]), backend, 1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", PROJECTED, ids=str)
def test_projection(shape, dtype, backend):
    for packed in (False, True):
        problem = make_problem("lstm", shape, dtype=dtype, reverse=[False, True], packed=packed)
        assert_close(problem, backend, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu"])
def test_projection_of_other_cells(cell, backend):
    assert_close(make_problem(cell, PROJECTED[0], reverse=[False, True]), backend, 1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_builtin_equals_reference(cell, packed):
    problem = make_problem(cell, Shape(5, 4, 3, 6), reverse=[False, True], packed=packed)
    assert_close(problem, "torch", 1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_more_recurrences_than_directions(cell, backend):
    """N is general: three recurrences, in any mix of directions, equal three calls."""
    problem = make_problem(cell, Shape(4, 3, 5, 7), reverse=[True, False, True])
    y, final = problem.run(backend)
    for n, reverse in enumerate(problem.reverse):
        one = Weights(*([group[n]] if group else [] for group in problem.weights))
        with fusedrnn.use_backend(backend):
            y_n, final_n = sequence(
                cell, problem.x, [s[n : n + 1] for s in problem.state], one, reverse=[reverse]
            )
        torch.testing.assert_close(y[..., n * 7 : (n + 1) * 7], y_n, rtol=0, atol=0)
        for a, b in zip(final, final_n, strict=True):
            torch.testing.assert_close(a[n : n + 1], b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_no_less_accurate_than_the_builtin(cell, dtype):
    """Error against fp64 at moderate T: at most twice the built-in's of the same dtype, and a cap."""
    problem = make_problem(cell, Shape(20, 8, 24, 48), dtype=dtype)
    exact = problem.to(torch.float64).results("reference")
    for i, (a, b, c) in enumerate(zip(problem.results("cpu"), problem.results("torch"), exact, strict=True)):
        ours, builtin = relative_error(a, c), relative_error(b, c)
        assert ours <= 2 * builtin + torch.finfo(dtype).eps / 8, f"result {i}: {ours} against {builtin}"
        assert ours < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_teacher_forced_residual(cell, packed):
    """Each step recomputed in fp64 from the kernel's own previous state."""
    problem = make_problem(cell, Shape(64, 4, 32, 96), dtype=torch.float32, packed=packed)
    leaves = problem.with_inputs([t.detach().requires_grad_() for t in problem.inputs])
    with fusedrnn.use_backend("cpu"):
        y, _ = sequence(cell, leaves.x, leaves.state, leaves.weights, **problem.options)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    kept = [t for t in saved if t.shape == (*y.shape[:-1], 1, 96)]
    assert len(kept) == CELLS[cell].states - 1
    exact = problem.to(torch.float64)
    sizes = problem.batch_sizes.tolist() if packed else [4] * 64
    steps = [problem.x.reshape(-1, 32).split(sizes), y.detach().reshape(-1, 96).split(sizes)]
    steps += [c.detach().reshape(-1, 96).split(sizes) for c in kept]
    previous = [s[0].double() for s in problem.state]
    worst = 0.0
    for x_t, *state_t in zip(*steps, strict=True):
        alive = [s[None, : x_t.size(0)] for s in previous]
        _, expected = reference.sequence(
            CELLS[cell], x_t[None].double(), alive, *exact.weights, [False], None
        )
        for a, b in zip(state_t, expected, strict=True):
            worst = max(worst, float((a.double() - b[0]).abs().max()))
        previous = [s.double() for s in state_t]
    # fp32 at default initialisation: a few units of 6e-8 from gates of up to 128 terms each
    assert 0 < worst < 2e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cell=st.sampled_from(CELL_NAMES),
    shape=st.builds(
        Shape, st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(1, 90), st.just(0)
    ),
    reverse=st.sampled_from(DIRECTIONS),
    packed=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_shape(cell, shape, reverse, packed, bias, dtype, seed):
    problem = make_problem(cell, shape, dtype=dtype, reverse=reverse, packed=packed, bias=bias, seed=seed)
    assert_close(problem, "cpu", 2 * TOLERANCE[dtype])  # a single unit has no sum to average its rounding


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_inference_equals_training_to_the_bit(cell, packed):
    problem = make_problem(
        cell, Shape(7, 9, 11, 50), dtype=torch.float32, reverse=[False, True], packed=packed
    )
    trained = problem.results("cpu")
    y, final = problem.run("cpu")
    assert not y.requires_grad
    for a, b in zip((y, *final), trained, strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize("layout", ["batch_first", "expanded", "sliced"])
def test_strided_tensors(cell, layout, backend):
    problem = make_problem(cell, Shape(4, 6, 5, 20))
    if layout == "batch_first":
        strided = [problem.x.transpose(0, 1).contiguous().transpose(0, 1)]
        strided += [s.transpose(1, 2).contiguous().transpose(1, 2) for s in problem.state]
        strided += [w.t().contiguous().t() if w.dim() == 2 else w for g in problem.weights for w in g]
    elif layout == "expanded":
        strided = [problem.x[:1].expand(4, 6, 5)] + [s[:, :1].expand(1, 6, 20) for s in problem.state]
        strided += [w[:1].expand_as(w) for g in problem.weights for w in g]
    else:
        strided = [torch.stack([t, t], -1)[..., 0] for t in problem.inputs]
    assert any(not t.is_contiguous() for t in strided)
    ours = problem.with_inputs(strided).results(backend)
    dense = problem.with_inputs([t.contiguous() for t in strided]).results("reference")
    for a, b in zip(ours, dense, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_gradients_that_nobody_asked_for(cell, backend):
    """Any subset of inputs may need a gradient, and any subset of outputs may have one."""
    problem = make_problem(cell, Shape(4, 3, 5, 7), reverse=[False, True])
    y, final = problem.with_inputs([t.requires_grad_() for t in problem.inputs]).run("reference")
    for outputs in ([y], [final[-1]], [y, *final]):
        expected = torch.autograd.grad([t.sum() for t in outputs], problem.inputs, retain_graph=True)
        for i in range(len(problem.inputs)):
            inputs = [t.detach().requires_grad_(i == j) for j, t in enumerate(problem.inputs)]
            y_i, final_i = problem.with_inputs(inputs).run(backend)
            chosen = [(y_i, *final_i)[[id(t) for t in (y, *final)].index(id(o))] for o in outputs]
            (grad,) = torch.autograd.grad([t.sum() for t in chosen], [inputs[i]])
            torch.testing.assert_close(grad, expected[i], rtol=1e-10, atol=1e-12)


@pytest.mark.feature("double backward")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_gradcheck(cell, backend, packed):
    problem = make_problem(cell, Shape(3, 3, 2, 3), reverse=[False, True], packed=packed)
    inputs = [t.requires_grad_() for t in problem.inputs]

    def run(*inputs):
        y, final = problem.with_inputs(list(inputs)).run(backend)
        return y, *final

    assert torch.autograd.gradcheck(run, inputs, fast_mode=False)
    # The backward of the compiled op is differentiable too.
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradcheck_projection(backend):
    problem = make_problem("lstm", Shape(3, 2, 2, 4, 2), reverse=[False, True])
    inputs = [t.requires_grad_() for t in problem.inputs]

    def run(*inputs):
        y, final = problem.with_inputs(list(inputs)).run(backend)
        return y, *final

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_third_derivative(kernel):
    problem = make_problem("gru", Shape(2, 1, 2, 2))

    def third(backend):
        x = problem.x.detach().requires_grad_()
        value = problem.with_inputs([x, *problem.inputs[1:]]).run(backend)[0].sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.pow(2).sum()
        return grad

    torch.testing.assert_close(third(kernel), third("reference"))
    assert third(kernel).abs().sum() > 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_input_computed_from_another_input(cell, kernel):
    """Double backward where the state depends on x: each path is counted once."""
    problem = make_problem(cell, Shape(3, 2, 4, 4))

    def penalty(backend):
        x = problem.x.detach().requires_grad_()
        state = [s * x.sum() for s in problem.state]
        run = problem.with_inputs([x, *state, *(w for g in problem.weights for w in g)])
        (grad,) = torch.autograd.grad(run.run(backend)[0].pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    torch.testing.assert_close(penalty(kernel), penalty("reference"))


@pytest.mark.parametrize("outputs", [[0], [1], [2], [1, 2], [0, 2]], ids=str)
def test_gradient_penalty_on_some_outputs(outputs):
    problem = make_problem("lstm", Shape(3, 2, 4, 4), dtype=torch.float32)

    def penalty(backend, dtype):
        run = problem.to(dtype)
        run = run.with_inputs([t.detach().requires_grad_() for t in run.inputs])
        y, final = run.run(backend)
        chosen = [(y, *final)[i] for i in outputs]
        (grad,) = torch.autograd.grad([t.pow(2).sum() for t in chosen], run.x, create_graph=True)
        with torch.autocast("cpu"):  # of no concern to a backward pass
            return torch.autograd.grad(grad.pow(2).sum(), [run.x, *run.weights.hh])

    for a, b in zip(penalty("cpu", torch.float32), penalty("reference", torch.float64), strict=True):
        assert relative_error(a, b) < 1e-5


def test_nan_stays_in_its_sample():
    for cell in CELL_NAMES:
        problem = make_problem(cell, Shape(5, 9, 6, 40), dtype=torch.float32, reverse=[False, True])
        clean, _ = problem.run("cpu")
        problem.x[2, 4] = math.nan
        y, final = problem.run("cpu")
        others = [b for b in range(9) if b != 4]
        assert torch.equal(y[:, others], clean[:, others])
        assert y[2:, 4, :40].isnan().all()
        assert y[:3, 4, 40:].isnan().all()
        assert torch.equal(y[:2, 4, :40], clean[:2, 4, :40])
        assert all(s[:, 4].isnan().all() for s in final)


def test_infinite_gates_saturate():
    problem = make_problem("lstm", Shape(2, 2, 3, 20), dtype=torch.float32)
    problem.x.fill_(1e30)
    (y, final), (y_ref, final_ref) = problem.run("cpu"), problem.run("reference")
    for a, b in zip((y, *final), (y_ref, *final_ref), strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


def test_half_overflow_becomes_inf():
    """GradScaler relies on it: a gradient beyond fp16's range is inf, not the largest number."""
    problem = make_problem("rnn_relu", Shape(2, 2, 3, 4), dtype=torch.float16)
    x = (problem.x * 0 + 60000).requires_grad_()
    weights = Weights(*([w.abs() * 0 + 2 for w in g] for g in problem.weights))
    with fusedrnn.use_backend("cpu"):
        y, _ = sequence("rnn_relu", x, problem.state, weights)
    assert y.isinf().all()
    y, _ = problem.with_inputs([t.requires_grad_() for t in problem.inputs]).run("cpu")
    (grad,) = torch.autograd.grad(y, problem.weights.bias_ih[0], torch.full_like(y, 60000))
    assert grad.isinf().any()
