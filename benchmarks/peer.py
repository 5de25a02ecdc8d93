"""onnxruntime as a third measure of inference on a CPU, where it and onnx are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .shapes import Cell

# ONNX's order of the gates, in torch's: LSTM i o f c, GRU z r h.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def available() -> bool:
    """Whether the packages are installed: ``pip install fusedrnn[peer]``."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def make_call(cell: Cell, layer: torch.nn.RNNBase, x: Tensor, state: list[Tensor]) -> Callable[[], list[Any]]:
    """Makes a session that runs the layer on padded fp32 input with as many threads as torch has.

    Args:
        cell: of the layer.
        layer: one layer, one direction, with biases.
        x: ``[T, B, I]``.
        state: each ``[1, B, H]``.

    Returns:
        A call without arguments that returns ``y [T, 1, B, H]`` and the final states as arrays.
    """
    import onnx
    import onnxruntime
    from onnx import helper

    def reordered(w: Tensor) -> Tensor:
        gates = w.detach().chunk(cell.gates)
        return torch.cat([gates[g] for g in _GATES[cell.name]])[None]

    weights = {
        "W": reordered(layer.weight_ih_l0),
        "R": reordered(layer.weight_hh_l0),
        "B": torch.cat([reordered(layer.bias_ih_l0), reordered(layer.bias_hh_l0)], 1),
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
    return lambda: session.run(None, arrays)
