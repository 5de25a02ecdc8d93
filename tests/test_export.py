"""Programs made of the modules: torch.export, AOTInductor, ONNX and TorchScript."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

# What torch's own files warn of, from a file that is not torch's.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SIZES = ((3, 6), (1, 1), (19, 2), (4, 9))  # B, T
DYNAMIC = {0: Dim("batch"), 1: Dim("time")}
LAYERS = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True, "bias": False}),
    "rnn": ("RNN", {"nonlinearity": "relu"}),
}


class Model(nn.Module):
    def __init__(self, kind: str, package: Any = fusedrnn) -> None:
        super().__init__()
        name, options = LAYERS[kind]
        self.embed = nn.Linear(7, 5)
        self.rnn = getattr(package, name)(5, 6, batch_first=True, **options)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return self.rnn(self.embed(x), hx)


def same(ours: Callable, theirs: Callable, flat: Callable, sizes: Any = SIZES) -> None:
    for B, T in sizes:
        x = torch.randn(B, T, 7)
        for a, b in zip(flat(ours(x)), flat(theirs(x)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.feature("torch.export")
@pytest.mark.parametrize(
    ("kind", "strict"), [("lstm", False), ("lstm_proj", False), ("gru", True), ("rnn", False)]
)
def test_export(kind: str, strict: bool, flat: Callable) -> None:
    """One program for every batch and length, also after it has been saved; it can be trained."""
    model = Model(kind)
    program = export(model, (torch.randn(3, 6, 7),), dynamic_shapes=(DYNAMIC,), strict=strict)
    layers = [str(n.target) for n in program.graph.nodes if "fusedrnn" in str(n.target)]
    assert layers == ["fusedrnn.sequence_forward.default"] * model.rnn.num_layers
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    same(program.module(), model, flat)
    same(loaded, model, flat)

    x = torch.randn(2, 4, 7)
    for run in (model, loaded):
        sum(t.square().sum() for t in flat(run(x))).backward()
    trained = dict(loaded.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name].grad, p.grad)


def test_export_for_inference() -> None:
    """Without gradients the program keeps nothing for a backward pass."""
    with torch.no_grad():
        program = export(fusedrnn.GRU(3, 4), (torch.randn(5, 2, 3),))
    assert [str(n.target) for n in program.graph.nodes if "fusedrnn" in str(n.target)] == [
        "fusedrnn.sequence.default"
    ]


@pytest.mark.feature("torch.export")
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.usefixtures("kernels_for_steps")
def test_export_of_a_cell(name: str, flat: Callable) -> None:
    cell = getattr(fusedrnn, name)(7, 6)
    program = export(cell, (torch.randn(3, 7),), dynamic_shapes=({0: Dim("batch")},)).module()
    for B in (1, 5, 19):
        x = torch.randn(B, 7)
        for a, b in zip(flat(program(x)), flat(cell(x)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.feature("torch.export")
def test_export_of_packed_input() -> None:
    module = fusedrnn.LSTM(7, 6)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = module

        def forward(self, rows: Tensor, batch_sizes: Tensor, h: Tensor, c: Tensor) -> Any:
            y, final = self.rnn(PackedSequence(rows, batch_sizes), (h, c))
            return y.data, final

    def arguments(sizes: list[int]) -> tuple[Tensor, ...]:
        h, c = torch.randn(2, 1, sizes[0], 6)
        return torch.randn(sum(sizes), 7), torch.tensor(sizes), h, c

    state = {1: Dim("batch")}
    program = export(
        Packed(),
        arguments([3, 3, 2, 1]),
        dynamic_shapes=({0: Dim("rows")}, {0: Dim("time")}, state, state),
    ).module()
    for sizes in ([3, 3, 2, 1], [5, 2], [2, 2, 2, 2, 1, 1]):
        args = arguments(sizes)
        torch.testing.assert_close(program(*args), Packed()(*args))
    with pytest.raises(RuntimeError, match="batch_sizes add up to"):
        program(args[0][:-1], *args[1:])


@pytest.mark.feature("AOTInductor")
def test_ahead_of_time(flat: Callable, tmp_path: Any) -> None:
    """AOTInductor: a library of machine code, run without the model."""
    model = Model("rnn")
    program = export(model, (torch.randn(3, 6, 7),), dynamic_shapes=(DYNAMIC,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    same(torch._inductor.aoti_load_package(package), model, flat)


def onnx_program(model: nn.Module, args: tuple, shapes: Any, path: Any) -> onnxruntime.InferenceSession:
    torch.onnx.export(model.eval(), args, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path)


def run_onnx(session: onnxruntime.InferenceSession, *args: Tensor) -> list[Tensor]:
    names = [i.name for i in session.get_inputs()]
    feed = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, feed)]


def operators(path: Any) -> list[str]:
    return [
        n.op_type for n in onnx.load(path).graph.node if n.op_type in ("LSTM", "GRU", "RNN", "Loop", "Scan")
    ]


class Chain(nn.Module):
    """Every layer there is an operator for; of several layers, both directions and with given states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 3, bidirectional=True, bias=False, batch_first=True)
        self.relu = nn.RNN(6, 5, nonlinearity="relu", batch_first=True)
        self.tanh = nn.RNN(5, 2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor, hx: Any) -> Any:
        x, lstm = self.lstm(x, hx)
        x, gru = self.gru(x)
        x, relu = self.relu(x)
        return *self.tanh(x), lstm, gru, relu


@pytest.mark.feature("ONNX")
def test_onnx(flat: Callable, tmp_path: Any) -> None:
    """torch.onnx.export, told nothing: one standard operator a layer, for every batch and length."""
    model, path = fusedrnn.convert(Chain()), str(tmp_path / "model.onnx")

    def arguments(B: int, T: int) -> tuple:
        return torch.randn(B, T, 7), tuple(torch.randn(2, 4, B, 3))

    state = {1: DYNAMIC[0]}
    session = onnx_program(model, arguments(3, 6), (DYNAMIC, (state, state)), path)
    assert operators(path) == ["LSTM", "LSTM", "GRU", "RNN", "RNN"]
    for B, T in SIZES:
        x, hx = arguments(B, T)
        for a, b in zip(run_onnx(session, x, *hx), flat(model(x, hx)), strict=True):
            torch.testing.assert_close(a, b.detach())


@pytest.mark.feature("torch.export", nn="one length only")
@pytest.mark.feature("ONNX", nn="one length only; any by the older exporter")
@pytest.mark.feature("AOTInductor", nn="one length only")
@pytest.mark.filterwarnings(
    "ignore:The tensor attributes self._flat_weights:UserWarning",  # of the built-in's
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
    "ignore:.*batch_size other than 1:UserWarning",
)
def test_torch_nn_is_exported_for_one_length(tmp_path: Any) -> None:
    """torch.export takes the loop over time apart; what is made of its programs has one length as well."""
    theirs, x = nn.GRU(7, 6, batch_first=True), torch.randn(3, 6, 7)
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
        export(theirs, (x,), dynamic_shapes=(DYNAMIC,))
    ours = fusedrnn.convert(copy.deepcopy(theirs))
    program = export(ours, (x,), dynamic_shapes=(DYNAMIC,)).module()
    torch.testing.assert_close(program(x), theirs(x))
    torch.testing.assert_close(program(x[:2, :4]), ours(x[:2, :4]))
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(theirs, (x,), path, dynamo=False, dynamic_axes={"x": [0, 1]}, input_names=["x"])
    longer = torch.randn(3, 9, 7)
    y = onnxruntime.InferenceSession(path).run(None, {"x": longer.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), theirs(longer)[0].detach())


@pytest.mark.feature("ONNX")
@pytest.mark.usefixtures("kernels_for_steps")
def test_onnx_of_a_cell(tmp_path: Any) -> None:
    cell, path = fusedrnn.GRUCell(7, 6), str(tmp_path / "model.onnx")
    session = onnx_program(cell, (torch.randn(3, 7), torch.randn(3, 6)), ({0: DYNAMIC[0]},) * 2, path)
    assert operators(path) == ["GRU"]
    x, h = torch.randn(5, 7), torch.randn(5, 6)
    torch.testing.assert_close(run_onnx(session, x, h), [cell(x, h).detach()])


def test_what_onnx_has_not() -> None:
    from fusedrnn import onnx as ours
    from fusedrnn.cells import CELLS

    x, h, c = torch.randn(4, 3, 2), torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    w = ([torch.randn(20, 2)], [torch.randn(20, 5)], [], [])
    projection = ([torch.randn(20, 2)], [torch.randn(20, 4)], [], [], [torch.randn(4, 5)])
    two = [[t[0], t[0]] for t in w[:2]]
    both = [s.expand(2, 3, 5) for s in (h, c)]
    refused = {
        "with a projection": (x, [h[..., :4], c], *projection, [False], None),
        "for packed input; export a model that": (x[0], [h, c], *w, [], [False], torch.tensor([3])),
        r"for recurrences of directions \[True, True\]": (x, both, *two, [], [], [], [True, True], None),
    }
    for message, args in refused.items():
        with pytest.raises(RuntimeError, match=f"ONNX has no recurrent operator {message}"):
            ours.sequence(CELLS["lstm"], *args)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::torch.jit.TracerWarning",  # of the built-in's checks of shapes
    "ignore:.*batch_size other than 1:UserWarning",
)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_torchscript(kind: str, flat: Callable, tmp_path: Any) -> None:
    """Traced, the modules are the built-in's, which is what the older ONNX exporter needs."""
    model, x = Model(kind).eval(), torch.randn(3, 6, 7)
    traced = torch.jit.trace(model, (x,))
    assert f"aten::{model.rnn.mode.lower()}" in str(traced.inlined_graph)
    assert "fusedrnn" not in str(traced.inlined_graph).replace("__torch__.fusedrnn", "")
    same(traced, model, flat, [(3, 9), (5, 2)])
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=False)
    for a, b in zip(run_onnx(onnxruntime.InferenceSession(path), x), flat(model(x)), strict=True):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reverted_model_can_be_scripted() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fusedrnn.GRU(7, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    model, x = Last(), torch.randn(4, 3, 7)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(fusedrnn.revert(model))(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_traced_cell(name: str, flat: Callable) -> None:
    cell, x = getattr(fusedrnn, name)(7, 6), torch.randn(3, 7)
    traced = torch.jit.trace(cell, (x,))
    for a, b in zip(flat(traced(2 * x)), flat(cell(2 * x)), strict=True):
        torch.testing.assert_close(a, b)
