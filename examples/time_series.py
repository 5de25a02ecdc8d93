"""Forecasting: the next year of a monthly series from windows that slide over it, by a GRU or an LSTM.

The data are real: carbon dioxide above Mauna Loa, 1958 to 2001 (monthly means of the weekly series), or with
``--series sunspots`` the yearly sunspot numbers since 1700; both come with statsmodels. ``--data`` takes a
text file with a number a line, or the last column of a CSV with a header, and ``--season`` its period.

Each window is seen relative to its last value, so that no trend has to be learned by heart. The last sixth of
the series is for testing and the sixth before it for validation; what is forecast there was never trained on.
The forecast is held against two that need no learning: that all stays as it is (naive), and that each month
is as it was a year before (seasonal naive).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

import fusedrnn

from . import common
from .trainer import History, fit

LAYERS = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU}


class Forecaster(nn.Module):
    """Reads a window and says all steps of the horizon at once, relative to the last value of the window."""

    def __init__(self, cell: str, horizon: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.rnn = LAYERS[cell](1, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, horizon)
        self.scale = scale

    def forward(self, windows: Tensor) -> Tensor:
        """Forecasts ``[B, horizon]`` from windows ``[B, T]``, in the unit of the series."""
        last = windows[:, -1:]
        y, _ = self.rnn(((windows - last) / self.scale).unsqueeze(2))
        return last + self.readout(y[:, -1]) * self.scale


@dataclass
class Result:
    """What was measured on the test part: mean absolute errors by method, in the unit of the series."""

    history: History
    errors: dict[str, float]


def main(
    series: Annotated[Literal["co2", "sunspots"], typer.Option(help="Which series.")] = "co2",
    cell: Annotated[Literal["lstm", "gru"], typer.Option(help="Which layer.")] = "gru",
    window: Annotated[int, typer.Option(min=1, help="Steps that are read.")] = 36,
    horizon: Annotated[int, typer.Option(min=1, help="Steps that are forecast.")] = 12,
    season: Annotated[int, typer.Option(min=0, help="Period; 0: the known one of the series.")] = 0,
    hidden: Annotated[int, typer.Option(min=1, help="Units of the layer.")] = 32,
    epochs: common.Epochs = 60,
    data: common.Data = None,
    backend: common.Backend = "auto",
    seed: common.Seed = 0,
    device: common.Device = "",
    checkpoint: common.Checkpoint = None,
    resume: common.Resume = False,
    plot: common.Plot = common.PLOTS / "time_series.png",
) -> Result:
    """Forecast a series, beside the naive and the seasonal-naive forecast."""
    if data:
        values, what, period = read(data), str(data), 1
    else:
        values, what, period = co2() if series == "co2" else sunspots()
    period = season or period
    with common.prepared(backend, seed, device) as place:
        values = values.to(place)
        first = len(values) * 4 // 6, len(values) * 5 // 6  # of validation, of test
        parts = [slide(values[: first[0]], window, horizon)]
        # Those that are judged read what came before, and forecast their own part.
        parts += [
            slide(values[start - window : end], window, horizon) for start, end in (first, (first[1], None))
        ]
        if min(len(windows) for windows, _ in parts) == 0 or not period <= window:
            raise typer.BadParameter(f"{len(values)} values are too few for this window, horizon and season")
        training, validation, test = parts
        print(
            f"data: {what}; {len(values)} values, {len(training[0])} windows to train, {len(test[0])} to test"
        )
        scale = (training[1] - training[0][:, -1:]).std().item()
        model = Forecaster(cell, horizon, hidden, scale).to(place)
        history = fit(
            model,
            lambda batch: (model(batch[0]) - batch[1]).abs().mean() / scale,
            lambda: common.shuffled(32, *training),
            lambda: mean_error(model(validation[0]), validation[1]),
            optimizer=torch.optim.AdamW(model.parameters(), lr=4e-3),
            epochs=epochs,
            patience=15,
            name="error",
            checkpoint=checkpoint,
            resume=resume,
        )
        windows, truth = test
        with torch.no_grad():
            forecasts = {
                cell.upper(): model(windows),
                "seasonal naive": seasonal_naive(windows, horizon, period),
                "naive": windows[:, -1:].expand_as(truth),
            }
        errors = {name: mean_error(forecast, truth) for name, forecast in forecasts.items()}
    print(f"\nmean absolute error over {horizon} steps, test part")
    for name, error in errors.items():
        print(f"{name:16}{error:9.3f}")
    draw(plot, what, values[first[1] :].cpu(), {name: f.cpu() for name, f in forecasts.items()}, errors)
    return Result(history, errors)


def slide(values: Tensor, window: int, horizon: int) -> tuple[Tensor, Tensor]:
    """All windows ``[N, window]`` of a series and what follows each ``[N, horizon]``."""
    if len(values) < window + horizon:
        return values.new_empty(0, window), values.new_empty(0, horizon)
    pieces = values.unfold(0, window + horizon, 1)
    return pieces[:, :window], pieces[:, window:]


def seasonal_naive(windows: Tensor, horizon: int, period: int) -> Tensor:
    """The last period of each window over and over, ``[N, horizon]``."""
    return windows[:, -period:].repeat(1, -(-horizon // period))[:, :horizon]


def mean_error(forecast: Tensor, truth: Tensor) -> float:
    return (forecast - truth).abs().mean().item()


def co2() -> tuple[Tensor, str, int]:
    """Monthly means; a month without a measurement is interpolated."""
    from statsmodels.datasets import co2

    monthly = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    return torch.tensor(monthly.to_numpy().tolist()), "CO2 above Mauna Loa, monthly, ppm (statsmodels)", 12


def sunspots() -> tuple[Tensor, str, int]:
    from statsmodels.datasets import sunspots

    yearly = sunspots.load_pandas().data["SUNACTIVITY"]
    return torch.tensor(yearly.to_numpy().tolist()), "sunspot numbers, yearly (statsmodels)", 11


def read(path: Path) -> Tensor:
    """The last column of a text file with commas; a first line that is no number is a header."""
    cells = [line.split(",")[-1].strip() for line in path.read_text().splitlines() if line.strip()]
    try:
        return torch.tensor([float(value) for value in cells[not _is_number(cells[0]) :]])
    except (ValueError, IndexError) as error:
        raise typer.BadParameter(f"{path} is not a column of numbers: {error}") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def draw(
    path: Path, title: str, truth: Tensor, forecasts: dict[str, Tensor], errors: dict[str, float]
) -> None:
    """The test part, and on it the forecasts that follow each other without overlap."""
    horizon = next(iter(forecasts.values())).size(1)
    with common.figure(path, 7.5, 3.2) as drawn:
        axes = drawn.subplots()
        axes.plot(range(len(truth)), truth, color="black", linewidth=1, label="what came")
        for (name, forecast), style in zip(forecasts.items(), ("-", "--", ":"), strict=True):
            colour = common.OURS if style == "-" else common.BASELINE
            for start in range(0, len(forecast), horizon):
                label = f"{name}, error {errors[name]:.2f}" if start == 0 else None
                steps = range(start, start + horizon)
                axes.plot(steps, forecast[start], style, color=colour, linewidth=1.6, label=label)
        axes.set(xlabel="step of the test part", title=title)
        axes.legend(frameon=False, fontsize=8)


app = common.application(main)

if __name__ == "__main__":
    app()
