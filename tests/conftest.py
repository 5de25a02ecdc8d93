"""Fixtures shared by the tests: backends forced by name, and comparison with torch.nn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

os.environ.setdefault("TRITON_INTERPRET", "1")  # the triton backend on the CPU; read once, with fusedrnn

import fusedrnn
from fusedrnn import env, functional
from fusedrnn.plan import Plan

from .features import declared
from .problems import BACKENDS

COLLECTED = pytest.StashKey[list[pytest.Item]]()  # all tests, also those that -k leaves out


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "feature(name, nn=, backends=): shows a feature of docs/features.md; see tests/features.py"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fp32_means_fp32() -> Iterator[None]:
    """Products of the CUDA kernels, which the emulator runs, would else take tf32 operands."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _shown_where_it_is_said(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that is marked with a feature fails unless the backends that the mark names served it.

    Where the environment forces another one, that one is what is tested.
    """
    said = {backend for _, _, backends in declared(request.node) for backend in backends}
    if not said or (os.environ.get(env.BACKEND) and "free_choice" not in request.fixturenames):
        yield
        return
    served: set[str] = set()

    def see(plan: Plan, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            served.add(plan.backend)

    with functional.watched_plans(see):
        yield
    assert said <= served, f"marked as shown on {sorted(said)}, served by {sorted(served)}"


@pytest.fixture
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what only one backend can do: the planner chooses, also where the environment forces another."""
    monkeypatch.setattr("fusedrnn.backend._of_environment", lambda: None)


@pytest.fixture
def kernels_for_steps() -> Iterator[None]:
    """The CPU kernels also serve the single steps that the planner leaves to the built-in."""
    if env.backend():
        yield
        return
    with fusedrnn.use_backend("cpu"):
        yield


@pytest.fixture(params=[env.backend()] if env.backend() else BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each backend forced, or with the one that the environment forces.

    One that is not available is an error, not a skip.
    """
    with fusedrnn.use_backend(request.param):
        yield request.param


@pytest.fixture
def twins() -> Callable[..., tuple[nn.Module, nn.Module]]:
    """``twins(name, *args, **kwargs)``: our module and torch's, built from the same seed."""

    def make(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        ours = getattr(fusedrnn, name)(*args, **kwargs)
        torch.manual_seed(1)
        return ours, getattr(nn, name)(*args, **kwargs)

    return make


@pytest.fixture
def flat() -> Callable[[Any], list[Tensor]]:
    """``flat(output)``: the tensors of a module's output or input, in order."""
    return _flat


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """``assert_same(ours, theirs, x, hx=None)``: equal outputs, layouts and gradients of two modules.

    Gradients are those of x, hx and every parameter, for random gradients of every output. Both forwards
    start from the same random state and must leave the same one behind.
    """
    return _assert_same


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value or () for tensor in _flat(item)]


def _leaves(value: Any) -> Any:
    """The same tensors, with the same strides, as leaves that ask for a gradient."""
    if value is None:
        return None
    if isinstance(value, PackedSequence):
        return PackedSequence(_leaves(value.data), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return type(value)(_leaves(item) for item in value)


def _layout(tensor: Tensor) -> tuple:
    """What two tensors must share besides values; strides of sizes of one mean nothing."""
    strides = [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and tensor.numel()]
    return tensor.shape, tensor.dtype, tensor.device, strides


def _run(module: nn.Module, x: Any, hx: Any) -> tuple[list[Tensor], dict[str, Tensor | None], Tensor]:
    x, hx = _leaves(x), _leaves(hx)
    torch.manual_seed(2)
    output = module(x) if hx is None else module(x, hx)
    random_state = torch.get_rng_state()
    tensors = _flat(output)
    torch.manual_seed(3)
    module.zero_grad()
    torch.autograd.backward(tensors, [torch.randn(t.shape, dtype=t.dtype) for t in tensors])
    grads = {f"input {i}": t.grad for i, t in enumerate(_flat((x, hx)))}
    grads |= {name: p.grad for name, p in module.named_parameters()}
    return [t.detach() for t in tensors], grads, random_state


def _assert_same(
    ours: nn.Module,
    theirs: nn.Module,
    x: Any,
    hx: Any = None,
    *,
    layout: bool = True,
    # fp64 sums of some dozens of terms in another order, through some dozen steps: 1.1e-16 each
    rtol: float = 1e-9,
    atol: float = 1e-11,
) -> None:
    our_output, our_grads, our_random_state = _run(ours, x, hx)
    output, grads, random_state = _run(theirs, x, hx)
    if layout:
        assert [_layout(t) for t in our_output] == [_layout(t) for t in output]
    for i, (a, b) in enumerate(zip(our_output, output, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, i=i: f"output {i}: {m}")
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            our_grads[name], grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )
    assert torch.equal(our_random_state, random_state)
