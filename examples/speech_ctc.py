"""Speech recognition in small: letters out of sound, by a stack of bidirectional layers and the CTC loss.

The program speaks itself: each of eight letters is a pair of tones that glide, of random length, pitch,
speed and loudness, in noise, with or without a pause before the next. Nobody says where a letter begins: CTC
(Graves et al., 2006) sums over all alignments. Utterances have different lengths, and ``lengths=`` takes them
as they are. Judged by the letter error rate, beside that of naming each moment by the letter whose average
spectrum is nearest. ``--data FOLDER`` takes NAME.wav (16 bits, one channel, one rate) with NAME.txt instead.

    python -m examples.speech_ctc
"""

from __future__ import annotations

import math
import wave
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fusedrnn

from . import common
from .trainer import fit

RATE = 8000  # samples in a second
FRAME, HOP, BANDS = 256, 128, 40  # samples of a spectrum, samples from one to the next, bands of it
TONES = {  # of each letter two, in Hz, as they begin and as they end; some differ in direction only
    "a": (700, 700, 1200, 1200),
    "e": (400, 400, 2000, 2000),
    "i": (300, 300, 2600, 2600),
    "o": (450, 450, 900, 900),
    "u": (300, 300, 700, 700),
    "j": (300, 700, 2600, 1200),
    "w": (300, 700, 700, 1200),
    "y": (700, 300, 1200, 2600),
}
BLANK = 0  # of CTC; letters follow


class Utterance(NamedTuple):
    features: Tensor  # [T, BANDS]
    text: str


def speak(text: str, noise: float) -> Tensor:
    """Sound of a text, ``[samples]``."""
    pitch, speed = 0.9 + 0.2 * torch.rand(2)  # of this speaker
    parts = [torch.zeros(400)]
    for letter in text:
        size = int(RATE * speed * (0.06 + 0.08 * torch.rand(()).item()))
        along = torch.linspace(0, 1, size)
        low, low_end, high, high_end = (pitch * tone for tone in TONES[letter])
        phases = [
            ((a + (b - a) * along).cumsum(0) * (2 * math.pi / RATE))
            for a, b in ((low, low_end), (high, high_end))
        ]
        loudness = (0.5 + torch.rand(())) * (math.pi * along).sin().clamp_min(0).sqrt()
        parts.append(loudness * (phases[0].sin() + 0.7 * phases[1].sin()))
        if torch.rand(()) < 0.5:
            parts.append(torch.zeros(int(RATE * 0.05 * torch.rand(()).item())))
    sound = torch.cat([*parts, torch.zeros(400)])
    return sound + noise * torch.randn_like(sound)


def spectrum(sound: Tensor) -> Tensor:
    """Logarithm of the power in bands of equal width, ``[T, BANDS]``, without the mean of the utterance."""
    power = torch.stft(sound, FRAME, HOP, window=torch.hann_window(FRAME), return_complex=True).abs().square()
    bands = F.adaptive_avg_pool1d(power.t()[:, 1:], BANDS)  # [T, BANDS]
    logarithm = (bands + 1e-3).log()
    return (logarithm - logarithm.mean()) / 3


def synthesise(count: int, noise: float) -> list[Utterance]:
    letters = list(TONES)
    found = []
    for _ in range(count):
        picked = torch.randint(len(letters), (int(torch.randint(3, 9, ())),)).tolist()
        text = "".join(letters[i] for i in picked)
        found.append(Utterance(spectrum(speak(text, noise)), text))
    return found


def read(folder: Path) -> list[Utterance]:
    """Every NAME.wav with its NAME.txt."""
    found = []
    for path in sorted(folder.glob("*.wav")):
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise ValueError(f"{path}: one channel of 16 bits is needed")
            samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
        text = path.with_suffix(".txt").read_text("utf-8").strip()
        found.append(Utterance(spectrum(samples.float() / 2**12), text))
    if len(found) < 2:
        raise ValueError(f"{folder} has fewer than two utterances")
    return found


class Batch(NamedTuple):
    features: Tensor  # [T, B, BANDS]
    lengths: Tensor  # [B]
    targets: Tensor  # [B, letters], padded with BLANK
    target_lengths: Tensor  # [B]


class Recogniser(nn.Module):
    """Features ``[T, B, BANDS]`` and their lengths to log-probabilities ``[T, B, letters + 1]``."""

    def __init__(self, cell: str, hidden: int, layers: int, letters: int) -> None:
        super().__init__()
        kind = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU}[cell]
        self.rnn = kind(BANDS, hidden, layers, bidirectional=True, dropout=0.1 if layers > 1 else 0.0)
        self.output = nn.Linear(2 * hidden, letters + 1)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.rnn(features, lengths=lengths)
        return self.output(y).log_softmax(-1)


def collapse(path: Iterable[int], alphabet: str) -> str:
    """The text of a path of labels: repeats are one, blanks nothing."""
    labels = list(path)
    kept = [b for a, b in zip([BLANK, *labels], labels, strict=False) if b not in (a, BLANK)]
    return "".join(alphabet[label - 1] for label in kept)


def decode(log_probs: Tensor, lengths: Tensor, alphabet: str) -> list[str]:
    """Greedily: the likeliest label of each frame."""
    best = log_probs.argmax(-1).t().tolist()  # [B, T]
    return [collapse(path[:length], alphabet) for path, length in zip(best, lengths.tolist(), strict=True)]


def distance(a: str, b: str) -> int:
    """Letters to insert, remove or replace to get from one text to the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def error_rate(heard: Iterable[str], said: Iterable[str]) -> float:
    pairs = list(zip(heard, said, strict=True))
    return sum(distance(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)


def nearest_spectra(utterances: list[Utterance], noise: float) -> float:
    """Error rate without context: each frame is what has the nearest average, for three frames at least."""
    averages = [spectrum(0.1 * torch.randn(RATE) * noise).mean(0)]
    for letter in TONES:  # of utterances of one letter, the frames that are not pauses
        frames = torch.cat([spectrum(speak(letter * 4, noise)) for _ in range(10)])
        averages.append(frames[frames.mean(1) > frames.mean()].mean(0))
    centres = torch.stack(averages)
    heard = []
    for u in utterances:
        runs = groupby(torch.cdist(u.features, centres).argmin(1).tolist())
        heard.append(collapse([label for label, run in runs if len(list(run)) > 2], "".join(TONES)))
    return error_rate(heard, (u.text for u in utterances))


def main(
    epochs: common.Epochs = 10,
    cell: Annotated[Literal["lstm", "gru"], typer.Option(help="What the layers are.")] = "lstm",
    hidden: Annotated[int, typer.Option(help="Units of a direction of a layer.")] = 96,
    layers: Annotated[int, typer.Option(min=1, help="Bidirectional layers.")] = 2,
    utterances: Annotated[
        int, typer.Option(min=2, help="To synthesise, a fifth of them to be judged by.")
    ] = 600,
    noise: Annotated[float, typer.Option(help="Loudness of the noise; that of a letter is about 1.")] = 0.3,
    data: common.Data = None,
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    backend: common.Backend = "auto",
    device: common.Device = "",
    seed: common.Seed = 0,
    plot: common.Plot = common.PLOTS / "speech_ctc.png",
) -> tuple[float, float]:
    """Learn to write down what is said; returns the error rate and that of the baseline."""
    with common.prepared(backend, seed, device) as place:
        spoken = read(data) if data else synthesise(utterances, noise)
        print(f"data: {data or 'sound that is synthesised'}, {len(spoken)} utterances")
        order = torch.randperm(len(spoken)).tolist()
        held_out, known = (
            [spoken[i] for i in part] for part in (order[: -(-len(order) // 5)], order[-(-len(order) // 5) :])
        )
        alphabet = "".join(sorted({letter for u in known for letter in u.text}))

        def batch(some: list[Utterance]) -> Batch:
            targets = [torch.tensor([alphabet.find(c) + 1 for c in u.text]) for u in some]
            return Batch(
                pad_sequence([u.features for u in some]).to(place),
                torch.tensor([len(u.features) for u in some]),
                pad_sequence(targets, batch_first=True).to(place),
                torch.tensor([len(t) for t in targets]),
            )

        def batches() -> list[Batch]:
            return [batch([known[i] for i in some.tolist()]) for some in torch.randperm(len(known)).split(8)]

        def loss(b: Batch) -> Tensor:
            return F.ctc_loss(
                model(b.features, b.lengths), b.targets, b.lengths, b.target_lengths, zero_infinity=True
            )

        def listen() -> list[str]:
            b = batch(held_out)
            return decode(model(b.features, b.lengths), b.lengths, alphabet)

        model = Recogniser(cell, hidden, layers, len(alphabet)).to(place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        said = [u.text for u in held_out]
        baselines = {"silence": 1.0} if data else {"nearest spectra": nearest_spectra(held_out, noise)}
        history = fit(
            model,
            loss,
            batches,
            lambda: error_rate(listen(), said),
            optimizer=optimizer,
            epochs=epochs,
            patience=10,  # of CTC: it is silent at first
            name="letter error rate",
            checkpoint=checkpoint,
            resume=resume,
        )
        with torch.no_grad():
            for text, heard in list(zip(said, listen(), strict=True))[:5]:
                print(f"said {text:10} heard {heard}")
    name, level = next(iter(baselines.items()))
    print(f"letter error rate {history.best_metric:.3f}; {name} {level:.3f}")
    common.plot_learning(plot, f"{len(known)} utterances", {cell: history}, "letter error rate", baselines)
    return history.best_metric, level


if __name__ == "__main__":
    common.application(main)()
