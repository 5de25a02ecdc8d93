"""The named sets of calls that are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from fusedrnn.trial import CELLS, Cell, Shape


class Entry(NamedTuple):
    """A cell and the sizes it is measured with."""

    cell: Cell
    shape: Shape


LSTM, GRU, RNN = CELLS

SHAPES = (
    Shape(100, 1, 64, 64),
    Shape(100, 8, 80, 128),
    Shape(60, 32, 128, 128),
    Shape(60, 32, 256, 256),
    Shape(64, 1, 512, 512),
    Shape(32, 16, 320, 512),
    Shape(60, 32, 128, 128, packed=True),
    Shape(1, 1, 64, 64),
    Shape(1, 1, 512, 512),
)
QUICK_SHAPES = (SHAPES[0], SHAPES[2], SHAPES[6])


def _square(T: int, B: int, H: int) -> Shape:
    return Shape(T, B, H, H)


def _flashrnn() -> Iterator[Entry]:
    """Pöppel, Beck, Hochreiter, 2024: one head of 768 and 12 of 64, then sweeps of batch and length."""
    shapes = [_square(1024, B, 768) for B in (16, 2, 8, 32, 64, 128, 256)]
    shapes += [_square(T, 16, 768) for T in (256, 512, 2048)]
    shapes.insert(1, replace(shapes[0], heads=12))
    yield from (Entry(cell, shape) for shape in shapes for cell in (LSTM, GRU))


def _deepbench() -> Iterator[Entry]:
    """Baidu's DeepBench: training sizes, then those of inference."""
    for H, batches, T in (
        (512, (16, 32, 64, 128), 25),
        (1024, (16, 32, 64, 128), 25),
        (2048, (16, 32, 64, 128), 25),
        (1536, (8, 16, 32), 50),
        (256, (16, 32, 64), 150),
    ):
        yield from (Entry(LSTM, _square(T, B, H)) for B in batches)
    for H, lengths in ((2560, (375, 187)), (2048, (375, 187)), (1536, (375, 187)), (1024, (1500, 750))):
        yield from (Entry(GRU, _square(T, 32, H)) for T in lengths)
    for B in (1, 2, 4):
        yield from (Entry(LSTM, _square(T, B, H)) for H, T in ((512, 25), (1536, 50), (256, 150)))
        yield from (Entry(GRU, _square(T, B, H)) for H, T in ((1536, 750), (1024, 1500)))


def _haste() -> Iterator[Entry]:
    """LMNT's Haste."""
    for B, H in product((1, 32, 64, 128), (64, 128, 256, 512)):
        yield from (Entry(cell, _square(50, B, H)) for cell in (LSTM, GRU))


def _rl() -> Iterator[Entry]:
    """A rollout of an agent whose episodes end at 3 % of the steps."""
    yield from (Entry(cell, replace(_square(128, 128, 256), resets=0.03)) for cell in CELLS)


def _packed() -> Iterator[Entry]:
    """Two layers over lengths that fall evenly."""
    for T, B in ((100, 32), (1000, 32), (4000, 16)):
        yield from (Entry(cell, Shape(T, B, 256, 256, packed=True, layers=2)) for cell in CELLS)


def _cliffs() -> Iterator[Entry]:
    """Where a library changes its kernel: odd sizes, and more steps than 16 bits count."""
    shapes = [_square(100, 16, H) for H in (160, 168, 192, 200)]
    shapes += [_square(100, B, 256) for B in (1, 7, 62, 130, 256)]
    yield from (Entry(cell, shape) for shape in (*shapes, _square(70000, 1, 64)) for cell in (LSTM, GRU))


def _grid() -> Iterator[Entry]:
    """Everything against everything: hours on a CPU. Precisions are chosen apart."""
    for layers, both in product((1, 2, 4), (False, True)):
        for H, B, T in product((256, 512, 768, 1024, 2048), (1, 16, 64, 256), (128, 1024)):
            shape = Shape(T, B, H, H, layers=layers, bidirectional=both)
            yield from (Entry(cell, shape) for cell in (LSTM, GRU))


SETS = {
    "default": lambda: (Entry(cell, shape) for cell in CELLS for shape in SHAPES),
    "quick": lambda: (Entry(cell, shape) for cell in CELLS for shape in QUICK_SHAPES),
    "flashrnn": _flashrnn,
    "deepbench": _deepbench,
    "haste": _haste,
    "rl": _rl,
    "packed": _packed,
    "cliffs": _cliffs,
    "grid": _grid,
}


def entries(name: str, cells: Sequence[str] = ()) -> list[Entry]:
    """The calls of a set, each once.

    Args:
        name: a key of :data:`SETS`.
        cells: names of the cells to keep, as ``LSTM``; none for all.
    """
    return [e for e in dict.fromkeys(SETS[name]()) if not cells or e.cell.name in cells]
