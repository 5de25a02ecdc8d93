"""The recipes learn: each in a small form, against the baseline it names."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples import input_method, seq2seq, sequence_transform, tagging, text_classification, time_series
from examples.trainer import History, fit, save_atomically

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plot(tmp_path):
    """A path for a plot, which must be one when the test ends."""
    path = tmp_path / "plots" / "plot.png"
    yield path
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def alike(history: History, other: History) -> None:
    """Losses of fp32 runs whose sums are in another order: some dozen steps spread 1e-7 to less than 1e-3."""
    assert history.loss == pytest.approx(other.loss, rel=1e-3)


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


def test_sequence_transform_without_the_kernels_is_the_same(plot):
    runs = [sequence_transform.main(epochs=3, backend=backend, plot=plot) for backend in ("cpu", "torch")]
    for name, (history, _) in runs[0].items():
        alike(history, runs[1][name][0])


def test_several_models_of_a_recipe_have_a_checkpoint_each(tmp_path, plot):
    whole = sequence_transform.main(epochs=4, plot=plot)
    sequence_transform.main(epochs=2, checkpoint=tmp_path / "run.pt", plot=plot)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["run-CellLoop.pt", "run-EmbeddedLayer.pt", "run-Layer.pt"]
    assert sequence_transform.main(epochs=4, checkpoint=tmp_path / "run.pt", resume=True, plot=plot) == whole


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


@pytest.mark.parametrize(
    "module", [input_method, seq2seq, sequence_transform, tagging, text_classification, time_series]
)
def test_help_says_what_the_options_do(module):
    command = ["train"] * (module is input_method)
    said = CliRunner().invoke(module.app, [*command, "--help"])
    assert said.exit_code == 0
    for option in ("--backend", "--seed", "--epochs", "--checkpoint", "--resume", "--plot", "--device"):
        assert option in said.output


def test_resume_needs_a_checkpoint():
    refused = CliRunner().invoke(sequence_transform.app, ["--resume", "--epochs", "1"])
    assert refused.exit_code == 2
    assert "needs a --checkpoint" in refused.output


# text_classification

NAMES = {"size": 2000, "hidden": 24}


def test_text_classification(plot, capsys):
    (result,) = text_classification.main(**NAMES, epochs=3, cell="gru", plot=plot).values()
    said = capsys.readouterr().out
    assert said.startswith("data: names in the Unicode CLDR, which Babel carries; ")
    baseline = float(re.search(r"most frequent label +accuracy ([.0-9]+)", said)[1])
    assert baseline < 0.2  # of twelve languages
    assert result.accuracy > 2 * baseline
    assert result.speed > 0


def test_text_classification_without_the_kernels_is_the_same(plot):
    runs = [
        text_classification.main(**NAMES | {"size": 400}, epochs=1, backend=backend, plot=plot)["classifier"]
        for backend in ("cpu", "torch")
    ]
    alike(runs[0].history, runs[1].history)
    mixed = text_classification.main(**NAMES | {"size": 400}, epochs=1, bf16=True, plot=plot)["classifier"]
    assert mixed.history.loss != runs[0].history.loss
    # Products of bfloat16, of 8 bits, move a loss of some steps by less than a few of its roundings.
    assert mixed.history.loss == pytest.approx(runs[0].history.loss, rel=4 * 2**-8)


def test_a_student_learns_from_a_teacher(plot):
    options = {"size": 1000, "hidden": 24, "student_hidden": 12, "distil": True, "plot": plot}
    teacher, alone, student = text_classification.main(**options, epochs=3).values()
    assert student.parameters == alone.parameters < teacher.parameters / 2
    # The same start and batches, another loss: that of the soft labels.
    assert student.history.loss != alone.history.loss
    assert student.accuracy > 0.2  # the most frequent label has less, as above
    assert student.history.metric[-1] > student.history.metric[0]


def test_text_classification_of_ones_own(tmp_path, plot, capsys):
    path = tmp_path / "texts.tsv"
    path.write_text(
        "".join(f"{'even' if i % 2 else 'odd'}\t{'ab'[i % 2] * (1 + i % 7)}\n" for i in range(200))
    )
    (result,) = text_classification.main(data=path, hidden=8, epochs=3, plot=plot).values()
    assert capsys.readouterr().out.startswith(f"data: {path}; 160 to train, 40 held out, 2 labels")
    assert result.accuracy == 1
    path.write_text("no tab\n")
    refused = CliRunner().invoke(text_classification.app, ["--data", str(path)])
    assert (refused.exit_code, "line 1" in refused.output) == (2, True)


# tagging


def test_python_is_tagged_by_its_own_tokenizer():
    source = (
        'def f(x):  # go\n    return g(x, "a") + 1.5\ntext = """of\ntwo lines"""\nclass A(B): y = not x\n'
    )
    assert tagging.tag(source) == [
        ("def f(x):  # go", "kkk d=n==  ####"),
        ('    return g(x, "a") + 1.5', "    kkkkkk c=n= sss= = 000"),
        ("class A(B): y = not x", "kkkkk d=n== n = kkk n"),
    ]


@pytest.fixture
def few_modules(monkeypatch):
    monkeypatch.setattr(tagging, "MODULES", ("csv", "heapq", "random", "statistics", "textwrap"))


def test_tagging(few_modules, plot, capsys):
    history, baseline = tagging.main(size=900, hidden=32, epochs=3, plot=plot)
    assert history.best_metric > baseline + 0.2
    said = capsys.readouterr().out
    assert said.startswith("data: lines of Python's own library, labelled by tokenize; ")
    line = "def area(self, r=2.5): return pi * r**2  # of a circle"
    signs = re.search(re.escape(line) + r"\n(.+)\n", said)[1]
    assert len(signs) == len(line)
    assert set(signs) <= set(tagging.SIGNS)


def test_tagging_without_the_kernels_is_the_same(few_modules, plot):
    runs = [
        tagging.main(size=100, hidden=8, epochs=1, backend=backend, plot=plot) for backend in ("cpu", "torch")
    ]
    alike(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


# time_series


def test_time_series(plot, capsys):
    result = time_series.main(epochs=15, plot=plot)
    assert capsys.readouterr().out.startswith(
        "data: CO2 above Mauna Loa, monthly, ppm (statsmodels); 526 values"
    )
    assert result.errors["GRU"] < 0.8 * result.errors["seasonal naive"] < 0.8 * result.errors["naive"]


def test_a_resumed_run_is_the_run_itself(tmp_path, plot):
    options = {"hidden": 8, "plot": plot}
    whole = time_series.main(**options, epochs=5)
    path = tmp_path / "run.pt"
    time_series.main(**options, epochs=2, checkpoint=path)
    saved = path.read_bytes()
    resumed = time_series.main(**options, epochs=5, checkpoint=path, resume=True)
    assert resumed == whole  # every loss, validation error and test error, to the last bit
    assert path.read_bytes() != saved


def test_time_series_without_the_kernels_is_the_same(plot):
    for cell in ("gru", "lstm"):
        runs = [time_series.main(cell=cell, epochs=1, backend=b, plot=plot) for b in ("cpu", "torch")]
        alike(runs[0].history, runs[1].history)


def test_forecasts_that_need_no_learning():
    windows, truth = time_series.slide(torch.arange(10.0), 4, 3)
    assert windows.tolist() == [[i, i + 1, i + 2, i + 3] for i in range(4)]
    assert truth.tolist() == [[i + 4, i + 5, i + 6] for i in range(4)]
    assert time_series.seasonal_naive(windows, 3, 2).tolist() == [[i + 2, i + 3, i + 2] for i in range(4)]


def test_a_series_of_ones_own(tmp_path, plot):
    path = tmp_path / "series.csv"
    path.write_text("day,value\n" + "".join(f"{i},{[0, 1, 5, 2][i % 4]}\n" for i in range(120)))
    options = {"data": path, "season": 4, "window": 8, "horizon": 4, "hidden": 8, "plot": plot}
    errors = time_series.main(**options, epochs=15, cell="lstm").errors
    assert errors["seasonal naive"] == 0
    assert errors["LSTM"] < errors["naive"]
    path.write_text("1\n2\n")
    refused = CliRunner().invoke(time_series.app, ["--data", str(path)])
    assert (refused.exit_code, "too few" in refused.output) == (2, True)


# seq2seq


@pytest.fixture
def reversed_words(tmp_path):
    """All words of three of eight letters, and each read backwards."""
    path = tmp_path / "words.tsv"
    words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
    path.write_text("".join(f"{word}\t{word[::-1]}\n" for word in words))
    return path


def test_seq2seq(reversed_words, plot, capsys):
    result = seq2seq.main(data=reversed_words, hidden=32, epochs=50, plot=plot)
    assert capsys.readouterr().out.startswith(f"data: {reversed_words}; 410 to train, 51 to test")
    assert result.baseline < 0.05  # one target as good as another
    assert min(result.greedy, result.beam) > 0.5


def test_seq2seq_without_the_kernels_is_the_same(plot, capsys):
    runs = [seq2seq.main(size=300, hidden=16, epochs=1, backend=b, plot=plot) for b in ("cpu", "torch")]
    alike(runs[0].history, runs[1].history)
    said = capsys.readouterr().out
    assert said.startswith("data: dates written by Babel in en, de, fr, es; 240 to train, 30 to test")
    assert 0.05 < runs[0].baseline < 0.6  # a quarter of the dates is in English


def test_a_wide_beam_finds_the_most_probable_target():
    symbols, longest = 4, 3
    torch.manual_seed(3)
    model = seq2seq.Seq2Seq(6, symbols, 4)
    model.readout.weight.data *= 8  # far from uniform
    sources, lengths = torch.randint(2, 6, (5, 4)), torch.tensor([4, 1, 3, 2, 4])
    wanted, greedy = [], []
    ends = [t for t in itertools.product(range(symbols), repeat=longest) if is_target(t)]
    for row in range(5):
        source, length = (
            sources[row : row + 1].expand(len(ends), -1),
            lengths[row : row + 1].expand(len(ends)),
        )
        targets = torch.tensor(ends)
        logs = (
            model(source, length, targets, forced=True).log_softmax(2).gather(2, targets[..., None])[..., 0]
        )
        after = (targets == seq2seq.END).cumsum(1) - (targets == seq2seq.END).int()  # ENDs before this place
        wanted.append(ends[int((logs * (after == 0)).sum(1).argmax())])
        free = model(sources[row : row + 1], lengths[row : row + 1], targets[:1], forced=False).argmax(2)[0]
        greedy.append(until_end(free.tolist()))
    found = model.decode(sources, lengths, longest, beam=symbols**longest)
    assert [until_end(t) for t in found.tolist()] == [until_end(t) for t in wanted]
    assert [until_end(t) for t in model.decode(sources, lengths, longest).tolist()] == greedy
    assert [until_end(t) for t in wanted] != greedy  # else a beam would not have been needed


def is_target(symbols: tuple[int, ...]) -> bool:
    """Whether behind the first END there is nothing but END."""
    first = symbols.index(seq2seq.END) if seq2seq.END in symbols else len(symbols)
    return all(symbol == seq2seq.END for symbol in symbols[first:])


def until_end(symbols) -> list[int]:
    return [*itertools.takewhile(lambda symbol: symbol != seq2seq.END, symbols)]


# input_method


def test_input_method(tmp_path, plot, capsys):
    folder = tmp_path / "work"
    known, training, _ = input_method.process(folder=folder, sentences=600, window=6)
    said = capsys.readouterr().out
    assert said.startswith("data: Chinese sentences written by a small grammar")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    assert (len(vocabulary), len(rows)) == (known, training)
    assert vocabulary[0] == "<unk>"
    assert max(len(row["words"]) for row in rows) == 6
    before, after = rows[0], rows[1]  # the window slides: what followed is in the next one
    assert after["words"] == [*before["words"], before["next"]]
    input_method.train(folder=folder, hidden=48, epochs=4, plot=plot)
    network, commonest, pairs = input_method.evaluate(folder=folder).values()
    assert network[0] > pairs[0] + 0.05
    assert network[0] > 2 * commonest[0]
    assert network[1] > network[0]
    model, words = input_method.load_model(folder, torch.device("cpu"))
    offered = dict(input_method.suggest(model, words, "昨天我们在饭馆吃", 10**6, torch.device("cpu")))
    assert max(offered, key=offered.__getitem__) == "了"  # it was yesterday
    assert sum(offered.values()) == pytest.approx(1, abs=1e-5)  # a softmax in fp32 of some dozen words
    assert "<unk>" not in offered
    run = CliRunner().invoke(input_method.app, ["predict", "昨天我", "--top", "3", "--folder", str(folder)])
    assert re.fullmatch(r"1 \S+ [.0-9]+%   2 \S+ [.0-9]+%   3 \S+ [.0-9]+%\n", run.output)
    typed = CliRunner().invoke(input_method.app, ["predict", "--folder", str(folder)], input="明天\n她在\n\n")
    assert typed.output.count("1 ") == typed.output.count("5 ") == 2


def test_input_method_without_the_kernels_is_the_same(tmp_path, plot):
    text = tmp_path / "text.txt"
    text.write_text("我喜欢喝茶。他不喜欢喝茶！\n今天天气很好\n" * 30, encoding="utf-8")
    input_method.process(data=text, folder=tmp_path)
    runs = [input_method.train(folder=tmp_path, epochs=2, backend=b, plot=plot) for b in ("cpu", "torch")]
    alike(*runs)
    missing = CliRunner().invoke(input_method.app, ["evaluate", "--folder", str(tmp_path / "none")])
    assert (missing.exit_code, "run process first" in missing.output) == (2, True)
