"""Sequence to sequence: dates as people write them in four languages, to ISO 8601, letter by letter.

    3 mars 1978  →  1978-03-03          December 24, 2031  →  2031-12-24

The data are made by Babel from the Unicode CLDR, so the right answer is known, and a date counts only if all
of it is right. ``--data`` takes lines of a source, a tab and a target instead.

A bidirectional GRU reads the source; what it knows at both ends is the state another GRU writes from. In
training the writer is given the right previous letter (teacher forcing) in a share of the batches: then all
steps are one call. In the other batches it is given its own last letter, as it will be later. At the end the
test data are decoded greedily and with a beam.
"""

from __future__ import annotations

import datetime as dt
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from babel.dates import format_date
from dateutil import parser
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fusedrnn

from . import common
from .trainer import History, fit

LANGUAGES = ("en", "de", "fr", "es")
START, END = 0, 1  # of every alphabet; END is also what stands behind the end
SYMBOLS = 2

Pair = tuple[str, str]
Batch = tuple[Tensor, Tensor, Tensor]  # sources [B, S], their lengths [B], targets with END [B, T]


class Seq2Seq(nn.Module):
    """An encoder, whose last states become the first state of a decoder."""

    def __init__(self, source_symbols: int, target_symbols: int, hidden: int) -> None:
        super().__init__()
        self.read = nn.Embedding(source_symbols, 32)
        self.encoder = fusedrnn.GRU(32, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, 2 * hidden)
        self.written = nn.Embedding(target_symbols, 32)
        self.decoder = fusedrnn.GRU(32, 2 * hidden, batch_first=True)
        self.readout = nn.Linear(2 * hidden, target_symbols)

    def encode(self, sources: Tensor, lengths: Tensor) -> Tensor:
        """The decoder's first state ``[1, B, 2H]``."""
        _, h = self.encoder(self.read(sources), lengths=lengths)
        return self.bridge(torch.cat([h[0], h[1]], 1)).tanh().unsqueeze(0)

    def write(self, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[B, T, symbols]`` of what follows each of the symbols ``[B, T]``, and the state behind."""
        y, state = self.decoder(self.written(previous), state)
        return self.readout(y), state

    def forward(self, sources: Tensor, lengths: Tensor, targets: Tensor, forced: bool) -> Tensor:
        """Scores ``[B, T, symbols]`` of the targets; ``forced``: each step is given the right last symbol."""
        state = self.encode(sources, lengths)
        previous = torch.full_like(targets[:, :1], START)
        if forced:
            return self.write(torch.cat([previous, targets[:, :-1]], 1), state)[0]
        scores = []
        for _ in range(targets.size(1)):
            step, state = self.write(previous, state)
            scores.append(step)
            previous = step.argmax(2)
        return torch.cat(scores, 1)

    @torch.no_grad()
    def decode(self, sources: Tensor, lengths: Tensor, longest: int, beam: int = 1) -> Tensor:
        """The most probable targets ``[B, T <= longest]`` that a beam finds; a beam of 1 is greedy.

        A beam keeps, after each step, that many beginnings of the largest probability.
        """
        state = self.encode(sources, lengths).repeat_interleave(beam, 1)  # [1, B * beam, 2H]
        B, device = len(sources), sources.device
        first = torch.arange(B, device=device).unsqueeze(1) * beam
        total = torch.full((B, beam), -torch.inf, device=device)
        total[:, 0] = 0  # all beginnings are the same one
        found = torch.full((B * beam, 1), START, device=device)
        for _ in range(longest):
            step, state = self.write(found[:, -1:], state)
            logs = step.squeeze(1).log_softmax(1)
            ended = found[:, -1] == END
            logs[ended] = -torch.inf
            logs[ended, END] = 0
            symbols = logs.size(1)
            total, best = (total.unsqueeze(2) + logs.view(B, beam, -1)).flatten(1).topk(beam)
            rows = (first + best // symbols).flatten()
            found = torch.cat([found[rows], (best % symbols).view(-1, 1)], 1)
            state = state[:, rows]
            if (found[:, -1] == END).all():
                break
        return found.view(B, beam, -1)[:, 0, 1:]


@dataclass
class Result:
    """Shares of the test data that are right to the last letter."""

    history: History
    greedy: float
    beam: float
    baseline: float


def main(
    hidden: Annotated[int, typer.Option(min=1, help="Units of each direction of the encoder.")] = 64,
    forcing: Annotated[
        float, typer.Option(min=0, max=1, help="Share of batches with teacher forcing.")
    ] = 0.8,
    beam: Annotated[int, typer.Option(min=1, help="Width of the beam.")] = 4,
    size: Annotated[int, typer.Option(min=20, help="How many dates, if they are made.")] = 8000,
    epochs: common.Epochs = 8,
    data: common.Data = None,
    backend: common.Backend = "auto",
    seed: common.Seed = 0,
    device: common.Device = "",
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    plot: common.Plot = common.PLOTS / "seq2seq.png",
) -> Result:
    """Turn dates as people write them into ISO 8601."""
    with common.prepared(backend, seed, device) as place:
        pairs = read(data) if data else dates(size)
        held = max(len(pairs) // 10, 1)
        training, validation, test = pairs[2 * held :], pairs[:held], pairs[held : 2 * held]
        where = str(data) if data else "dates written by Babel in " + ", ".join(LANGUAGES)
        print(f"data: {where}; {len(training)} to train, {len(test)} to test")
        letters, symbols = (sorted({c for pair in training for c in pair[side]}) for side in (0, 1))
        longest = max(len(target) for _, target in training) + 1
        model = Seq2Seq(len(letters) + SYMBOLS, len(symbols) + SYMBOLS, hidden).to(place)

        def as_numbers(pairs: list[Pair]) -> Batch:
            return as_batch(pairs, letters, symbols, place)

        def loss(batch: Batch) -> Tensor:
            sources, lengths, targets = batch
            scores = model(sources, lengths, targets, forced=bool(torch.rand(()) < forcing))
            return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

        def answers(pairs: list[Pair], width: int) -> list[str]:
            sources, lengths, _ = as_numbers(pairs)
            return [as_text(row, symbols) for row in model.decode(sources, lengths, longest, width).tolist()]

        def batches() -> list[Batch]:
            order = torch.randperm(len(training)).split(64)
            return [as_numbers([training[i] for i in rows.tolist()]) for rows in order]

        history = fit(
            model,
            loss,
            batches,
            lambda: exact(answers(validation, 1), validation),
            optimizer=torch.optim.AdamW(model.parameters(), lr=4e-3),
            epochs=epochs,
            patience=4,
            maximise=True,
            name="exact",
            checkpoint=checkpoint,
            resume=resume,
        )
        greedy, searched = answers(test, 1), answers(test, beam)
    usual = Counter(target for _, target in training).most_common(1)[0][0]
    rule = [usual if data else parsed(source) for source, _ in test]
    rule_name = "the most frequent target" if data else "dateutil, which knows English"
    result = Result(history, exact(greedy, test), exact(searched, test), exact(rule, test))
    print("\nright to the last letter, test data")
    lines = (("greedy", result.greedy), (f"beam of {beam}", result.beam), (rule_name, result.baseline))
    for name, share in lines:
        print(f"{name:32}{share:.3f}")
    for (source, target), guess in zip(test[:4], searched, strict=False):
        print(f"{source} → {guess}{'' if guess == target else f', not {target}'}")
    common.plot_learning(
        plot, "Dates to ISO 8601", {"GRU": history}, "exact matches", {rule_name: result.baseline}
    )
    return result


def dates(count: int) -> list[Pair]:
    """Different dates of a century, each in one language, and in ISO 8601."""
    first = dt.date(1950, 1, 1)
    days = [first + dt.timedelta(days) for days in torch.randperm(36524)[:count].tolist()]
    chosen = torch.randint(len(LANGUAGES), (len(days),)).tolist()
    return [
        (format_date(day, "long", LANGUAGES[i]), day.isoformat()) for day, i in zip(days, chosen, strict=True)
    ]


def read(path: Path) -> list[Pair]:
    """Pairs from lines of a source, a tab and a target, in random order."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [(source, target) for source, _, target in (line.partition("\t") for line in lines)]
    if len(pairs) < 3 or not all(source and target for source, target in pairs):
        raise typer.BadParameter(f"{path} must have three lines or more, each a source, a tab and a target")
    return [pairs[i] for i in torch.randperm(len(pairs)).tolist()]


def parsed(source: str) -> str:
    """What dateutil makes of a date, empty where it makes nothing of it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of words that might be time zones
            return parser.parse(source).date().isoformat()
    except (ValueError, OverflowError):
        return ""


def as_batch(pairs: list[Pair], letters: list[str], symbols: list[str], place: torch.device) -> Batch:
    """Numbers of the letters; one that training has not shown is START, which is nowhere else in a source."""
    known = [{c: i for i, c in enumerate(alphabet, SYMBOLS)} for alphabet in (letters, symbols)]
    sources = [torch.tensor([known[0].get(c, START) for c in source]) for source, _ in pairs]
    targets = [torch.tensor([*(known[1].get(c, START) for c in target), END]) for _, target in pairs]
    lengths = torch.tensor([len(source) for source, _ in pairs])
    padded = [pad_sequence(rows, batch_first=True, padding_value=END) for rows in (sources, targets)]
    return padded[0].to(place), lengths.to(place), padded[1].to(place)


def as_text(row: list[int], symbols: list[str]) -> str:
    written = row[: row.index(END)] if END in row else row
    return "".join(symbols[i - SYMBOLS] for i in written if i >= SYMBOLS)


def exact(answers: list[str], pairs: list[Pair]) -> float:
    return sum(answer == target for answer, (_, target) in zip(answers, pairs, strict=True)) / len(pairs)


app = common.application(main)

if __name__ == "__main__":
    app()
