"""The ops as torch sees them: schemas, fake kernels, autograd and autocast rules, checks."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.functional import Weights, sequence

from .problems import KERNELS, Shape, make_problem


def arguments(problem):
    return (
        CELLS[problem.cell].id,
        problem.x,
        problem.state,
        *map(list, problem.weights),
        problem.reverse,
        problem.batch_sizes,
        False,  # tf32
    )


NAMESPACES = ("fusedrnn", "fusedrnn_emulator")


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("cell", "shape"), [(c, Shape(3, 2, 3, 4)) for c in CELLS] + [("lstm", Shape(3, 2, 3, 4, 2))], ids=str
)
def test_opcheck(cell, shape, packed, namespace):
    ops = getattr(torch.ops, namespace)
    problem = make_problem(cell, shape, reverse=[False, True], packed=packed, dtype=torch.float32)
    args = arguments(problem)
    torch.library.opcheck(ops.sequence, args)
    for t in problem.inputs:
        t.requires_grad_()
    torch.library.opcheck(ops.sequence_forward, args)
    y, final, saved = ops.sequence_forward(*args)
    dfinal = [torch.randn_like(s) for s in final]
    for need_dx, need_dweights, dy in ((True, True, torch.randn_like(y)), (False, False, None)):
        torch.library.opcheck(
            ops.sequence_backward,
            (*args, y.detach(), [s.detach() for s in saved], dy, dfinal, need_dx, need_dweights),
            # Its gradients go through the reference, which autograd checks elsewhere.
            test_utils=("test_schema", "test_faketensor"),
        )


def test_fake_tensors_of_a_gpu():
    """Traced without a GPU: the CUDA kernels keep states, no gates."""
    problem = make_problem("lstm", Shape(3, 2, 3, 4), dtype=torch.float32)
    with FakeTensorMode():
        problem = problem.with_inputs(
            [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in problem.inputs]
        )
        y, final, saved = torch.ops.fusedrnn.sequence_forward(*arguments(problem))
    assert [s.shape for s in saved] == [(3, 2, 1, 4)]
    assert {t.device.type for t in (y, *final, *saved)} == {"cuda"}


def test_cells_agree_with_the_native_library():
    from fusedrnn.lib import _testing

    for cell in CELLS.values():
        native = getattr(_testing, cell.name)
        assert (native.gates, native.states, native.saved) == (cell.gates, cell.states, cell.saved)


def broken(change):
    problem = make_problem("lstm", Shape(3, 2, 4, 5), dtype=torch.float32)
    change(problem)
    return problem


def put(name, value):
    def change(problem):
        target = problem.weights if name in Weights._fields else problem
        if target is problem:
            setattr(problem, name, value(getattr(problem, name)))
        else:
            problem.weights = problem.weights._replace(**{name: value(getattr(problem.weights, name))})

    return change


BROKEN = {
    "x 2-D": (put("x", lambda x: x[0]), "x must be 3-D, got 2-D"),
    "x int": (put("x", lambda x: x.long()), "dtype|no kernel"),
    "no steps": (put("x", lambda x: x[:0]), "Expected sequence length to be larger than 0 in RNN"),
    "input size": (put("x", lambda x: x[..., :3]), "weight_ih"),
    "batch": (put("x", lambda x: x[:, :1]), "batch size"),
    "states": (put("state", lambda s: s[:1]), "lstm has 2 states, got 1"),
    "state shape": (put("state", lambda s: [s[0], s[1][..., :4]]), "state"),
    "state dtype": (put("state", lambda s: [s[0], s[1].double()]), "dtype"),
    "state rank": (put("state", lambda s: [s[0][0], s[1][0]]), "state"),
    "weight dtype": (put("hh", lambda w: [w[0].half()]), "dtype"),
    "weight shape": (put("hh", lambda w: [w[0][:, :4]]), "weight_hh"),
    "gates": (put("hh", lambda w: [w[0][:19]]), "weight_"),
    "bias shape": (put("bias_hh", lambda w: [w[0][:19]]), "bias_hh"),
    "one bias": (put("bias_hh", lambda w: []), "bias|weights"),
    "two weights": (put("hh", lambda w: [w[0], w[0]]), "one tensor per recurrence"),
    "no recurrence": (put("reverse", lambda r: []), "one tensor per recurrence"),
    "x 1-D": (put("x", lambda x: x[0, 0]), "x must be 3-D, got 1-D"),
    "no weights": (lambda p: setattr(p, "weights", Weights((), ())), "one tensor per recurrence"),
    "state 1-D": (put("state", lambda s: [s[0][0, 0], s[1]]), "state must be 3-D"),
    "empty projection": (put("hr", lambda w: [torch.zeros(0, 5)]), "positive|weight_h"),
    "projection 0-D": (put("hr", lambda w: [torch.zeros(())]), "weight_hr must be 2-D"),
    "meta weight": (put("ih", lambda w: [w[0].to("meta")]), "device|is on"),
}
PACKED_BROKEN = {
    "sum": (lambda b: b - torch.tensor([0, 0, 1]), "add up to"),
    "increase": (lambda b: b.flip(0), r"batch_sizes\[0\]|increase"),
    "zero": (lambda b: torch.cat([b, b[:1] * 0]), "positive"),
    "int32": (lambda b: b.int(), "int64"),
    "2-D": (lambda b: b[None], "sequence length|1-D"),
    "empty": (lambda b: b[:0], "sequence length"),
    "0-D": (lambda b: b[0], "sequence length|1-D"),
    "first": (lambda b: b + 1, r"batch_sizes\[0\]"),
}


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("name", BROKEN)
def test_bad_arguments_are_refused(name, backend):
    change, message = BROKEN[name]
    with pytest.raises(RuntimeError, match=message):
        broken(change).run(backend)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("name", PACKED_BROKEN)
def test_bad_batch_sizes_are_refused(name, backend):
    change, message = PACKED_BROKEN[name]
    problem = make_problem("gru", Shape(3, 3, 4, 5))
    problem.batch_sizes = change(torch.tensor([3, 2, 2]))
    problem.x = problem.x.reshape(-1, 4)[:7]
    with pytest.raises(RuntimeError, match=message):
        problem.run(backend)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_backward_op_refuses_what_forward_did_not_return(namespace):
    problem = make_problem("lstm", Shape(3, 2, 4, 5))
    args, ops = arguments(problem), getattr(torch.ops, namespace)
    y, final, saved = ops.sequence_forward(*args)
    backward = ops.sequence_backward
    for bad in (saved[1:], [*saved[:-1], saved[-1][:2]], [s.float() for s in saved], [*saved, saved[0]]):
        with pytest.raises(RuntimeError, match="what sequence_forward returned"):
            backward(*args, y, bad, y, final, True, True)
    with pytest.raises(RuntimeError, match="dy does not fit"):
        backward(*args, y, saved, y[:1], final, True, True)
    with pytest.raises(RuntimeError, match="y does not fit"):
        backward(*args, y.float(), saved, y, final, True, True)
    with pytest.raises(RuntimeError, match="y does not fit"):
        backward(*args, y.transpose(0, 1).contiguous(), saved, y, final, True, True)
    with pytest.raises(RuntimeError, match="dfinal"):
        backward(*args, y, saved, y, [final[0], final[1][:, :1]], True, True)
    with pytest.raises(RuntimeError, match="one gradient per state"):
        backward(*args, y, saved, y, final[:1], True, True)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_a_cell_that_reads_h_cannot_project_it(backend):
    with pytest.raises(RuntimeError, match="gru has no projection"):
        make_problem("gru", Shape(3, 2, 3, 4, 2)).run(backend)


def test_a_projection_of_nothing_is_refused():
    problem = make_problem("lstm", Shape(3, 2, 3, 4, 2))
    problem.state[0] = problem.state[0][..., :0]
    hh, hr = ([w[..., :0] for w in problem.weights.hh], [w[:0] for w in problem.weights.hr])
    problem.weights = problem.weights._replace(hh=hh, hr=hr)
    for backend in (*KERNELS, "reference"):
        with pytest.raises(RuntimeError, match="must be positive"):
            problem.run(backend)


def test_unknown_cell():
    problem = make_problem("gru", Shape(2, 2, 2, 2))
    with pytest.raises(ValueError, match="unknown cell 'mgu'; registered: lstm, gru, rnn_tanh, rnn_relu"):
        sequence("mgu", problem.x, problem.state, problem.weights)
    for namespace in NAMESPACES:
        with pytest.raises(RuntimeError, match="no cell has number 9"):
            getattr(torch.ops, namespace).sequence(9, *arguments(problem)[1:])


@pytest.mark.parametrize("backend", KERNELS)
def test_saved_tensors_guard_against_in_place_changes(backend):
    problem = make_problem("lstm", Shape(2, 2, 2, 2))
    y, _ = problem.with_inputs([t.requires_grad_() for t in problem.inputs]).run(backend)
    loss = y.pow(2).sum()
    with torch.no_grad():
        problem.weights.hh[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("backend", "namespace"), list(zip(KERNELS, NAMESPACES, strict=True)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_of_the_op(cell, dtype, backend, namespace):
    """Called directly, the op casts as the functional interface does, and gradients come back in fp32."""
    problem = make_problem(cell, Shape(3, 2, 3, 4), dtype=torch.float32)
    inputs, ops = [t.requires_grad_() for t in problem.inputs], getattr(torch.ops, namespace)
    expected = torch.float32 if cell == "gru" else dtype  # the built-in's GRU promotes on the CPU
    with torch.autocast("cpu", dtype):
        y, final = ops.sequence(*arguments(problem))
        trained, *_ = ops.sequence_forward(*arguments(problem))
        functional, _ = problem.run(backend)
    assert {t.dtype for t in (y, *final, trained, functional)} == {expected}
    assert torch.equal(y, trained)
    assert torch.equal(y, functional)
    for grad in torch.autograd.grad(trained.float().sum(), inputs):
        assert grad.dtype == torch.float32


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_autocast_dtypes_are_the_builtins(name, backend):
    ours, theirs = getattr(fusedrnn, name)(3, 4), getattr(torch.nn, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)

    def run(module):
        with torch.autocast("cpu", torch.bfloat16):
            y, state = module(x)
        return y, *(state if isinstance(state, tuple) else (state,))

    with fusedrnn.use_backend(backend):
        results = run(ours)
    for a, b in zip(results, run(theirs), strict=True):
        assert a.dtype == b.dtype
        # bf16 has 8 bits: a few roundings of values below one
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_compiled_call_with_dynamic_shapes(namespace):
    """The ops trace: one graph, fake kernels for any T and B."""
    problem = make_problem("gru", Shape(4, 3, 5, 6))
    forward = getattr(torch.ops, namespace).sequence_forward

    def run(x, h):
        y, final, _ = forward(1, x, [h], *map(list, problem.weights), [False], None, False)
        return y.sum() + final[0].sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((4, 3), (7, 2), (2, 5)):
        x, h = torch.randn(T, B, 5).double(), torch.randn(1, B, 6).double()
        xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        losses = [compiled(xs[0], h), run(xs[1], h)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)


@pytest.mark.usefixtures("free_choice")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_function_transforms(name):
    """Forward mode and reverse over a functional call, as on the built-in: served by the reference."""
    ours, theirs = getattr(fusedrnn, name)(3, 4).double(), getattr(torch.nn, name)(3, 4).double()
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        module.requires_grad_(False)
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)

    def differentiate(module):
        with torch.backends.mkldnn.flags(enabled=False):  # the built-in's oneDNN kernel has no forward mode
            value, derivative = torch.func.jvp(lambda x: module(x)[0], (x,), (tangent,))
            gradient = torch.func.grad(lambda x: module(x)[0].pow(2).sum())(x)
        return value, derivative, gradient

    for a, b in zip(differentiate(ours), differentiate(theirs), strict=True):
        torch.testing.assert_close(a, b)
    assert differentiate(ours)[1].norm() > 0.01
    for backend in KERNELS:
        with fusedrnn.use_backend(backend), pytest.raises(RuntimeError, match=r"no rule for torch\.func"):
            differentiate(ours)
