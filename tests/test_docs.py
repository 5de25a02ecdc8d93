"""The documentation builds without a warning, its examples run, and its figures are those of the files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import claims, performance

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("builder", ["html", "doctest"])
def test_the_documentation_builds(builder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder, DOCS, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if builder == "html":
        assert "fusedrnn.explain" in (tmp_path / "api.html").read_text()
        index = (tmp_path / "index.html").read_text()
        assert all(f"{page.stem}.html" in index for page in DOCS.glob("*.md"))
    else:
        assert re.search(r"[1-9]\d* tests\n.* 0 failures in tests", (tmp_path / "output.txt").read_text())


def test_performance_is_what_the_results_say():
    assert performance.PAGE.read_text() == performance.page(), "run python -m benchmarks.performance"


def test_performance_says_what_was_not_measured(tmp_path):
    assert "Not yet measured" in performance.page(tmp_path)
    record = {"verdict": "passed", "ratios": {"planned": 2.5}, "precision": "bf16", "cell": "LSTM"}
    record |= {"shape": [256, 16, 512, 512], "mode": "training"}
    stages = [{"title": "Time against the built-in", "verdict": "passed", "records": [record]}]
    facts = {"device": "NVIDIA H200", "date": "2030-01-02T00:00:00", "torch": "3", "fusedrnn": "1"}
    for folder, device in (("nvidia-h200", "NVIDIA H200"), ("emulator", "cpu"), ("local", "NVIDIA H200")):
        (tmp_path / folder).mkdir()
        of = {"environment": facts | {"device": device, "commit": "abc", "cpu": "", "threads": 1}}
        (tmp_path / folder / "2030-01-02.json").write_text(json.dumps(of | {"stages": stages}))
    page = performance.page(tmp_path)
    assert "Not yet measured" not in page
    assert page.count("## NVIDIA H200, 2030-01-02") == 1  # not that of a run at home, nor of the emulator
    assert "| bf16 | LSTM | 256 16 512 512 |  / 2.50 |" in page


def test_claims(tmp_path, capsys):
    path = tmp_path / "claims.json"
    assert claims.main(["--quick", "--seconds", "0", "--device", "cpu", "--out", str(path)]) == 0
    found = json.loads(path.read_text())["claims"]
    assert len(found) == 15
    assert found[0]["holds"] is True  # parameters are counted, not timed
    assert found[0]["found"] == "1:3:4"
    for finding in found:
        assert finding["source"]
        assert all(figure >= 0 for figure in finding["figures"].values())
    assert "truncated back-propagation" in capsys.readouterr().out
