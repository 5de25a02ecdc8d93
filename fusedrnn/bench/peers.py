"""What stands beside ``torch.nn`` and us where the user has it: each takes the weights of the same layer.

Peers are reached by their public interface, and only where they are installed. A peer that computes something
else than the layer is not timed.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedrnn.accuracy import Precision, relative_l2
from fusedrnn.trial import Cell, Inputs, Shape, Trio, call

Results = Callable[[], dict[str, Tensor]]


class Unserved(Exception):
    """A call that a peer cannot make, and why."""


class Peer(NamedTuple):
    """``make(cell, shape, trio, mode)`` returns a call, which returns results by the names of the layer's."""

    name: str
    needs: tuple[str, ...]
    make: Callable[[Cell, Shape, Trio, str], Results]

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.needs if not importlib.util.find_spec(name)]


def check(results: dict[str, Tensor], truth: dict[str, Tensor], precision: Precision) -> str:
    """What is wrong with a peer's results; empty if nothing is."""
    allowed = precision.cap * precision.unit
    for name, result in results.items():
        error = relative_l2(result.to(truth[name].device).reshape(truth[name].shape), truth[name])
        if not error <= allowed:
            return f"its {name} has a relative error of {error:.1e} against fp64, allowed is {allowed:.1e}"
    return ""


def _plain(shape: Shape) -> None:
    if shape.layers > 1 or shape.bidirectional or shape.packed or shape.P or shape.resets or shape.heads > 1:
        raise Unserved("it is compared on one plain layer in one direction, padded")


class StepLoop(nn.Module):
    """The layer as a Python loop over its cell, whose parameters have the layer's names."""

    def __init__(self, cell: Cell, layer: nn.RNNBase, *, compiled: bool) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)
        step: Any = getattr(torch, {"LSTM": "lstm_cell", "GRU": "gru_cell"}.get(cell.name, "rnn_tanh_cell"))
        self._step = torch.compile(step, dynamic=False) if compiled else step
        self._several = cell.states > 1

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        weights = [getattr(self, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        state = tuple(s[0] for s in state) if self._several else state[0]
        outputs = []
        for x_t in x.unbind(0):
            state = self._step(x_t, state, *weights)
            outputs.append(state[0] if self._several else state)
        final = tuple(s[None] for s in state) if self._several else state[None]
        return torch.stack(outputs), final


def _loop(cell: Cell, shape: Shape, trio: Trio, mode: str, *, compiled: bool = False) -> Results:
    _plain(shape)
    layer = StepLoop(cell, trio.builtin, compiled=compiled)
    return lambda: call(layer, trio.inputs, mode)


def _compiled_loop(cell: Cell, shape: Shape, trio: Trio, mode: str) -> Results:
    return _loop(cell, shape, trio, mode, compiled=True)


# ONNX's order of the gates, in torch's: LSTM i o f c, GRU z r h.
_ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _reordered(w: Tensor, gates: tuple[int, ...]) -> Tensor:
    parts = w.detach().chunk(len(gates))
    return torch.cat([parts[g] for g in gates])


def _onnxruntime(cell: Cell, shape: Shape, trio: Trio, mode: str) -> Results:
    """A session on the CPU with as many threads as torch has."""
    _plain(shape)
    layer: Any = trio.builtin
    x, state, *_ = trio.inputs
    if mode != "inference" or x.dtype != torch.float32 or x.device.type != "cpu":
        raise Unserved("it is compared in fp32 inference on a CPU")
    import onnx
    import onnxruntime
    from onnx import helper

    gates = _ONNX_GATES[cell.name]
    weights = {
        "W": _reordered(layer.weight_ih_l0, gates)[None],
        "R": _reordered(layer.weight_hh_l0, gates)[None],
        "B": torch.cat([_reordered(layer.bias_ih_l0, gates), _reordered(layer.bias_hh_l0, gates)])[None],
    }
    feeds = {"X": x, **{f"state{i}": s for i, s in enumerate(state)}}
    outputs = ["Y", *(f"final{i}" for i in range(len(state)))]
    node = helper.make_node(
        cell.name,
        ["X", *weights, "", *list(feeds)[1:]],
        outputs,
        hidden_size=layer.hidden_size,
        **({"linear_before_reset": 1} if cell.name == "GRU" else {}),
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v.shape) for k, v in feeds.items()],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(v.numpy(), k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = {k: v.detach().contiguous().numpy() for k, v in feeds.items()}

    def run() -> dict[str, Tensor]:
        y, *final = session.run(None, arrays)
        return {"y": torch.from_numpy(y), **{f"final{i}": torch.from_numpy(s) for i, s in enumerate(final)}}

    return run


def _timed_as(mode: str, forward: Callable[[], Tensor], inputs: Inputs, sources: list[Tensor]) -> Results:
    """A call that returns y; in training it also computes gradients, in the peer's own layouts."""

    def run() -> dict[str, Tensor]:
        if mode == "inference":
            with torch.inference_mode():
                return {"y": forward()}
        y = forward()
        torch.autograd.grad(y, sources, inputs.dy)
        return {"y": y}

    return run


def _haste(cell: Cell, shape: Shape, trio: Trio, mode: str) -> Results:
    _plain(shape)
    if cell.name not in ("LSTM", "GRU") or trio.inputs.x.dtype != torch.float32:
        raise Unserved("it has LSTM and GRU, in fp32")
    import haste_pytorch

    layer = getattr(haste_pytorch, cell.name)(shape.I, shape.H).to(trio.inputs.x.device)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    layer.from_native_weights(*(getattr(trio.builtin, name).detach() for name in names))
    inputs = trio.inputs
    state: Any = tuple(inputs.state) if cell.states > 1 else inputs.state[0]
    sources = [inputs.x, *layer.parameters()]
    return _timed_as(mode, lambda: layer(inputs.x, state)[0], inputs, sources)


def _torchrl(cell: Cell, shape: Shape, trio: Trio, mode: str) -> Results:
    """Its modules for agents, which know where episodes begin: by its Triton kernels where there is a GPU."""
    _plain(replace(shape, resets=0.0))
    if cell.name not in ("LSTM", "GRU"):
        raise Unserved("it has LSTM and GRU")
    from tensordict import TensorDict
    from torchrl import modules

    inputs = trio.inputs
    x, state = inputs.x, inputs.state
    layer = getattr(nn, cell.name)(shape.I, shape.H, batch_first=True).to(x)
    layer.load_state_dict(trio.builtin.state_dict())
    names = ("h", "c")[: cell.states]
    try:
        module = getattr(modules, f"{cell.name}Module")(
            **{cell.name.lower(): layer},
            in_keys=["x", *names],
            out_keys=["y", *(("next", name) for name in names)],
            default_recurrent_mode=True,
            recurrent_backend="triton" if x.is_cuda else "pad",
            recurrent_compute_dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32,
        )
    except TypeError:
        raise Unserved("its version has no kernels of its own") from None
    starts = x.new_zeros(shape.T, shape.B, 1, dtype=torch.bool)
    if inputs.reset is not None:
        starts = inputs.reset[..., None]
    given = {"is_init": starts.transpose(0, 1)}  # [B, T, 1]
    for name, s in zip(names, state, strict=True):
        given[name] = s.new_zeros(shape.B, shape.T, 1, shape.H)  # a state for each step, where one may begin
        given[name][:, 0] = s.detach().transpose(0, 1) * ~starts[0, :, None]

    def forward() -> Tensor:
        call = TensorDict({"x": inputs.x.transpose(0, 1), **given}, [shape.B, shape.T])
        return module(call)["y"].transpose(0, 1)

    return _timed_as(mode, forward, inputs, [inputs.x, *layer.parameters()])


def _flashrnn(cell: Cell, shape: Shape, trio: Trio, mode: str) -> Results:
    """From states of zeros; the product W_ih x is torch's, as in its own examples."""
    _plain(replace(shape, heads=1))
    inputs = trio.inputs
    if inputs.x.device.type != "cuda" or inputs.x.dtype != torch.bfloat16 or cell.name != "LSTM":
        raise Unserved("it is compared as an LSTM in bf16 on a GPU")
    from flashrnn import flashrnn

    layer: Any = trio.builtin
    G, n, d = cell.gates, shape.heads, shape.H // shape.heads
    w, b = layer.weight_ih_l0, layer.bias_ih_l0 + layer.bias_hh_l0

    def forward(order: tuple[int, ...], transposed: bool) -> Tensor:
        gates = nn.functional.linear(inputs.x.transpose(0, 1), w).unflatten(-1, (G, n, d))
        wx = gates[:, :, list(order)]  # [B, T, G, n, d]
        r = layer.weight_hh_l0.unflatten(0, (G, n, d))[list(order)]  # [G, n, d, d]
        bias = b.view(G, n, d)[list(order)]
        r = r.transpose(-1, -2) if transposed else r
        states, _ = flashrnn(wx, r, bias, function="lstm", dtype="bfloat16", backend="cuda_fused")
        return states[0].flatten(-2).transpose(0, 1)

    with torch.no_grad():
        order, transposed = first_right(forward, trio.ours(inputs.x)[0], G)
    run = _timed_as(mode, lambda: forward(order, transposed), inputs, [inputs.x, *layer.parameters()])

    def timed() -> dict[str, Tensor]:
        run()
        return {}  # compared already, from other states than the layer's call

    return timed


def first_right(
    forward: Callable[[tuple[int, ...], bool], Tensor], wanted: Tensor, gates: int
) -> tuple[tuple[int, ...], bool]:
    """The order of gates and the layout of weights with which a peer computes the layer: found by trial.

    Raises:
        Unserved: there is none.
    """
    for order, transposed in itertools.product(itertools.permutations(range(gates)), (False, True)):
        if relative_l2(forward(order, transposed), wanted) < 0.05:  # two gates exchanged are off by far more
            return order, transposed
    raise Unserved("with no order of its gates it computes the same layer")


PEERS = {
    peer.name: peer
    for peer in (
        Peer("python loop", (), _loop),
        Peer("compiled loop", (), _compiled_loop),
        Peer("onnxruntime", ("onnx", "onnxruntime"), _onnxruntime),
        Peer("haste", ("haste_pytorch",), _haste),
        Peer("flashrnn", ("flashrnn",), _flashrnn),
        Peer("torchrl", ("torchrl",), _torchrl),
    )
}


def installed(names: Sequence[str]) -> Iterator[Peer]:
    """The peers of those names that can be imported."""
    for name in names:
        if not PEERS[name].missing():
            yield PEERS[name]
