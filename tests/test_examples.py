"""The recipes learn: each in a small form, against the baseline it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples import sequence_transform
from examples.trainer import History, fit, save_atomically

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plot(tmp_path):
    """A path for a plot, which must be one when the test ends."""
    path = tmp_path / "plots" / "plot.png"
    yield path
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# The loop


class Scripted(torch.nn.Module):
    """One weight, which a step of SGD moves by 1, and a metric that is read off a list."""

    def __init__(self, *metrics: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.metrics = metrics

    def fit(self, **options) -> History:
        return fit(
            self,
            lambda batch: -batch * self.weight,
            lambda: [1.0],
            lambda: self.metrics[round(self.weight.item()) - 1],
            optimizer=torch.optim.SGD(self.parameters(), lr=1.0),
            epochs=len(self.metrics),
            clip=None,
            **options,
        )


def test_the_best_weights_are_kept():
    model = Scripted(3, 1, 2, 1)
    history = model.fit()
    assert history.metric == [3, 1, 2, 1]
    assert history.best == 1  # the first of the two
    assert model.weight == 2
    assert not model.training
    model = Scripted(3, 1, 4, 4)
    assert model.fit(maximise=True).best_metric == 4
    assert model.weight == 3


def test_patience_ends_a_run_and_a_resumed_run_as_well(tmp_path):
    scores, options = (3, 2, 5, 1, 0), {"patience": 1, "checkpoint": tmp_path / "run.pt"}
    model = Scripted(*scores)
    assert model.fit(**options).metric == [3, 2, 5]
    assert model.weight == 2
    model = Scripted(*scores)
    assert model.fit(**options, resume=True).metric == [3, 2, 5]
    assert model.weight == 2


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="resume needs a checkpoint"):
        Scripted(1).fit(resume=True)
    model = Scripted(1, 1)
    model.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss of epoch 1 is nan"):
        model.fit()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.pt"
    save_atomically({"epoch": 1}, path)
    with pytest.raises(AttributeError, match="pickle"):
        save_atomically({"epoch": lambda: None}, path)
    assert torch.load(path) == {"epoch": 1}
    assert [*tmp_path.iterdir()] == [path]


# sequence_transform


def test_sequence_transform(plot):
    results = sequence_transform.main(plot=plot)
    assert [word for _, word in results.values()] == ["ohlol"] * 3
    # The loop over a cell and the layer are the same function of the same weights: sums of 20 terms in fp32.
    loop, layer, _ = (history for history, _ in results.values())
    assert loop.loss == pytest.approx(layer.loss, rel=1e-4)


def test_sequence_transform_on_the_command_line(plot):
    command = [sys.executable, "-m", "examples.sequence_transform", "--epochs", "2", "--plot", str(plot)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # a progress bar is for terminals
    assert done.stdout.startswith('data: one pair of words, "hello" and "ohlol"\n')
    assert len(re.findall(r"^ +[ehlo]{5}$", done.stdout, re.MULTILINE)) == 3 * 2  # a prediction each epoch
    refused = CliRunner().invoke(sequence_transform.app, ["--source", "hello", "--target", "hi"])
    assert refused.exit_code == 2
    assert "same length" in refused.output
