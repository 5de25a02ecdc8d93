"""Inference on streams: an answer to each value the moment it arrives, for many callers in one batch.

First a GRU learns to predict the next value of noisy oscillations (beside it, the last value as prediction).
Then it serves them: callers come, send a value now and then, and leave; each has a slot of the batch while it
calls. At a tick one call takes a step for those slots whose value has come, by ``lengths=`` of 0 and 1, and
begins anew for those where a new caller has come, by ``reset=``; the state is carried from tick to tick. The
answers are compared with those to whole sequences, and the time of each tick is measured.

    python -m examples.streaming
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fusedrnn

from . import common
from .trainer import fit

PERCENTILES = (50, 90, 99)


def oscillations(count: int, steps: int) -> Tensor:
    """Noisy sums of two sines of random periods, ``[steps, count, 1]``."""
    t = torch.arange(steps)[:, None, None]
    period = 8 + 24 * torch.rand(2, 1, count, 1)
    phase = 6.28 * torch.rand(2, 1, count, 1)
    return (6.28 * t / period + phase).sin().sum(0) + 0.1 * torch.randn(steps, count, 1)


class Predictor(nn.Module):
    """Values ``[T, B, 1]`` and the state to predictions of the next ones ``[T, B, 1]`` and the state behind.

    ``lengths`` and ``reset`` are those of the GRU.
    """

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.rnn = fusedrnn.GRU(1, hidden, layers)
        self.output = nn.Linear(hidden, 1)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, state = self.rnn(x, state, lengths=lengths, reset=reset)
        return self.output(y), state


class Server:
    """A model and the states of as many callers as there are slots."""

    def __init__(self, model: Predictor, slots: int) -> None:
        self.model = model
        self.state = next(model.parameters()).new_zeros(model.rnn.num_layers, slots, model.rnn.hidden_size)

    @torch.inference_mode()
    def tick(self, values: Tensor, present: Tensor, begins: Tensor) -> Tensor:
        """Takes values ``[slots, 1]`` where they are present, bool ``[slots]``; returns predictions alike.

        ``begins``, bool ``[slots]``: whose value is the first of a new caller.
        """
        y, self.state = self.model(values[None], self.state, lengths=present.long(), reset=begins[None])
        return y[0]


class Served(NamedTuple):
    answers: list[Tensor]  # of each caller [steps]
    seconds: Tensor  # of each tick [ticks]
    values: int


def serve(model: Predictor, calls: list[Tensor], slots: int, arriving: float = 0.8) -> Served:
    """Plays calls ``[steps, 1]`` to a server; a value has come in time with probability ``arriving``."""
    device = next(model.parameters()).device
    server, waiting = Server(model, slots), list(range(len(calls)))[::-1]
    answers: list[list[Tensor]] = [[] for _ in calls]
    at = [waiting.pop() if waiting else None for _ in range(slots)]  # the caller in each slot
    seconds = []
    with tqdm(total=sum(map(len, calls)), desc=f"{slots} slots", leave=False, disable=None) as bar:
        while any(caller is not None for caller in at):
            come = [
                i for i, caller in enumerate(at) if caller is not None and torch.rand(()).item() < arriving
            ]
            values, present, begins = (
                torch.zeros(slots, 1),
                torch.zeros(slots, dtype=torch.bool),
                [False] * slots,
            )
            for i in come:
                done = len(answers[at[i]])
                values[i], present[i], begins[i] = calls[at[i]][done], True, done == 0
            start = time.perf_counter()
            predicted = server.tick(
                values.to(device), present.to(device), torch.tensor(begins).to(device)
            ).cpu()
            seconds.append(time.perf_counter() - start)
            for i in come:
                answers[at[i]].append(predicted[i, 0])
                if len(answers[at[i]]) == len(calls[at[i]]):
                    at[i] = waiting.pop() if waiting else None
            bar.update(len(come))
    return Served([torch.stack(a) for a in answers], torch.tensor(seconds), sum(map(len, calls)))


def difference(model: Predictor, calls: list[Tensor], served: Served) -> float:
    """The largest difference between what was answered and the predictions for whole sequences."""
    lengths = torch.tensor([len(c) for c in calls])
    device = next(model.parameters()).device
    with torch.inference_mode():
        whole, _ = model(nn.utils.rnn.pad_sequence(calls).to(device), lengths=lengths)  # [T, B, 1]
    return max(
        (answer - whole[: len(answer), i, 0].cpu()).abs().max().item()
        for i, answer in enumerate(served.answers)
    )


def draw(path: Path, latencies: dict[int, Tensor]) -> None:
    with common.figure(path) as drawn:
        panels = drawn.subplots(1, len(latencies), sharey=True, squeeze=False)[0]
        for axes, (slots, seconds) in zip(panels, latencies.items(), strict=True):
            milliseconds = 1e3 * seconds
            shown = milliseconds[milliseconds <= milliseconds.quantile(0.995)].tolist()
            axes.hist(shown, bins=40, weights=[100 / len(seconds)] * len(shown), color=common.QUIET)
            for p, dashes in zip(PERCENTILES, (":", "--", "-"), strict=True):
                level = milliseconds.quantile(p / 100).item()
                axes.axvline(level, color=common.OURS, linestyle=dashes, label=f"{p} %")
            axes.set(title=f"slots: {slots}", xlabel="milliseconds")
        panels[0].set_ylabel("% of ticks")
        panels[-1].legend(frameon=False, fontsize=8)


def main(
    epochs: common.Epochs = 6,
    hidden: Annotated[int, typer.Option(help="Units of each layer.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="GRU layers.")] = 2,
    slots: Annotated[list[int], typer.Option(help="How many callers at once; repeatable.")] = [1, 8, 64],  # noqa: B006
    calls: Annotated[int, typer.Option(min=1, help="To serve, of 20 to 100 values each.")] = 60,
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    backend: common.Backend = "auto",
    device: common.Device = "",
    seed: common.Seed = 0,
    plot: common.Plot = common.PLOTS / "streaming.png",
) -> dict[int, Served]:
    """Learn to predict, then serve streams; times are those of this machine as it is now."""
    with common.prepared(backend, seed, device) as place:
        known, held_out = oscillations(256, 100).to(place), oscillations(64, 100).to(place)
        model = Predictor(hidden, layers).to(place)
        print("data: noisy oscillations, made up")

        def loss(batch: tuple[Tensor]) -> Tensor:
            x = batch[0].transpose(0, 1)  # [T, B, 1]
            return F.mse_loss(model(x[:-1])[0], x[1:])

        history = fit(
            model,
            loss,
            lambda: common.shuffled(32, known.transpose(0, 1)),
            lambda: F.mse_loss(model(held_out[:-1])[0], held_out[1:]).item(),
            optimizer=torch.optim.AdamW(model.parameters(), lr=5e-3),
            epochs=epochs,
            name="error",
            checkpoint=checkpoint,
            resume=resume,
        )
        persistence = F.mse_loss(held_out[:-1], held_out[1:]).item()
        print(
            f"mean square error {history.best_metric:.4f}; of the last value as prediction {persistence:.4f}"
        )
        torch.manual_seed(seed)
        callers = [oscillations(1, int(torch.randint(20, 101, ())))[:, 0] for _ in range(calls)]
        latencies, results = {}, {}
        for count in slots:
            served = results[count] = serve(model, callers, count)
            latencies[count] = served.seconds
            found = " ".join(f"{p} %: {1e3 * served.seconds.quantile(p / 100):.2f} ms" for p in PERCENTILES)
            rate = served.values / served.seconds.sum().item()
            print(f"slots {count:4}  {found}  {rate:.0f} values a second")
            print(f"            differs from whole sequences by {difference(model, callers, served):.1e}")
    draw(plot, latencies)
    return results


if __name__ == "__main__":
    common.application(main)()
