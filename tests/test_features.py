"""docs/features.md: made of the marks of the tests, and up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from . import conftest, features

FOLDER = Path(__file__).parent


def test_the_page_is_up_to_date(request: pytest.FixtureRequest) -> None:
    hint = "docs/features.md is not what the tests say: python -m tests.features"
    items = request.config.stash[conftest.COLLECTED]
    if {item.path for item in items} >= set(FOLDER.glob("test_*.py")):
        assert features.PAGE.read_text() == features.page(items), hint
        return
    command = [sys.executable, "-m", "tests.features", "--check"]  # this run knows only some of the tests
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr or hint


class Item:
    """A test with marks."""

    nodeid = "test"

    def __init__(self, *marks: pytest.MarkDecorator) -> None:
        self.marks = [m.mark for m in marks]

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [m for m in self.marks if m.name == name]


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FEATURES", {"Section": {"it": "what it is"}})
    feature = pytest.mark.feature
    items = [Item(feature("it", nn="no")), Item(feature("it", backends=["emulator", "reference"])), Item()]
    assert features.page(items).splitlines()[-1] == "| **it** | what it is | no | ● | ● |  |  | ● |"
    for wrong, message in (
        ([Item(feature("it"))], "say of torch.nn nothing"),
        ([Item(feature("it", nn="no")), Item(feature("it", nn="yes"))], "say of torch.nn no, yes"),
        ([Item()], "no test shows it"),
        ([Item(feature("that"))], "has no feature 'that'"),
        ([Item(feature("it", "that"))], r"feature\(name, nn=..., backends=\[...\]\)"),
        ([Item(feature("it", backend="cpu"))], r"feature\(name, nn=..., backends=\[...\]\)"),
    ):
        with pytest.raises(pytest.UsageError, match=message):
            features.page(wrong)
