"""Loads the compiled libraries and the Triton kernels once and remembers why that failed."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

from . import env

FOLDER = Path(__file__).parent / "lib"
CPU, CUDA = "libfusedrnn_cpu.so", "libfusedrnn_cuda.so"
EMULATOR = "libfusedrnn_emulator.so"


_set_aside: dict[str, str] = {}


def set_aside(name: str, why: str) -> None:
    """Makes a library that was loaded one that cannot be used."""
    _set_aside[name] = f"{name} {why}"


def cpu_reason() -> str:
    """Why the CPU kernels cannot be used; empty if they can."""
    return _reason(CPU)


def cuda_reason() -> str:
    """Why the CUDA library cannot be used; empty if it can."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return cpu_reason() or _reason(CUDA)


def emulator_reason() -> str:
    """Why the CUDA kernels cannot be run on the CPU; empty if they can."""
    if not (FOLDER / EMULATOR).exists():
        return f"{EMULATOR} is built only with FUSEDRNN_EMULATOR=1, for tests"
    return _reason(EMULATOR)


@cache
def triton_reason() -> str:
    """Why the Triton kernels cannot be used; empty if they can."""
    if not env.interpreted() and not torch.cuda.is_available():
        return f"torch finds no CUDA device, and {env.INTERPRET}=1 is not set"
    try:
        import triton

        if env.interpreted():
            import numpy as np
    except Exception as error:  # of whatever kind: a damaged one must not take this package with it
        return f"triton could not be imported: {error}"
    version = _version(triton.__version__)
    if version < (3, 6):
        return f"it needs triton 3.6 or newer, this is {triton.__version__}"
    if env.interpreted() and version < (3, 7) and _version(np.__version__) >= (2, 4):
        return f"the interpreter of triton {triton.__version__} needs numpy older than 2.4"
    if env.interpreted() == isinstance(triton.language.cdiv, triton.runtime.JITFunction):
        return f"{env.INTERPRET} was changed after triton had been imported"
    return ""


def _version(name: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", name)[:2]
    return int(major), int(minor)


def _reason(name: str) -> str:
    return _set_aside.get(name) or _load_once(name)


@cache
def _load_once(name: str) -> str:
    return _load(name)


def _load(name: str) -> str:
    path = FOLDER / name
    if not path.exists():
        return f"{name} was not built; reinstall with: pip install --no-build-isolation fusedrnn"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{name} could not be loaded: {error}"
    return ""
