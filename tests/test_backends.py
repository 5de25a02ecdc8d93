"""Which backend serves a call, how one is forced, and what is said when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from torch.autograd import forward_ad

import fusedrnn
from fusedrnn import functional, libraries
from fusedrnn.backend import forced
from fusedrnn.cells import CELLS
from fusedrnn.functional import Weights
from fusedrnn.plan import Plan, Problem, make_plan
from fusedrnn.variation import PLAIN

from .problems import KERNELS, Shape, make_problem

PROBLEM = Problem(
    cell="lstm",
    device="cpu",
    dtype=torch.float32,
    T=60,
    B=32,
    I=128,
    H=128,
    P=0,
    reverse=(False,),
    training=True,
    packed=False,
    autocast=False,
    transformed=False,
)
ALL = dict.fromkeys(("cuda", "triton", "cpu", "emulator", "torch", "reference"), "")


def test_backends_are_listed_with_reasons():
    backends = fusedrnn.backends()
    assert list(backends) == ["cuda", "triton", "cpu", "emulator", "torch", "reference"]
    for name, status in backends.items():
        assert status.name == name
        assert status.available == (not status.reason)
    assert backends["cpu"].available
    assert backends["torch"].available
    assert backends["reference"].available
    assert "CUDA" in backends["cuda"].reason


def test_cpu_kernels_serve_cpu_tensors():
    assert make_plan(PROBLEM, ALL).backend == "cpu"


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({"training": False}, "cpu"),
        ({"training": False, "dtype": torch.bfloat16}, "cpu"),
        ({"training": False, "reverse": (True,)}, "cpu"),
        ({"training": False, "T": 1, "B": 9}, "torch"),  # one step does not repay packing the weights
        ({"training": False, "T": 1, "B": 8}, "cpu"),
        ({"T": 1, "B": 8}, "cpu"),
        ({"T": 1, "B": 8, "cell": "gru"}, "torch"),  # nor what is recorded for backward
        ({"T": 1, "B": 8, "one_step": True}, "torch"),  # which has a quicker kernel for cells
        ({"T": 1, "B": 8, "one_step": True, "autocast": True}, "cpu"),
        ({"T": 1, "packed": True}, "cpu"),
        ({"T": 1, "autocast": True}, "cpu"),
        ({"T": 1, "P": 64}, "cpu"),
        ({"transformed": True}, "reference"),
    ],
    ids=str,
)
def test_the_faster_of_two_serves(change, backend):
    assert make_plan(PROBLEM._replace(**change), ALL).backend == backend


def test_without_the_library_the_builtin_serves():
    plan = make_plan(PROBLEM, {**ALL, "cpu": "not built"})
    assert plan.backend == "torch"
    assert plan.rejected == {"cpu": "not built"}


def test_without_the_cuda_library_triton_serves_and_without_both_the_builtin():
    without_cuda = {**ALL, "cuda": "not built"}
    plan = make_plan(PROBLEM._replace(device="cuda"), without_cuda)
    assert plan == ("triton", {"cuda": "not built"})
    plan = make_plan(PROBLEM._replace(device="cuda"), {**without_cuda, "triton": "not installed"})
    assert plan == ("torch", {"cuda": "not built", "triton": "not installed"})


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_interpreted_triton_serves_cpu_tensors_where_it_is_forced(device):
    problem = PROBLEM._replace(device=device, interpreted=True)
    assert make_plan(PROBLEM, ALL).backend == "cpu"
    if device != "meta":
        assert make_plan(problem, ALL, "triton").backend == "triton"
    for refused in (problem._replace(device="meta"), problem._replace(device="cpu", interpreted=False)):
        with pytest.raises(RuntimeError, match="it serves cuda tensors, these are on"):
            make_plan(refused, ALL, "triton")


def test_cuda_kernels_serve_cuda_tensors():
    problem = PROBLEM._replace(device="cuda", capability=(9, 0))
    for change in ({}, {"T": 1}, {"training": False}, {"packed": True}, {"dtype": torch.float64}):
        assert make_plan(problem._replace(**change), ALL).backend == "cuda"
    plan = make_plan(problem._replace(capability=(7, 5)), ALL)
    assert plan.backend == "torch"
    assert "compute capability 8.0; this device has 7.5" in plan.rejected["cuda"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_emulator_serves_only_where_it_is_forced(device):
    problem = PROBLEM._replace(device=device)
    others = {**dict.fromkeys(ALL, "not here"), "emulator": ""}
    with pytest.raises(RuntimeError, match="cannot serve"):
        make_plan(problem, others)
    if device == "cpu":
        assert make_plan(problem, others, "emulator").backend == "emulator"


def test_what_no_kernel_can_do_goes_to_the_reference():
    plan = make_plan(PROBLEM._replace(device="meta", reverse=(True,)), {**ALL, "cuda": "none"})
    assert plan.backend == "reference"
    assert "one forward recurrence" in plan.rejected["torch"]


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("cpu", {"device": "cuda"}, "backend 'cpu' cannot serve this call: it serves cpu tensors"),
        ("cpu", {"dtype": torch.int64}, "it has no kernel for torch.int64"),
        ("cuda", {}, "backend 'cuda' cannot serve this call: it serves cuda tensors, these are on cpu"),
        ("emulator", {"device": "cuda"}, "backend 'emulator' cannot serve this call: it serves cpu tensors"),
        ("emulator", {"transformed": True}, r"no rule for torch\.func"),
        ("torch", {"reverse": (True, False)}, "one forward and one reverse"),
        ("torch", {"dtype": torch.float8_e5m2}, "the built-in has no kernel"),
    ],
)
def test_a_forced_backend_that_cannot_raises(backend, change, message):
    with pytest.raises(RuntimeError, match=message):
        make_plan(PROBLEM._replace(**change), ALL, backend)


def test_a_forced_backend_that_is_not_available_raises():
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve this call: not built"):
        make_plan(PROBLEM, {**ALL, "cpu": "not built"}, "cpu")
    with (
        pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: .*CUDA"),
        fusedrnn.use_backend("cuda"),
    ):
        pass


def layer_call(cell="gru", T=4, B=2, I=3, H=5, P=0, reverse=(False,), packed=False, **of_x):
    x = torch.zeros((T * B, I) if packed else (T, B, I), **of_x)
    G, N = CELLS[cell].gates, len(reverse)
    hr = [torch.zeros(P, H)] * N if P else ()
    weights = Weights([torch.zeros(G * H, I)] * N, [torch.zeros(G * H, H)] * N, hr=hr)
    return CELLS[cell], x, weights, reverse, torch.full((T,), B) if packed else None, PLAIN, False, False


CHANGES = (
    {},
    {"cell": "rnn_tanh"},
    {"cell": "rnn_relu"},
    {"cell": "lstm"},
    {"cell": "lstm", "P": 2},
    {"cell": "lstm", "P": 4},
    {"T": 2, "B": 4},
    {"I": 6},
    {"H": 6},
    {"reverse": (True,)},
    {"reverse": (False, True)},
    {"packed": True},
    {"packed": True, "T": 2, "B": 4},
    {"dtype": torch.float64},
    {"device": "meta"},
)


def test_a_remembered_plan_is_that_of_the_call(monkeypatch):
    """Calls that differ in one thing, or are made where one thing is different: each keeps its own plan."""
    made = []

    def name(problem, available, forced=None):
        made.append(problem)
        return Plan(f"{problem} {forced}", {})

    monkeypatch.setattr(functional, "make_plan", name)
    monkeypatch.setattr(functional, "_plans", {})
    calls = [layer_call(**change) for change in CHANGES]
    calls += [(*calls[0][:-2], True, False), (*calls[0][:-2], False, True)]  # all states; a cell's step
    places = (
        nullcontext,
        torch.no_grad,
        partial(torch.autocast, "cpu"),
        forward_ad.dual_level,
        partial(fusedrnn.use_backend, "cpu"),
        partial(fusedrnn.use_backend, "reference"),
    )
    for turn in range(2):
        before = len(made)
        for place, call in product(places, calls):
            with place():
                assert functional.plan_layer(*call).backend == f"{functional._problem(*call)} {forced()}"
        assert (len(made) > before) is (turn == 0)


@pytest.mark.parametrize("name", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_what_is_left_to_the_builtin_is_planned_once(name, free_choice, monkeypatch):
    ours, builtin = getattr(fusedrnn, name)(3, 5), getattr(torch.nn, name)(3, 5)
    ours.load_state_dict(builtin.state_dict())
    x, h = (
        (torch.randn(2, 3), torch.randn(2, 5))
        if "Cell" in name
        else (torch.randn(1, 2, 3), torch.randn(1, 2, 5))
    )
    hx = (h, h + 1) if name == "LSTMCell" else h
    monkeypatch.setattr(functional, "_left_to_builtin", set())
    ours(x, hx)
    monkeypatch.setattr(functional, "plan_layer", lambda *_: pytest.fail("planned again"))
    for result, expected in zip(ours(x, hx), builtin(x, hx), strict=True):
        assert torch.equal(result, expected)
    with pytest.raises(pytest.fail.Exception, match="planned again"):
        ours(x[..., :1, :], hx)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_a_cell_is_no_layer_of_one_step(name, free_choice):
    """Though their tensors can be of the same sizes."""
    x, h = torch.randn(1, 4, 4), torch.randn(1, 4, 4)
    getattr(fusedrnn, name)(4, 4)(x, h)
    cell = f"{name}Cell"
    for module in (getattr(torch.nn, cell)(4, 4), getattr(fusedrnn, cell)(4, 4)):
        with pytest.raises(ValueError, match=f"{cell}: Expected input to be 1D or 2D, got 3D instead"):
            module(x, h)


@pytest.mark.parametrize("form", ["list", "none", "unbatched"])
def test_a_step_in_any_form_is_checked_once(form, free_choice, monkeypatch):
    cell, x, h = fusedrnn.LSTMCell(3, 5), torch.randn(2, 3), torch.randn(2, 5)
    call = {"list": (x, [h, h]), "none": (x,), "unbatched": (x[0], (h[0], h[0]))}[form]
    monkeypatch.setattr(functional, "_left_to_builtin", set())
    expected = cell(*call)
    monkeypatch.setattr(functional, "check", lambda *_, **__: pytest.fail("checked again"))
    for result, other in zip(cell(*call), expected, strict=True):
        assert torch.equal(result, other)


def test_the_builtin_has_no_step_with_a_projection():
    problem = PROBLEM._replace(one_step=True, P=4)
    assert make_plan(problem, ALL).backend == "cpu"
    with pytest.raises(RuntimeError, match="the built-in's cells have no projection"):
        make_plan(problem, ALL, "torch")


def test_two_layers_are_not_two_directions(free_choice):
    """Though states and weights of a single step have the same sizes."""
    x, h = torch.randn(1, 2, 5), torch.randn(2, 2, 5)
    for kwargs in ({"bidirectional": True}, {"bidirectional": True, "bias": False}, {"num_layers": 2}):
        ours, builtin = fusedrnn.GRU(5, 5, **kwargs), torch.nn.GRU(5, 5, **kwargs)
        ours.load_state_dict(builtin.state_dict())
        for _ in range(2):
            for result, expected in zip(ours(x, h), builtin(x, h), strict=True):
                torch.testing.assert_close(result, expected)


def test_what_is_left_to_the_builtin_is_known_by_all_it_depends_on(monkeypatch):
    monkeypatch.setattr(functional, "_left_to_builtin", set())
    cell = torch.nn.GRUCell(3, 5)
    tensors = [torch.zeros(2, 3), torch.zeros(2, 5), *cell.parameters()]

    def known(*others, name="gru", one_step=True):
        x, h, *parameters = others or tensors
        return functional.left_to_builtin(name, x, [h], parameters, one_step=one_step)

    def places():
        return (torch.no_grad(), torch.autocast("cpu"), forward_ad.dual_level(), fusedrnn.use_backend("cpu"))

    assert not known()
    functional._leave_to_builtin("gru", tensors[0], tensors[1:2], tensors[2:], one_step=True)
    assert known()
    assert not known(name="lstm")
    assert not known(one_step=False)
    assert not known(*tensors[:-1])
    for place in places():
        with place:
            assert not known()
    torch.vmap(lambda _: pytest.fail("known") if known() else _)(torch.zeros(2))
    for i, t in enumerate(tensors):
        for other in (t[:-1], t[None], t.double(), t.to("meta"), t.detach().as_subclass(Other)):
            assert not known(*tensors[:i], other, *tensors[i + 1 :])
    assert known()


class Other(torch.Tensor):
    """A tensor that may do anything."""


def test_use_backend_nests_and_ends():
    assert forced() is None
    with fusedrnn.use_backend("reference"):
        with fusedrnn.use_backend("torch"):
            assert forced() == "torch"
        assert forced() == "reference"
    assert forced() is None
    with pytest.raises(KeyError), fusedrnn.use_backend("reference"):
        raise KeyError
    assert forced() is None


def test_use_backend_refuses_unknown_names():
    message = "'cudnn' is not a backend; choose from cuda, triton, cpu, emulator, torch, reference"
    with pytest.raises(ValueError, match=message), fusedrnn.use_backend("cudnn"):
        pass


def test_use_backend_is_for_the_current_thread():
    seen = []
    with fusedrnn.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("backend", ["cpu", "emulator", "reference", "torch"])
def test_the_forced_backend_ran(backend):
    problem = make_problem("lstm", Shape(2, 2, 3, 4), dtype=torch.float32)
    problem.x.requires_grad_()
    y, _ = problem.run(backend)
    name = type(y.grad_fn).__name__
    assert ("fusedrnn" in name) == (backend in KERNELS)
    assert ("emulator" in name) == (backend == "emulator")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_variable_forces_a_backend():
    code = (
        "import torch, fusedrnn\n"
        "y, _ = fusedrnn.GRU(2, 3)(torch.randn(4, 2))\n"
        "print('fusedrnn' in repr(y.grad_fn.next_functions[0][0]))\n"
    )
    assert run_python(code, FUSEDRNN_BACKEND="cpu").stdout == "True\n"
    assert run_python(code, FUSEDRNN_BACKEND="emulator").stdout == "True\n"
    assert run_python(code, FUSEDRNN_BACKEND="reference").stdout == "False\n"
    wrong = run_python(code, FUSEDRNN_BACKEND="cudnn")
    assert wrong.returncode != 0
    assert "FUSEDRNN_BACKEND='cudnn' is not a backend" in wrong.stderr
    missing = run_python(code, FUSEDRNN_BACKEND="cuda")
    assert "backend 'cuda' cannot serve this call" in missing.stderr


def test_a_library_that_does_not_load_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "FOLDER", tmp_path)
    assert "was not built" in libraries._load("libfusedrnn_cpu.so")
    (tmp_path / "libfusedrnn_cpu.so").write_bytes(b"not a library")
    assert "FUSEDRNN_EMULATOR=1" in libraries.emulator_reason()
    reason = libraries._load("libfusedrnn_cpu.so")
    assert "could not be loaded" in reason
    assert "libfusedrnn_cpu.so" in reason
