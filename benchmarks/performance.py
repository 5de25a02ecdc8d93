"""Writes docs/performance.md from the files under benchmarks/results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedrnn.bench.timing import geometric_mean

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
PRIVATE = "local"  # of the machine that runs `make bench`; not kept
HEAD = """\
# Performance

Made by `python -m benchmarks.performance` from the files under `benchmarks/results`. What is not here was
not measured. A ratio is `torch.nn`'s time over ours, above 1 we are faster; medians of side-by-side pairs,
and results were right before anything was timed ([rules](benchmarks.md)). In a column: inference / training;
`°`: the planner gave the call to the built-in.
"""
NO_GPU = """\
## GPUs

**Not yet measured.** No kernel of ours has been run on a GPU: no time, latency or speed-up on one is claimed
anywhere. `make gpu-check` measures them and leaves its file under `benchmarks/results/<gpu>/`, of which this
page is made. What is proven without a GPU is on [a page of its own](proof.md).
"""


def page(results: Path = RESULTS) -> str:
    """The page that the files say."""
    files = [(path, json.loads(path.read_text())) for path in sorted(results.glob("*/*.json"))]
    files = [(path, of) for path, of in files if path.parent.name != PRIVATE]
    checks = [(path, of) for path, of in files if "stages" in of and of["environment"]["device"] != "cpu"]
    tables = [(path, of) for path, of in files if of.get("kernels")]
    sections = [HEAD]
    sections += ["\n".join(_table(path.relative_to(results), of)) for path, of in reversed(tables)]
    sections += ["\n".join(_check(path.relative_to(results), of)) for path, of in reversed(checks)]
    on_gpu = checks or any(of["environment"]["device"] != "cpu" for _, of in tables)
    return "\n".join(sections if on_gpu else [*sections, NO_GPU])


def _where(path: Path, facts: dict[str, Any]) -> Iterator[str]:
    place = facts["device"] if facts["device"] != "cpu" else f"{facts['cpu']}, {facts['threads']} threads"
    yield f"## {place}, {facts['date'][:10]}"
    yield ""
    yield (
        f"torch {facts['torch']}, fusedrnn {facts['fusedrnn']}, commit `{(facts['commit'] or '?')[:10]}`;"
        f" samples, spreads and errors in `benchmarks/results/{path}`."
    )
    yield ""


def _table(path: Path, results: dict[str, Any]) -> Iterator[str]:
    """Ratios by shape and cell, inference / training."""
    yield from _where(path, results["environment"])
    rows = results["kernels"]["rows"]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        of = [row for row in rows if row["precision"] == precision]
        cells = [*dict.fromkeys(row["cell"] for row in of)]
        yield f"| {precision} | " + " | ".join(cells) + " |"
        yield "|---" * (len(cells) + 1) + "|"
        for shape in dict.fromkeys(_shape(row["shape"]) for row in of):
            figures = [
                _ratios([r for r in of if (r["cell"], _shape(r["shape"])) == (c, shape)]) for c in cells
            ]
            yield f"| {shape} | " + " | ".join(figures) + " |"
        means = [_mean([row for row in of if row["cell"] == cell]) for cell in cells]
        yield "| **geometric mean, padded** | " + " | ".join(means) + " |"
        yield ""


def _shape(sizes: dict[str, Any]) -> str:
    words = [f"{name}{sizes[name]}" for name in "TBIH"]
    words += [f"L{sizes['layers']}"] if sizes.get("layers", 1) > 1 else []
    words += [f"{sizes['heads']} heads"] if sizes.get("heads", 1) > 1 else []
    words += ["both ways"] if sizes.get("bidirectional") else []
    words += [f"resets {sizes['resets']:.0%}"] if sizes.get("resets") else []
    return " ".join(words + ["packed"] * sizes["packed"])


def _ratios(rows: list[dict[str, Any]]) -> str:
    texts = []
    for row in sorted(rows, key=lambda row: row["mode"]):
        texts.append("wrong" if row["faults"] else f"{row['ratio']['median']:.2f}")
        texts[-1] += "°" if row["backend"] == "torch" else ""
    return " / ".join(texts)


def _mean(rows: list[dict[str, Any]]) -> str:
    ratios = [
        row["ratio"]["median"]
        for row in rows
        if not row["faults"] and not row["shape"]["packed"] and row["shape"]["T"] > 1
    ]
    return f"**{geometric_mean(ratios):.2f}**" if ratios else ""


def _check(path: Path, results: dict[str, Any]) -> Iterator[str]:
    """Verdicts of `make gpu-check`, and its ratios as planned."""
    yield from _where(path, results["environment"])
    yield "| stage of `make gpu-check` | verdict | passed | failed | not run |"
    yield "|---|---|---|---|---|"
    for stage in results["stages"]:
        verdicts = [record["verdict"] for record in stage["records"]]
        counts = [str(verdicts.count(v)) for v in ("passed", "failed", "not run")]
        yield f"| {stage['title']} | {stage['verdict']} | " + " | ".join(counts) + " |"
    yield ""
    timed = [r for stage in results["stages"] for r in stage["records"] if r.get("ratios", {}).get("planned")]
    if not timed:
        yield "No time was measured in that run."
        yield ""
        return
    yield "| dtype | cell | T B I H | inference / training |"
    yield "|---|---|---|---|"
    by: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in timed:
        key = (r["precision"], r["cell"], " ".join(map(str, r["shape"])))
        by.setdefault(key, {})[r["mode"]] = r["ratios"]["planned"]
    for key, modes in by.items():
        figures = [f"{modes[mode]:.2f}" if mode in modes else "" for mode in ("inference", "training")]
        yield f"| {' | '.join(key)} | {' / '.join(figures)} |"
    yield ""


def main() -> int:
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
