"""Trains one character language model with torch.nn.LSTM and with fusedrnn.LSTM, and compares the curves."""

from __future__ import annotations

import copy
import math
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

import fusedrnn
from fusedrnn.bench import timing

BATCH = 32  # B: parallel places in the text
WINDOW = 64  # T: characters per step; the state is carried from window to window, gradients are not
EMBEDDING = 64
HIDDEN = 128
LAYERS = 2
STEPS = 600
QUICK_STEPS = 150  # as many as it takes to be clearly below the unigram entropy: the budget cuts no shorter

# Rounding makes two correct fp32 runs differ, and training amplifies the difference. How fast was measured
# with torch.nn.LSTM against itself, with initial weights changed by a unit in the last place, with one thread
# and two, and in fp64. Two choices keep it small enough to tell rounding from a wrong gradient:
# - SGD, whose step is linear in the gradient. Adam divides by the gradient's own size and so makes a full
#   step out of a gradient that is nothing but noise: gaps of 1e-3 of the loss after 50 steps.
# - A step size that falls to zero. At a constant one the training becomes unstable after 100 to 400 steps,
#   and gaps grow to 5e-2; with this one the largest seen were 2e-7 in the first 100 steps, 1.3e-5 in 600.
# A gradient of one bias that is off by a factor of 1.001 opens a gap of 1e-5 within 5 steps.
LEARNING_RATE = 0.5
TIGHT_STEPS = 100
TIGHT_TOLERANCE = 1e-5
LOOSE_TOLERANCE = 1e-2  # of the later steps, should a seed or machine meet an unstable spot after all

# A model that ignores the order of characters cannot get below the unigram entropy; one that learned must.
LEARNED = 0.8


@dataclass(frozen=True)
class Text:
    """A text as numbers.

    Attributes:
        ids: int64 [characters].
        vocabulary: number of different ids; the last stands for all rare characters.
        files: how many files it was read from.
        entropy: of a single character, in bits: the loss of the best model that knows frequencies only.
    """

    ids: Tensor
    vocabulary: int
    files: int
    entropy: float


def read_text(folder: Path | None = None, rare: int = 100) -> Text:
    """Reads the Python sources directly in a folder, by default the running Python's standard library.

    Args:
        folder: where to look.
        rare: a character seen less often than this shares one id with all others like it.

    Raises:
        FileNotFoundError: no sources there, as in a Python whose library is a zip file.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"{folder} has no Python sources to train on")
    text = "".join(file.read_text("utf-8", "replace") for file in files)
    common = sorted(character for character, count in Counter(text).items() if count >= rare)
    index = {character: i for i, character in enumerate(common)}
    ids = torch.tensor([index.get(character, len(index)) for character in text])
    frequencies = torch.bincount(ids).double() / len(ids)
    entropy = -(frequencies * frequencies.clamp_min(1e-300).log2()).sum().item()
    return Text(ids, len(index) + 1, len(files), entropy)


class CharacterModel(nn.Module):
    """Embedding → LSTM → linear. Ids [T, B] and the state to logits [T, B, vocabulary] and the next state."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm: nn.LSTM = nn.LSTM(EMBEDDING, HIDDEN, LAYERS)
        self.output = nn.Linear(HIDDEN, vocabulary)

    def forward(self, ids: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, Sequence[Tensor]]:
        y, state = self.lstm(self.embedding(ids), state)
        return self.output(y), state


class Trainer:
    """Truncated backpropagation through time of one model, planned for ``STEPS`` steps.

    A run cut short is the beginning of the full one.
    """

    def __init__(self, model: CharacterModel) -> None:
        self._model = model
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self._optimizer, 1.0, 0.0, total_iters=STEPS)
        self._state: tuple[Tensor, ...] | None = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: Tensor, targets: Tensor) -> None:
        """Trains on one window, ids and targets [T, B]; notes its loss in bits per character and its time."""
        start = time.perf_counter()
        logits, state = self._model(ids, self._state)
        self._state = tuple(s.detach() for s in state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        bits = loss.item() / math.log(2)  # waits for the device: the time is complete
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(bits)


@dataclass
class Training:
    """Both runs: losses in bits per character and seconds, one value per step."""

    characters: int
    files: int
    vocabulary: int
    entropy: float
    parameters: int
    builtin_losses: list[float]
    fusedrnn_losses: list[float]
    builtin_times: list[float]
    fusedrnn_times: list[float]
    stopped_early: bool
    failures: list[str] = field(default_factory=list)

    @property
    def final_losses(self) -> tuple[float, float]:
        """Mean of the last tenth of the steps, built-in and fusedrnn: on text that was not trained on yet."""
        n = max(1, len(self.builtin_losses) // 10)
        return statistics.fmean(self.builtin_losses[-n:]), statistics.fmean(self.fusedrnn_losses[-n:])


def tolerance(step: int) -> float:
    """How far the losses of a step may be apart, relative to the built-in's."""
    return TIGHT_TOLERANCE if step < TIGHT_STEPS else LOOSE_TOLERANCE


def compare(builtin: Sequence[float], fusedrnn: Sequence[float]) -> str:
    """Says at which step two loss curves part by more than the tolerance; empty if they do not."""
    for step, (a, b) in enumerate(zip(builtin, fusedrnn, strict=True)):
        if not abs(a - b) <= tolerance(step) * abs(a):  # NaN parts too
            return (
                f"the curves part at step {step}: {a:.6f} and {b:.6f}, relative tolerance {tolerance(step):g}"
            )
    return ""


def run(text: Text, device: torch.device, *, steps: int, seconds: float, seed: int) -> Training:
    """Trains both models, step by step in turn, for ``steps`` steps or until ``seconds`` are over.

    Both are at the same place of the text, and no place is visited twice. At least ``QUICK_STEPS`` are taken.
    """
    deadline = timing.Deadline(seconds)
    torch.manual_seed(seed)
    model = CharacterModel(text.vocabulary)
    other = copy.deepcopy(model)
    other.lstm = fusedrnn.LSTM(EMBEDDING, HIDDEN, LAYERS)
    other.lstm.load_state_dict(model.lstm.state_dict())
    length = (len(text.ids) - 1) // BATCH
    steps = min(steps, (length - 1) // WINDOW)
    trainers = [Trainer(model.to(device)), Trainer(other.to(device))]
    columns = text.ids[: length * BATCH].view(BATCH, length).t().contiguous().to(device)  # [length, B]
    taken = 0
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for step in range(steps):
            if step >= QUICK_STEPS and deadline.left <= 0:
                break
            window = columns[step * WINDOW : (step + 1) * WINDOW + 1]
            for trainer in trainers if step % 2 else reversed(trainers):
                trainer.step(window[:-1], window[1:])
            taken += 1
            bits = [trainer.losses[-1] for trainer in trainers]
            progress.set_postfix_str(
                f"bits/character: built-in {bits[0]:.3f}, fusedrnn {bits[1]:.3f}", refresh=False
            )
            progress.update()
    result = Training(
        characters=len(text.ids),
        files=text.files,
        vocabulary=text.vocabulary,
        entropy=text.entropy,
        parameters=sum(p.numel() for p in model.parameters()),
        builtin_losses=trainers[0].losses,
        fusedrnn_losses=trainers[1].losses,
        builtin_times=trainers[0].seconds,
        fusedrnn_times=trainers[1].seconds,
        stopped_early=taken < steps,
    )
    result.failures = find_failures(result)
    return result


def find_failures(result: Training) -> list[str]:
    """What is wrong with a training: curves that part, or a model that did not learn."""
    failures = []
    parted = compare(result.builtin_losses, result.fusedrnn_losses)
    if parted:
        failures.append(parted)
    for name, loss in zip(("torch.nn.LSTM", "fusedrnn.LSTM"), result.final_losses, strict=True):
        if not loss <= LEARNED * result.entropy:
            failures.append(
                f"{name} did not learn: {loss:.3f} bits per character at the end,"
                f" {LEARNED:g} × the unigram entropy is {LEARNED * result.entropy:.3f}"
            )
    return failures


def show(result: Training, console: Console) -> None:
    """Prints what was trained, how it went and how long a step took."""
    builtin, ours = result.final_losses
    steps = len(result.builtin_losses)
    gaps = relative_gaps(result)
    console.print(
        f"Text: {result.characters:,} characters of {result.files} standard-library sources,"
        f" {result.vocabulary} different; unigram entropy {result.entropy:.3f} bits per character.\n"
        f"Model: embedding {EMBEDDING} → {LAYERS}-layer LSTM {HIDDEN} → {result.vocabulary},"
        f" {result.parameters:,} parameters; {steps} steps of B={BATCH} × T={WINDOW}"
        + (", stopped by the time budget." if result.stopped_early else ".")
    )
    console.print(f"Loss at the end: built-in {builtin:.4f}, fusedrnn {ours:.4f} bits per character.")
    console.print(
        f"Largest relative gap: {max(gaps[:TIGHT_STEPS]):.1e} in the first {TIGHT_STEPS} steps"
        f" (allowed {TIGHT_TOLERANCE:g}), {max(gaps):.1e} in all (allowed {LOOSE_TOLERANCE:g})."
    )
    for name, times in (("built-in", result.builtin_times), ("fusedrnn", result.fusedrnn_times)):
        t = timing.spread(times)
        console.print(
            f"{name}: {t.median * 1e3:.1f} ms per step ({t.low * 1e3:.1f}–{t.high * 1e3:.1f}),"
            f" {BATCH * WINDOW / t.median:,.0f} tokens/s"
        )
    ratio = timing.spread([a / b for a, b in zip(result.builtin_times, result.fusedrnn_times, strict=True)])
    console.print(f"Ratio of whole steps: {ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})")
    for failure in result.failures:
        console.print(f"wrong: {failure}", style="red", markup=False)


def relative_gaps(result: Training) -> list[float]:
    """``|built-in - fusedrnn| / built-in`` of every step's loss."""
    return [abs(a - b) / a for a, b in zip(result.builtin_losses, result.fusedrnn_losses, strict=True)]
