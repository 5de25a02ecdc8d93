"""Defines the ops of namespace ``fusedrnn_triton``, which ``ops.py`` carries out.

They are there as soon as the package is imported, since they can be traced at once. Triton is not: it is
imported when it is first asked whether it is available, or an op is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import libraries

NAMESPACE = "fusedrnn_triton"
_LAYER = (
    "int cell, Tensor x, Tensor[] state, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, "
    "Tensor[] bias_hh, Tensor[] weight_hr, bool[] reverse, Tensor? batch_sizes, bool tf32"
)
_INCOMING = "Tensor y, Tensor[] saved, Tensor? dy, Tensor[] dfinal, bool need_dx, bool need_dweights"
_GRADIENTS = (
    "Tensor dx, Tensor[] dstate, Tensor[] dweight_ih, Tensor[] dweight_hh, Tensor[] dbias_ih, "
    "Tensor[] dbias_hh, Tensor[] dweight_hr"
)
_OPS = {
    "sequence": f"({_LAYER}) -> (Tensor y, Tensor[] final)",
    "sequence_forward": f"({_LAYER}) -> (Tensor y, Tensor[] final, Tensor[] saved)",
    "sequence_backward": f"({_LAYER}, {_INCOMING}) -> ({_GRADIENTS})",
}
_DEVICES = ("CPU", "CUDA")  # on the CPU, Triton's interpreter


def define() -> torch.library.Library:
    """Defines the ops; they last as long as what is returned."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in _OPS.items():
        library.define(name + schema)
        for device in _DEVICES:
            library.impl(name, _carried_out(name), device)
    return library


def _carried_out(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if reason := libraries.triton_reason():
            raise RuntimeError(f"the triton backend is not available: {reason}")
        from . import ops

        return getattr(ops, name)(*arguments)

    return run
