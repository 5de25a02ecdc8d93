"""torch.compile of the modules: one graph, for every T and B, with no setting changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

# On both sides of the batch from which the planner prefers the built-in; none is a size of a module, which
# the compiler would take for the same number.
SIZES = ((4, 3), (7, 2), (5, 19))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


class Model(nn.Module):
    """A layer inside a model that does what users do with the built-in."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(17, 11)
        self.rnn = rnn

    def forward(self, x: Tensor) -> Any:
        self.rnn.flatten_parameters()
        assert isinstance(self.rnn, nn.RNNBase)
        return self.rnn(self.embed(x))


def compiled(function: Any, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=CompileCounterWithBackend(backend), **options)


def assert_equal_calls(
    function: Callable, fast: Callable, arguments: list[tuple], parameters: list[Tensor], flat: Callable
) -> None:
    """Equal outputs and, where there are parameters, equal gradients, for each of the calls."""
    for args in arguments:
        results = []
        for run in (function, fast):
            tensors = flat(run(*args))
            grads = torch.autograd.grad([t.square().sum() for t in tensors], parameters) if parameters else ()
            results.append([*tensors, *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a)


OPTIONS: dict[str, dict[str, Any]] = {
    "LSTM": {"bidirectional": True, "proj_size": 4},
    "GRU": {"num_layers": 2},
    "RNN": {},
}


@pytest.mark.feature("torch.compile")
@pytest.mark.parametrize("name", OPTIONS)
def test_one_graph_for_every_length_and_batch(name: str, flat: Callable) -> None:
    model = Model(getattr(fusedrnn, name)(11, 6, batch_first=True, **OPTIONS[name]))
    fast = compiled(model, dynamic=True)
    calls = [(torch.randn(B, T, 17),) for T, B in SIZES]
    assert_equal_calls(model, fast, calls, list(model.parameters()), flat)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.config.allow_rnn is False


def test_a_graph_for_inference(flat: Callable) -> None:
    module = fusedrnn.RNN(11, 6)
    fast = compiled(module, dynamic=True)
    with torch.no_grad():
        assert_equal_calls(module, fast, [(torch.randn(T, B, 11),) for T, B in SIZES], [], flat)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.feature("torch.compile", nn="only with `allow_rnn`, then unrolled over time")
def test_the_builtin_is_refused_as_before() -> None:
    ours, theirs, x = fusedrnn.GRU(3, 4), nn.GRU(3, 4), torch.randn(5, 2, 3)
    torch.testing.assert_close(compiled(ours)(x), ours(x))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        compiled(theirs)(x)
    products = []
    for T in (2, 4):
        backend = torch._dynamo.testing.AotEagerAndRecordGraphs()
        with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
            torch.compile(theirs, fullgraph=True, backend=backend)(x[:T])
        (graph,) = backend.fw_graphs
        products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
        torch._dynamo.reset()
    assert products[1] == products[0] + 2  # one for each further step


@pytest.mark.feature("torch.compile")
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
@pytest.mark.usefixtures("kernels_for_steps")
def test_a_loop_over_a_cell(name: str, flat: Callable) -> None:
    cell = getattr(fusedrnn, name)(11, 6)

    def run(x: Tensor) -> Any:
        hx = None
        for x_t in x.unbind(1):
            hx = cell(x_t, hx)
        return hx

    calls = [(torch.randn(B, 3, 11),) for B in (4, 2, 19)]
    assert_equal_calls(run, compiled(run, dynamic=True), calls, list(cell.parameters()), flat)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.feature("torch.compile")
@pytest.mark.parametrize("form", ["unsorted", "sorted with hx"])
def test_packed_input(form: str, flat: Callable) -> None:
    module = fusedrnn.LSTM(11, 6, 2)
    fast = compiled(module, dynamic=True)
    calls: list[tuple] = []
    for T, B in SIZES:
        lengths = [max(1, T - i) for i in range(B)]
        x = torch.randn(T, B, 11)
        packed = pack_padded_sequence(
            x, lengths[:: -1 if form == "unsorted" else 1], enforce_sorted=form != "unsorted"
        )
        calls.append((packed, tuple(torch.randn(2, 2, B, 6))) if form == "sorted with hx" else (packed,))
    assert_equal_calls(module, fast, calls, list(module.parameters()), flat)
    assert counters["stats"]["unique_graphs"] == 1
    output, _ = fast(*calls[0])
    assert isinstance(output, PackedSequence)


@pytest.mark.feature("torch.compile")
def test_machine_code(flat: Callable) -> None:
    """Through Inductor, the default: forward and backward."""
    model = Model(fusedrnn.LSTM(11, 6, batch_first=True))
    fast = torch.compile(model, fullgraph=True, dynamic=True)
    calls = [(torch.randn(B, T, 17),) for T, B in SIZES[:2]]
    assert_equal_calls(model, fast, calls, list(model.parameters()), flat)
    assert counters["stats"]["unique_graphs"] == 1


class Subclass(nn.GRU):
    pass


@pytest.mark.feature("torch.compile")
def test_a_converted_model(flat: Callable) -> None:
    model = fusedrnn.convert(nn.Sequential(nn.Linear(17, 11), Subclass(11, 6)))
    fast = compiled(model)
    assert_equal_calls(model, fast, [(torch.randn(4, 3, 17),)], list(model.parameters()), flat)


@pytest.mark.feature("torch.compile")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, flat: Callable) -> None:
    module = fusedrnn.LSTM(11, 6)

    def run(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return module(x)

    x = torch.randn(4, 3, 11)
    fast = compiled(run)
    assert_equal_calls(run, fast, [(x,)], list(module.parameters()), flat)
    assert {t.dtype for t in flat(fast(x))} == {dtype}


@pytest.mark.feature("torch.compile")
def test_transforms_inside() -> None:
    """A transform inside a compiled function has the values that it has outside."""
    module = fusedrnn.GRU(3, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    members = {name: torch.stack((p, 2 * p)) for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0].square().sum()

    def ensemble(x: Tensor) -> Any:
        return vmap(grad(loss), (0, None))(members, x)

    x = torch.randn(2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(compiled(ensemble)(x), ensemble(x))


def test_a_compiled_call_keeps_its_backend() -> None:
    module, x = fusedrnn.RNN(3, 4), torch.randn(5, 2, 3)
    fast = compiled(module, "eager")
    with fusedrnn.use_backend("emulator"):
        fast(x)
    assert "emulator" in fast(x)[0].grad_fn.name()
    assert "emulator" not in module(x)[0].grad_fn.name()


def test_order_of_imports() -> None:
    """Importing us does not import the compiler; that it may come first as well is for another process."""
    compiler_first = """
import torch, torch._dynamo, fusedrnn
torch.compile(fusedrnn.RNN(3, 4), fullgraph=True, backend="eager")(torch.randn(5, 2, 3))
print("done")
"""
    alone = "import sys, fusedrnn; assert 'torch._dynamo' not in sys.modules; print('done')"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for program in (compiler_first, alone)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert out == "done\n", err


def test_a_compiler_built_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no place to lift the refusal for ours alone, it is lifted as a user would."""
    from types import SimpleNamespace

    from fusedrnn import compiler

    config = SimpleNamespace(allow_rnn=False)
    monkeypatch.setitem(sys.modules, "torch._dynamo.config", config)
    compiler._patch(SimpleNamespace(), nn.Module)
    assert config.allow_rnn
    monkeypatch.setitem(sys.modules, "torch._dynamo.config", SimpleNamespace())
    builder = SimpleNamespace(VariableBuilder=type("VariableBuilder", (), {"wrap_module": 1}))
    compiler._patch(builder, nn.Module)
    assert builder.VariableBuilder.wrap_module == 1
