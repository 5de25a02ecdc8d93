"""Many to many: a label for each letter of a line of Python, by a bidirectional LSTM.

The data are real and their labels exact: modules of Python's own library, labelled by its own ``tokenize``.
Whether a name is called shows only behind it, whether it is defined only before it, and whether a quote opens
or closes a string on both sides: so both directions are needed. Modules are either in the training or in the
test data. ``--data`` takes a folder of ``.py`` files instead.
"""

from __future__ import annotations

import io
import keyword
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fusedrnn

from . import common
from .trainer import History, fit

# One sign each, to print under a line.
TAGS = {" ": "space", "k": "keyword", "n": "name", "c": "called", "d": "defined", "s": "string"}
TAGS |= {"0": "number", "=": "operator", "#": "comment"}
SIGNS = "".join(TAGS)
MODULES = (
    *("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "difflib", "fractions", "heapq"),
    *("inspect", "mailbox", "optparse", "pathlib", "pdb", "random", "statistics", "tarfile", "textwrap"),
    *("typing", "zipfile"),
)
LONGEST = 80
OUTSIDE = -100  # what cross_entropy ignores


@dataclass
class Lines:
    """``letters`` and ``tags`` ``[N, longest]`` int64, padded with 0 and -100, and ``lengths [N]``."""

    letters: Tensor
    tags: Tensor
    lengths: Tensor

    def batches(self, size: int, order: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        cut = [(rows, int(self.lengths[rows].max())) for rows in order.split(size)]
        return [(self.letters[rows, :T], self.tags[rows, :T], self.lengths[rows]) for rows, T in cut]


class Tagger(nn.Module):
    """Scores of tags from the states of both directions at a letter."""

    def __init__(self, alphabet: int, hidden: int, bidirectional: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 32)
        self.rnn = fusedrnn.LSTM(32, hidden, batch_first=True, bidirectional=bidirectional)
        self.readout = nn.Linear(hidden * (1 + bidirectional), len(SIGNS))

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Scores ``[B, T, tags]``; the backward direction starts at the end of each line."""
        y, _ = self.rnn(self.embedding(letters), lengths=lengths)
        return self.readout(y)


def main(
    hidden: Annotated[int, typer.Option(min=1, help="Units of each direction.")] = 64,
    bidirectional: Annotated[bool, typer.Option(help="Whether to read backwards as well.")] = True,
    size: Annotated[int, typer.Option(min=0, help="At most so many lines; 0 for all.")] = 5000,
    epochs: common.Epochs = 3,
    data: common.Data = None,
    backend: common.Backend = "auto",
    seed: common.Seed = 0,
    device: common.Device = "",
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    plot: common.Plot = common.PLOTS / "tagging.png",
) -> tuple[History, float]:
    """Label each letter of a line of Python: keyword, name, called, defined, string, number, ..."""
    with common.prepared(backend, seed, device) as place:
        files = sorted(data.rglob("*.py")) if data else library()
        training, test, alphabet = split(files, size, place)
        where = str(data) if data else "lines of Python's own library, labelled by tokenize"
        print(f"data: {where}; {len(training.lengths)} to train, {len(test.lengths)} held out")
        baseline = by_letter_alone(training, test, len(alphabet) + 1)
        model = Tagger(len(alphabet) + 1, hidden, bidirectional).to(place)

        def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            letters, tags, lengths = batch
            return F.cross_entropy(
                model(letters, lengths).flatten(0, 1), tags.flatten(), ignore_index=OUTSIDE
            )

        def accuracy() -> float:
            order = torch.arange(len(test.lengths), device=place)
            right = [(model(x, n).argmax(2) == y)[marked(y)] for x, y, n in test.batches(256, order)]
            return torch.cat(right).float().mean().item()

        history = fit(
            model,
            loss,
            lambda: training.batches(32, torch.randperm(len(training.lengths)).to(place)),
            accuracy,
            optimizer=torch.optim.AdamW(model.parameters(), lr=4e-3),
            epochs=epochs,
            patience=3,
            maximise=True,
            name="accuracy",
            checkpoint=checkpoint,
            resume=resume,
        )
        print(
            f"\naccuracy {history.best_metric:.3f}, by the letter alone {baseline:.3f} (spaces not counted)\n"
        )
        for line in (
            "def area(self, r=2.5): return pi * r**2  # of a circle",
            'print("def", name, file=out)',
        ):
            print(line, tagged(model, line, alphabet, place), sep="\n")
        print("  ".join(f"{sign} {name}" for sign, name in TAGS.items() if name != "space"))
    common.plot_learning(
        plot, "A tag for each letter of Python", {"BiLSTM" if bidirectional else "LSTM": history}, "accuracy",
        {"by the letter alone": baseline},
    )  # fmt: skip
    return history, baseline


def library() -> list[Path]:
    """The files of ``MODULES``."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*(folder / f"{name}.py" for name in MODULES), *(folder / n / "__init__.py" for n in MODULES)]
    return [file for file in files if file.exists()]


def tag(source: str) -> list[tuple[str, str]]:
    """Lines of Python and their tags, a sign for each letter.

    Lines that a token of several lines covers are left out: what they are cannot be seen on them.
    """
    lines = source.splitlines()
    signs = [[" "] * len(line) for line in lines]
    spanned: set[int] = set()
    before, name = "", None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, start), (last, end) = token.start, token.end
        kind = tokenize.tok_name[token.type]
        sign = "s" if "STRING" in kind else {"NUMBER": "0", "OP": "=", "COMMENT": "#"}.get(kind, "")
        if kind == "NAME":
            sign = "k" if keyword.iskeyword(token.string) else "d" if before in ("def", "class") else "n"
        if not sign:  # the end of a line, an indentation
            continue
        if first != last:
            spanned.update(range(first - 1, last))
            before, name = "", None
            continue
        if token.string == "(" and name:
            row, place = name
            signs[row][place] = "c" * (place.stop - place.start)
        signs[first - 1][start:end] = sign * (end - start)
        before, name = token.string, (first - 1, slice(start, end)) if sign == "n" else None
    found = zip(lines, map("".join, signs), strict=True)
    return [pair for i, pair in enumerate(found) if i not in spanned and 8 < len(pair[0]) <= LONGEST]


def split(files: list[Path], size: int, place: torch.device) -> tuple[Lines, Lines, str]:
    """Training and test data, four files to one, no line in both; and the letters known."""
    tested = {*torch.randperm(len(files))[: max(len(files) // 5, 1)].tolist()}
    pairs: tuple[dict[str, str], dict[str, str]] = {}, {}
    for i, file in enumerate(files):
        with tokenize.open(file) as opened:
            pairs[i in tested].update(tag(opened.read()))
    training = [*pairs[False].items()]
    test = [pair for pair in pairs[True].items() if pair[0] not in pairs[False]]
    if not training or not test:
        raise typer.BadParameter("too little Python: at least two files with some lines are needed")
    if size:
        training, test = _some(training, size * 4 // 5), _some(test, size // 5)
    alphabet = "".join(sorted({letter for line, _ in training for letter in line}))
    return _as_numbers(training, alphabet, place), _as_numbers(test, alphabet, place), alphabet


def by_letter_alone(training: Lines, test: Lines, alphabet: int) -> float:
    """Accuracy of the tag that each letter has most often, which is what can be known without a network."""
    seen = marked(training.tags)
    counts = torch.zeros(alphabet, len(SIGNS), device=training.tags.device)
    counts.index_put_(
        (training.letters[seen], training.tags[seen]), torch.ones(1, device=counts.device), True
    )
    seen = marked(test.tags)
    return (counts.argmax(1)[test.letters[seen]] == test.tags[seen]).float().mean().item()


def marked(tags: Tensor) -> Tensor:
    """Where there is a letter that is no space."""
    return (tags != OUTSIDE) & (tags != SIGNS.index(" "))


def tagged(model: Tagger, line: str, alphabet: str, place: torch.device) -> str:
    """The signs that a model puts under a line."""
    numbers = _as_numbers([(line, " " * len(line))], alphabet, place)
    with torch.no_grad():
        return "".join(SIGNS[i] for i in model(numbers.letters, numbers.lengths)[0].argmax(1).tolist())


def _some(pairs: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return [pairs[i] for i in torch.randperm(len(pairs))[:count].tolist()]


def _as_numbers(pairs: list[tuple[str, str]], alphabet: str, place: torch.device) -> Lines:
    number = {letter: i for i, letter in enumerate(alphabet, 1)}  # 0: a letter that training has not shown
    letters = [torch.tensor([number.get(letter, 0) for letter in line]) for line, _ in pairs]
    tags = [torch.tensor([SIGNS.index(sign) for sign in signs]) for _, signs in pairs]
    return Lines(
        pad_sequence(letters, batch_first=True).to(place),
        pad_sequence(tags, batch_first=True, padding_value=OUTSIDE).to(place),
        torch.tensor([len(line) for line, _ in pairs], device=place),
    )


app = common.application(main)

if __name__ == "__main__":
    app()
