"""Loads the compiled libraries once and remembers why one could not be loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "lib"
_EMULATOR = "libfusedrnn_emulator.so"


@cache
def cpu_reason() -> str:
    """Why the CPU kernels cannot be used; empty if they can."""
    return _load("libfusedrnn_cpu.so")


@cache
def cuda_reason() -> str:
    """Why the CUDA library cannot be used; empty if it can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return cpu_reason() or _load("libfusedrnn_cuda.so")


@cache
def emulator_reason() -> str:
    """Why the CUDA kernels cannot be run on the CPU; empty if they can."""
    if not (_FOLDER / _EMULATOR).exists():
        return f"{_EMULATOR} is built only with FUSEDRNN_EMULATOR=1, for tests"
    return _load(_EMULATOR)


def _load(name: str) -> str:
    path = _FOLDER / name
    if not path.exists():
        return f"{name} was not built; reinstall with: pip install --no-build-isolation fusedrnn"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{name} could not be loaded: {error}"
    return ""
