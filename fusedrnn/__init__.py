"""Fused recurrent layers: a drop-in for ``torch.nn.LSTM``, ``GRU``, ``RNN`` and their cells."""

from .backend import BackendStatus, backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "__version__",
    "backends",
    "use_backend",
]

try:
    from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
except ImportError:
    pass
