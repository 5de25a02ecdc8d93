"""Many to one: which language a name is in, read letter by letter by a bidirectional LSTM or GRU.

The data are real: what the Unicode CLDR, as Babel carries it, calls territories, languages, scripts and
currencies in twelve languages that share an alphabet. A thing is either in the training or in the test data
with all its names, and a name that several languages share is left out. ``--data`` takes lines of a label, a
tab and a text instead.

With ``--distil`` a large network (the teacher) is trained first, and then a small one twice: on the labels
alone, and on what the teacher thinks of all labels besides (Hinton et al., 2015; for a BiLSTM, Tang et al.,
2019). Accuracy and speed of each are printed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from babel import Locale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fusedrnn

from . import common
from .trainer import History, fit

LANGUAGES = ("cs", "de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "sv", "tr")
KINDS = ("territories", "languages", "scripts", "currencies")
LAYERS = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU}


@dataclass
class Texts:
    """Texts as letters ``[N, longest]``, padded with zeros, ``lengths [N]`` and ``labels [N]``, all int64."""

    letters: Tensor
    lengths: Tensor
    labels: Tensor

    def batches(self, size: int, order: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Rows in this order, each batch only as wide as its longest text; last come their places."""
        return [
            (self.letters[rows, : self.lengths[rows].max()], self.lengths[rows], self.labels[rows], rows)
            for rows in order.split(size)
        ]


class Classifier(nn.Module):
    """The last states of both directions, each of which has read the whole text, and a readout of them."""

    def __init__(
        self, cell: str, alphabet: int, labels: int, hidden: int, layers: int = 1, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 32)
        self.rnn = LAYERS[cell](
            32, hidden, layers, batch_first=True, bidirectional=bidirectional, dropout=0.2 * (layers > 1)
        )
        self.readout = nn.Linear(hidden * (1 + bidirectional), labels)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Scores ``[B, labels]``."""
        _, state = self.rnn(self.embedding(letters), lengths=lengths)
        h = state[0] if isinstance(state, tuple) else state  # [layers * directions, B, H]
        return self.readout(torch.cat([*h[-2 if self.rnn.bidirectional else -1 :]], 1))


@dataclass
class Result:
    """A trained network: its accuracy on the test data, its size, and texts a second."""

    history: History
    accuracy: float
    parameters: int
    speed: float


def main(
    cell: Annotated[Literal["lstm", "gru"], typer.Option(help="Which layer.")] = "lstm",
    hidden: Annotated[
        int, typer.Option(min=1, help="Units of each direction; with --distil the teacher's.")
    ] = 64,
    bidirectional: Annotated[bool, typer.Option(help="Whether to read backwards as well.")] = True,
    distil: Annotated[
        bool, typer.Option("--distil", help="Train a small student with the soft labels.")
    ] = False,
    student_hidden: Annotated[int, typer.Option(min=1, help="Units of each direction of the student.")] = 12,
    temperature: Annotated[float, typer.Option(min=1.0, help="How soft the teacher's labels are.")] = 2.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Products in bfloat16, by autocast.")] = False,
    size: Annotated[int, typer.Option(min=0, help="At most so many texts; 0 for all.")] = 6000,
    epochs: common.Epochs = 6,
    data: common.Data = None,
    backend: common.Backend = "auto",
    seed: common.Seed = 0,
    device: common.Device = "",
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    plot: common.Plot = common.PLOTS / "text_classification.png",
) -> dict[str, Result]:
    """Tell which language a name is in."""
    with common.prepared(backend, seed, device) as place:
        rows, groups = read(data) if data else cldr_names()
        training, test, alphabet, names = split(rows, groups, size, place)
        where = str(data) if data else "names in the Unicode CLDR, which Babel carries"
        sizes = f"{len(training.labels)} to train, {len(test.labels)} held out, {len(names)} labels"
        print(f"data: {where}; {sizes}")
        baseline = test.labels.bincount().max().item() / len(test.labels)
        results: dict[str, Result] = {}

        def learn(name: str, model: Classifier, teacher: Tensor | None = None) -> Classifier:
            print(f"\n{name}")
            model.to(place)

            def scores(letters: Tensor, lengths: Tensor) -> Tensor:
                with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
                    return model(letters, lengths)

            def loss(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
                letters, lengths, labels, rows = batch
                given = scores(letters, lengths).float()
                hard = F.cross_entropy(given, labels)
                if teacher is None:
                    return hard
                wanted = (teacher[rows] / temperature).softmax(1)
                soft = F.kl_div((given / temperature).log_softmax(1), wanted, reduction="batchmean")
                return 0.2 * hard + 0.8 * temperature**2 * soft

            def accuracy() -> float:
                places = torch.arange(len(test.labels), device=place)
                right = [scores(x, n).argmax(1) == y for x, n, y, _ in test.batches(512, places)]
                return torch.cat(right).float().mean().item()

            history = fit(
                model,
                loss,
                lambda: training.batches(64, torch.randperm(len(training.labels)).to(place)),
                accuracy,
                optimizer=torch.optim.AdamW(model.parameters(), lr=4e-3),
                epochs=epochs,
                patience=3,
                maximise=True,
                name="accuracy",
                checkpoint=common.part_of(checkpoint, name.replace(" ", "-")),
                resume=resume,
            )
            parameters = sum(p.numel() for p in model.parameters())
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                with torch.no_grad():
                    accuracy()  # which waits for the device
                seconds.append(time.perf_counter() - start)
            speed = len(test.labels) / min(seconds)
            results[name] = Result(history, history.best_metric, parameters, speed)
            return model

        shape = (len(alphabet) + 1, len(names))
        if not distil:
            learn("classifier", Classifier(cell, *shape, hidden, bidirectional=bidirectional))
        else:
            teacher = learn(
                "teacher", Classifier(cell, *shape, hidden, layers=2, bidirectional=bidirectional)
            )
            with torch.no_grad():
                places = torch.arange(len(training.labels), device=place)
                soft = torch.cat([teacher(x, n) for x, n, _, _ in training.batches(512, places)])
            for name, labels in (("student alone", None), ("student of teacher", soft)):
                torch.manual_seed(seed)  # the same start and the same batches for both
                learn(name, Classifier("lstm", *shape, student_hidden), labels)
        print()
        for name, result in results.items():
            print(
                f"{name:20}accuracy {result.accuracy:.3f}  {result.parameters:8,} parameters"
                f"  {result.speed:9,.0f} texts/s"
            )
        print(f"{'most frequent label':20}accuracy {baseline:.3f}")
    histories = {name: result.history for name, result in results.items()}
    title = "Which language a name is in" if not data else str(data)
    common.plot_learning(plot, title, histories, "accuracy", {"most frequent label": baseline})
    return results


def cldr_names() -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of language and name, and for each pair what it names."""
    found: dict[str, set[tuple[str, str]]] = {}
    for language in LANGUAGES:
        locale = Locale(language)
        for kind in KINDS:
            for code, name in getattr(locale, kind).items():
                found.setdefault(name, set()).add((language, f"{kind} {code}"))
    alone = [(name, next(iter(of))) for name, of in sorted(found.items()) if len(of) == 1]
    return [(language, name) for name, (language, _) in alone], [thing for _, (_, thing) in alone]


def read(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of label and text from the lines of a file; each is a group of its own."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        label, _, text = line.partition("\t")
        if line and not text:
            raise typer.BadParameter(f"line {i} of {path} is not a label, a tab and a text")
        if text:
            rows.append((label, text))
    return rows, [str(i) for i in range(len(rows))]


def split(
    rows: list[tuple[str, str]], groups: list[str], size: int, place: torch.device
) -> tuple[Texts, Texts, list[str], list[str]]:
    """Training and test data, four groups to one; the letters known; the labels."""
    if size:
        chosen = torch.randperm(len(rows))[:size].tolist()
        rows, groups = [rows[i] for i in chosen], [groups[i] for i in chosen]
    names = sorted({label for label, _ in rows})
    order = sorted(set(groups))
    tested = {order[i] for i in torch.randperm(len(order))[: max(len(order) // 5, 1)].tolist()}
    alphabet = sorted({c for (_, text), g in zip(rows, groups, strict=True) for c in text if g not in tested})
    number = {c: i for i, c in enumerate(alphabet, 1)}  # 0: a letter that training has not shown

    def texts(which: bool) -> Texts:
        kept = [row for row, group in zip(rows, groups, strict=True) if (group in tested) == which]
        letters = [torch.tensor([number.get(c, 0) for c in text]) for _, text in kept]
        lengths = torch.tensor([len(text) for _, text in kept])
        labels = torch.tensor([names.index(label) for label, _ in kept])
        return Texts(pad_sequence(letters, batch_first=True).to(place), lengths.to(place), labels.to(place))

    return texts(False), texts(True), alphabet, names


app = common.application(main)

if __name__ == "__main__":
    app()
