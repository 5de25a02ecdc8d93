"""Two files of ``fusedrnn bench`` side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .timing import Spread, geometric_mean, spread

# What makes two runs comparable; a difference is told.
_SAME = ("device", "cpu", "threads", "torch", "cuda", "cudnn")


class Change(NamedTuple):
    """One call in both files; ``before`` and ``after`` are seconds of ours."""

    name: str
    before: Spread
    after: Spread

    @property
    def ratio(self) -> float:
        """Above 1 it has become faster."""
        return self.before.median / self.after.median

    @property
    def clear(self) -> bool:
        """Whether the spreads, 10th to 90th percentile, have nothing in common."""
        return self.before.low > self.after.high or self.after.low > self.before.high


class Comparison(NamedTuple):
    """What two files tell: changes, calls that only one has, and how the machines differ."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    differences: list[str]

    @property
    def mean(self) -> float | None:
        """Geometric mean of the ratios; None if no call is in both."""
        return geometric_mean([c.ratio for c in self.changes]) if self.changes else None


def compare(before: Path, after: Path) -> Comparison:
    """Compares our times in two files.

    Raises:
        ValueError: a file is not one of ``fusedrnn bench``.
    """
    a, b = _load(before), _load(after)
    rows, others = dict(_times(a)), dict(_times(b))
    places = a["environment"], b["environment"]
    return Comparison(
        [Change(name, rows[name], others[name]) for name in rows if name in others],
        [name for name in rows if name not in others],
        [name for name in others if name not in rows],
        [
            f"{key}: {places[0].get(key)} → {places[1].get(key)}"
            for key in _SAME
            if places[0].get(key) != places[1].get(key)
        ],
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
        results["environment"], results["kernels"]["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of fusedrnn bench: {type(error).__name__}: {error}") from None
    return dict(results)


def _times(results: dict[str, Any]) -> Iterator[tuple[str, Spread]]:
    for row in results["kernels"]["rows"]:
        if row["fusedrnn_times"]:
            sizes = " ".join(f"{k}{v}" for k, v in row["shape"].items() if v and (k != "layers" or v > 1))
            yield f"{row['cell']} {sizes} {row['mode']} {row['precision']}", spread(row["fusedrnn_times"])
