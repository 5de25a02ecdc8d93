"""What libfusedrnn_cuda.so offers besides its ops: latencies of primitives, and plans."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

import fusedrnn
from fusedrnn.cells import CELLS

_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Sample(NamedTuple):
    """All rounds of a measurement: ``operations`` in a row, or ``bytes`` that were read; the other is 0."""

    operations: float
    bytes: float
    cycles: float
    nanoseconds: float


class Plan(NamedTuple):
    """A persistent plan, as in csrc/plan.h; its text is what ``FUSEDRNN_SCHEDULE`` takes."""

    exchange: str
    slices: int
    unit_tiles: int
    k_splits: int
    batch_tiles: int
    groups: int

    def __str__(self) -> str:
        return f"{self.exchange}:{self.slices},{self.unit_tiles},{self.k_splits},{self.batch_tiles}"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(fusedrnn.__file__).parent / "lib" / "libfusedrnn_cuda.so"))
    c_int, c_int64 = ctypes.c_int, ctypes.c_int64
    for name, arguments in {
        "measurement": [c_int],
        "measure": [c_int, c_int, ctypes.POINTER(ctypes.c_double)],
        "plans": [c_int, c_int, ctypes.c_bool, ctypes.c_bool, c_int64, c_int64, c_int64],
        "built_for": [],
    }.items():
        function = getattr(library, f"fusedrnn_cuda_{name}")
        function.restype, function.argtypes = ctypes.c_char_p, arguments
    library.fusedrnn_cuda_clusters.argtypes = [c_int]
    return library


def built_for() -> str:
    """The architectures in the library."""
    return _text(_library().fusedrnn_cuda_built_for())


def measurements() -> Iterator[str]:
    """Names of what can be measured on the current device; its index is what :func:`measure` takes."""
    index = 0
    while name := _library().fusedrnn_cuda_measurement(index):
        yield _text(name)
        index += 1


def measure(index: int, sample: int) -> Sample:
    """Runs a measurement; ``sample`` varies the memory it uses.

    Raises:
        RuntimeError: it could not be run; the message says why.
    """
    result = (ctypes.c_double * 4)()
    if reason := _library().fusedrnn_cuda_measure(index, sample, result):
        raise RuntimeError(_text(reason))
    return Sample(*result)


def clusters_at_once(blocks: int) -> int:
    """Clusters of that many blocks, each with a multiprocessor to itself, that the device has at once."""
    return _library().fusedrnn_cuda_clusters(blocks)


def plans(cell: str, dtype: torch.dtype, tf32: bool, backward: bool, N: int, B: int, H: int) -> list[Plan]:
    """The plans that the current device can keep resident, the one it would take first."""
    lines = _library().fusedrnn_cuda_plans(CELLS[cell].id, _NUMBERS[dtype], tf32, backward, N, B, H)
    found = []
    for line in _text(lines).splitlines():
        exchange, *figures = line.split()
        found.append(Plan(exchange, *map(int, figures)))
    return found


def _text(bytes_: bytes) -> str:
    return bytes_.decode()
