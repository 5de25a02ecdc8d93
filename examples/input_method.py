"""Next-word suggestions for Chinese, as an input method gives them: process, train, evaluate, predict.

    python -m examples.input_method process            # words, vocabulary, windows; --data TEXT for your own
    python -m examples.input_method train
    python -m examples.input_method evaluate           # top-1 and top-5 beside counting words
    python -m examples.input_method predict 昨天我们在饭馆

``process`` cuts sentences into words (jieba), keeps the frequent ones as vocabulary, the rest being
``<unk>``, and slides a window over each sentence: some words and the one that follows, a line of JSON each,
80 % of the sentences to train and 20 % to test. The sentences are written by a small grammar in this file;
which word fits may depend on one far before it (the day, the place), which pairs of words cannot show.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jieba
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fusedrnn

from . import common
from .trainer import History, fit, save_atomically

UNKNOWN = "<unk>"
WORK = common.PLOTS / "input_method"
Folder = Annotated[Path, typer.Option(help="Where the processed data and the model are.")]

PEOPLE = ("我", "我们", "他", "她", "妈妈", "爸爸", "老师", "同学")
COMPANIONS = ("朋友", "同事", "家人", "弟弟")
# The day decides what stands before and behind the verb, and the verb what it is done to and how it was.
DAYS = {
    "昨天": ("", "了"),
    "上周": ("", "了"),
    "明天": ("打算", ""),
    "下周": ("准备", ""),
    "每天": ("都", ""),
}
PLACES = {
    "饭馆": "吃",
    "家里": "吃",
    "咖啡馆": "喝",
    "茶馆": "喝",
    "电影院": "看",
    "图书馆": "看",
    "商店": "买",
}
OBJECTS = {
    "吃": ("面条", "饺子", "米饭", "火锅"),
    "喝": ("咖啡", "牛奶", "果汁", "红茶"),
    "看": ("电影", "小说", "比赛", "新闻"),
    "买": ("衣服", "手机", "鞋子", "礼物"),
}
VERDICTS = {"吃": "好吃", "喝": "好喝", "看": "好看", "买": "便宜"}

app = typer.Typer(
    help="Next-word suggestions for Chinese: process, train, evaluate, predict, in this order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


class Suggester(nn.Module):
    """Scores of the next word from the state behind the last one."""

    def __init__(self, words: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 64)
        self.rnn = fusedrnn.LSTM(64, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, words)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Scores ``[B, words]`` from windows ``[B, T]``, of which ``lengths [B]`` words are there."""
        _, (h, _) = self.rnn(self.embedding(words), lengths=lengths)
        return self.readout(h[0])


@dataclass
class Windows:
    """``words [N, T]``, padded, ``lengths [N]`` and the word that follows, ``following [N]``; all int64."""

    words: Tensor
    lengths: Tensor
    following: Tensor


@app.command()
def process(
    data: common.Data = None,
    folder: Folder = WORK,
    sentences: Annotated[int, typer.Option(min=5, help="How many, where the grammar writes them.")] = 2000,
    window: Annotated[
        int, typer.Option(min=1, help="At most so many words before the one that follows.")
    ] = 8,
    least: Annotated[int, typer.Option(min=1, help="How often a word must occur to be known.")] = 2,
    seed: common.Seed = 0,
) -> tuple[int, int, int]:
    """Cut text into words, choose the vocabulary, and write windows to learn from as JSON lines."""
    torch.manual_seed(seed)
    jieba.setLogLevel(logging.WARNING)
    if data:
        text = re.split(r"(?<=[。！？])|\n", data.read_text(encoding="utf-8"))
        print(f"data: {data}")
    else:
        text = [write_sentence() for _ in range(sentences)]
        print("data: Chinese sentences written by a small grammar, made for this recipe")
    cut = [words for line in text if len(words := as_words(line)) > 1]
    if len(cut) < 5:
        raise typer.BadParameter("five sentences of two words or more are needed")
    order = torch.randperm(len(cut)).tolist()
    tested = {*order[: len(cut) // 5]}
    counts = Counter(word for i, words in enumerate(cut) if i not in tested for word in words)
    known = [UNKNOWN, *(word for word, count in counts.most_common() if count >= least)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocabulary.json").write_text(json.dumps(known, ensure_ascii=False) + "\n", encoding="utf-8")
    written = []
    for name, test in (("train", False), ("test", True)):
        rows = [
            {"words": words[max(end - window, 0) : end], "next": words[end]}
            for i, words in enumerate(cut)
            if (i in tested) == test
            for end in range(1, len(words))
        ]
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        written.append(len(rows))
    print(f"{len(cut)} sentences, {len(known)} words")
    print(f"{written[0]} windows to train, {written[1]} to test: {folder}")
    return len(known), written[0], written[1]


@app.command()
def train(
    folder: Folder = WORK,
    hidden: Annotated[int, typer.Option(min=1, help="Units of the layer.")] = 96,
    epochs: common.Epochs = 5,
    backend: common.Backend = "auto",
    seed: common.Seed = 0,
    device: common.Device = "",
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    plot: common.Plot = common.PLOTS / "input_method.png",
) -> History:
    """Train the suggester on the windows that process wrote."""
    known, rows = load(folder, "train")
    tested = load(folder, "test")[1]
    print(f"data: {folder}; {len(rows)} windows to train, {len(tested)} to test")
    with common.prepared(backend, seed, device) as place:
        training, test = (as_numbers(r, known, place) for r in (rows, tested))
        model = Suggester(len(known), hidden).to(place)
        history = fit(
            model,
            lambda batch: F.cross_entropy(model(batch[0], batch[1]), batch[2]),
            lambda: common.shuffled(128, training.words, training.lengths, training.following),
            lambda: share_within(model(test.words, test.lengths), test.following, 1),
            optimizer=torch.optim.AdamW(model.parameters(), lr=4e-3),
            epochs=epochs,
            patience=2,
            maximise=True,
            name="top-1",
            checkpoint=checkpoint,
            resume=resume,
        )
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        save_atomically({"hidden": hidden, "words": known, "weights": weights}, folder / "model.pt")
    baseline = {"after the same word": counted(rows, tested)["after the same word"][0]}
    common.plot_learning(plot, "Next word, held-out sentences", {"LSTM": history}, "top-1", baseline)
    return history


@app.command()
def evaluate(
    folder: Folder = WORK, backend: common.Backend = "auto", device: common.Device = ""
) -> dict[str, tuple[float, float]]:
    """How often the word that follows is the first suggestion, and among the first five."""
    rows, tested = (load(folder, name)[1] for name in ("train", "test"))
    print(f"data: {folder}; {len(tested)} windows of held-out sentences")
    with common.prepared(backend, 0, device) as place, torch.no_grad():
        model, known = load_model(folder, place)
        test = as_numbers(tested, known, place)
        scores = model(test.words, test.lengths)
        scores[:, 0] = -torch.inf  # <unk> is no suggestion; where it follows, all are wrong
        results = {"LSTM": (share_within(scores, test.following, 1), share_within(scores, test.following, 5))}
    results |= counted(rows, tested)
    for name, (first, five) in results.items():
        print(f"{name:24}top-1 {first:.3f}   top-5 {five:.3f}")
    return results


@app.command()
def predict(
    text: Annotated[str, typer.Argument(help="What has been typed; without it, lines are asked for.")] = "",
    folder: Folder = WORK,
    top: Annotated[int, typer.Option(min=1, help="How many suggestions.")] = 5,
    backend: common.Backend = "auto",
    device: common.Device = "",
) -> None:
    """Suggest the next word, with probabilities; without TEXT until an empty line is typed."""
    jieba.setLogLevel(logging.WARNING)
    with common.prepared(backend, 0, device) as place:
        model, known = load_model(folder, place)
        if text:
            show(suggest(model, known, text, top, place))
            return
        while typed := _typed():
            show(suggest(model, known, typed, top, place))


def suggest(
    model: Suggester, known: list[str], text: str, top: int, place: torch.device
) -> list[tuple[str, float]]:
    """The most probable next words and their probabilities; all known words share 1."""
    words = as_words(text)
    if not words:
        raise typer.BadParameter("there is no word in this text")
    typed = as_numbers([{"words": words, "next": UNKNOWN}], known, place)
    with torch.no_grad():
        scores = model(typed.words, typed.lengths)[0, 1:]  # without <unk>
    shares, places = scores.softmax(0).topk(min(top, len(scores)))
    return [(known[1 + i], share) for i, share in zip(places.tolist(), shares.tolist(), strict=True)]


def show(suggestions: Iterable[tuple[str, float]]) -> None:
    print("   ".join(f"{i} {word} {share:.1%}" for i, (word, share) in enumerate(suggestions, 1)))


def _typed() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def as_words(line: str) -> list[str]:
    return [word for word in jieba.lcut(line) if word.strip()]


def write_sentence() -> str:
    """A sentence of the grammar, drawn from torch's generator."""

    def one(choices: Iterable[str]) -> str:
        options = [*choices]
        return options[int(torch.randint(len(options), ()))]

    day, place = one(DAYS), one(PLACES)
    before, behind = DAYS[day]
    verb = PLACES[place]
    company = f"和{one(COMPANIONS)}一起" if torch.rand(()) < 0.5 else ""
    start = one([f"{day}{one(PEOPLE)}", f"{one(PEOPLE)}{day}"])
    end = f"，{one(('真', '非常', '特别'))}{VERDICTS[verb]}" if behind else ""
    return f"{start}{before}{company}在{place}{verb}{behind}{one(OBJECTS[verb])}{end}。"


def load(folder: Path, name: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The vocabulary and the windows that ``process`` wrote."""
    if not (folder / f"{name}.jsonl").exists():
        raise typer.BadParameter(f"{folder} has no {name}.jsonl; run process first")
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")), [*map(json.loads, lines)]


def load_model(folder: Path, place: torch.device) -> tuple[Suggester, list[str]]:
    if not (folder / "model.pt").exists():
        raise typer.BadParameter(f"{folder} has no model.pt; run train first")
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = Suggester(len(saved["words"]), saved["hidden"])
    model.load_state_dict(saved["weights"])
    return model.to(place).eval(), saved["words"]


def as_numbers(rows: list[dict[str, Any]], known: list[str], place: torch.device) -> Windows:
    number = {word: i for i, word in enumerate(known)}  # <unk> is 0
    words = [torch.tensor([number.get(word, 0) for word in row["words"]]) for row in rows]
    return Windows(
        pad_sequence(words, batch_first=True).to(place),
        torch.tensor([len(row["words"]) for row in rows], device=place),
        torch.tensor([number.get(row["next"], 0) for row in rows], device=place),
    )


def share_within(scores: Tensor, following: Tensor, first: int) -> float:
    """How often the right one is among the first suggestions."""
    found = scores.topk(min(first, scores.size(1))).indices == following.unsqueeze(1)
    return found.any(1).float().mean().item()


def counted(rows: list[dict[str, Any]], tested: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Top-1 and top-5 without a network: the commonest words, and those commonest after the last one."""
    alone = Counter(row["next"] for row in rows)
    pairs: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        pairs[row["words"][-1]][row["next"]] += 1
    common_words = [word for word, _ in alone.most_common(5)]
    found = {"the commonest words": [0, 0], "after the same word": [0, 0]}
    for row in tested:
        after = [word for word, _ in pairs[row["words"][-1]].most_common(5)] or common_words
        for name, offered in zip(found, (common_words, after), strict=True):
            found[name][0] += row["next"] == offered[0]
            found[name][1] += row["next"] in offered
    return {name: (first / len(tested), five / len(tested)) for name, (first, five) in found.items()}


if __name__ == "__main__":
    app()
