"""The smallest recurrent program: learn to turn "hello" into "ohlol", letter by letter, in three ways.

1. an RNN cell in a Python loop over the letters;
2. an RNN layer, which takes them all in one call and computes the same;
3. what larger programs are made of: an embedding, a layer, a linear readout of its state.

The second l must become another letter than the first, so what came before has to be remembered.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import fusedrnn

from . import common
from .trainer import History, fit


class CellLoop(nn.Module):
    """An RNN cell, a step at a time. The first entries of its state, one for each letter, are the scores."""

    def __init__(self, letters: int, hidden: int = 16) -> None:
        super().__init__()
        self.letters = letters
        self.cell = fusedrnn.RNNCell(letters, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[T, letters]`` for letters ``[T]``."""
        h = torch.zeros(self.cell.hidden_size, device=x.device)
        scores = []
        for letter in F.one_hot(x, self.letters).float():
            h = self.cell(letter, h)
            scores.append(h[: self.letters])
        return torch.stack(scores)


class Layer(nn.Module):
    """The same in one call."""

    def __init__(self, letters: int, hidden: int = 16) -> None:
        super().__init__()
        self.letters = letters
        self.rnn = fusedrnn.RNN(letters, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(F.one_hot(x, self.letters).float())
        return y[:, : self.letters]


class EmbeddedLayer(nn.Module):
    """Letters as learned vectors, a state of any size, and a readout of it."""

    def __init__(self, letters: int, embedding: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, embedding)
        self.rnn = fusedrnn.RNN(embedding, hidden)
        self.readout = nn.Linear(hidden, letters)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.embedding(x))
        return self.readout(y)


MODELS = {"RNNCell loop": CellLoop, "RNN": Layer, "Embedding + RNN + Linear": EmbeddedLayer}


def main(
    source: Annotated[str, typer.Option(help="What is read.")] = "hello",
    target: Annotated[str, typer.Option(help="What it is to become, as long as the source.")] = "ohlol",
    epochs: common.Epochs = 20,
    backend: common.Backend = "auto",
    seed: common.Seed = 0,
    device: common.Device = "",
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    plot: common.Plot = common.PLOTS / "sequence_transform.png",
) -> dict[str, tuple[History, str]]:
    """Turn one word into another, letter by letter, in three ways."""
    if len(source) != len(target) or not source:
        raise typer.BadParameter("source and target must be of the same length, which is not 0")
    print(f'data: one pair of words, "{source}" and "{target}"')
    alphabet = sorted({*source, *target})
    results = {}
    for name, kind in MODELS.items():
        print(f"\n{name}")
        with common.prepared(backend, seed, device) as place:
            model = kind(len(alphabet)).to(place)
            part = common.part_of(checkpoint, kind.__name__)
            results[name] = _learn(model, source, target, alphabet, place, epochs, part, resume)
    baseline = max(Counter(target).values()) / len(target)
    print()
    for name, (history, word) in results.items():
        print(f"{name:26}{word}   letters right {history.best_metric:.2f}, best in epoch {history.best + 1}")
    print(f"{'the most frequent letter':26}{'':{len(target)}}   letters right {baseline:.2f}")
    histories = {name: history for name, (history, _) in results.items()}
    title = f"{source} → {target}"
    common.plot_learning(plot, title, histories, "letters right", {"the most frequent letter": baseline})
    return results


def _learn(
    model: nn.Module,
    source: str,
    target: str,
    alphabet: list[str],
    place: torch.device,
    epochs: int,
    checkpoint: Path | None,
    resume: bool,
) -> tuple[History, str]:
    x, wanted = (torch.tensor([alphabet.index(c) for c in word], device=place) for word in (source, target))

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def predicted() -> str:
        with torch.no_grad():
            return "".join(alphabet[i] for i in model(x).argmax(1).tolist())

    history = fit(
        model,
        loss,
        train_batches=lambda: [(x, wanted)],
        validate=lambda: sum(a == b for a, b in zip(predicted(), target, strict=True)) / len(target),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
        epochs=epochs,
        maximise=True,
        name="letters right",
        checkpoint=checkpoint,
        resume=resume,
        on_epoch=lambda _: print(f"           {predicted()}"),
    )
    return history, predicted()


app = common.application(main)

if __name__ == "__main__":
    app()
