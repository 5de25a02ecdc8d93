"""Fused recurrent layers: a drop-in for ``torch.nn.LSTM``, ``GRU``, ``RNN`` and their cells."""

from .backend import BackendStatus, backends, use_backend
from .cells import register_cell
from .conversion import Report, convert, revert
from .explanation import Explanation, explain
from .layer import Layer
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendStatus",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "Layer",
    "RNNCell",
    "Report",
    "__version__",
    "backends",
    "convert",
    "explain",
    "register_cell",
    "revert",
    "use_backend",
]
