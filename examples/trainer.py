"""The loop the recipes share: train, validate, keep the best weights, stop early, save and resume."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = TypeVar("Batch")


@dataclass
class History:
    """What a run measured, an entry for each epoch.

    Attributes:
        loss: mean training loss.
        metric: what ``validate`` returned after the epoch.
        best: index of the epoch whose weights the model was left with; -1 before the first.
    """

    loss: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)
    best: int = -1

    @property
    def best_metric(self) -> float:
        return self.metric[self.best]


def fit(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    train_batches: Callable[[], Iterable[Batch]],
    validate: Callable[[], float],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    patience: int | None = None,
    maximise: bool = False,
    clip: float | None = 1.0,
    name: str = "metric",
    checkpoint: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Trains a model in place and leaves it in eval mode with the weights of its best epoch.

    A run that is resumed ends bit-equal to one that was never interrupted, if all that is random in it comes
    from torch's default generators.

    Args:
        model: what is trained; in train mode while ``loss`` is called, in eval mode for ``validate``.
        loss: mean loss of a batch, a scalar.
        train_batches: called at the start of each epoch, so that it may shuffle.
        validate: how good the model is; called without gradients.
        optimizer: over the model's parameters.
        epochs: how many passes over the batches, those of a resumed run included.
        patience: how many epochs without a better metric end the run; None for never.
        maximise: whether more of the metric is better.
        clip: largest norm of all gradients together; None for any.
        name: of the metric, for the lines printed.
        checkpoint: file written after every epoch; a run that is killed leaves a whole one.
        resume: whether to go on from ``checkpoint``, if there is one.
        on_epoch: called after each epoch, once the checkpoint is written.

    Raises:
        FloatingPointError: a loss was not finite.
        ValueError: ``resume`` without ``checkpoint``.
    """
    if resume and checkpoint is None:
        raise ValueError("resume needs a checkpoint to go on from")
    history, best_weights = History(), copy.deepcopy(model.state_dict())
    if resume and checkpoint is not None and checkpoint.exists():
        history, best_weights = _load(checkpoint, model, optimizer)
    while (epoch := len(history.loss)) < epochs and (patience is None or epoch - history.best <= patience):
        model.train()
        total, count = 0.0, 0
        for batch in tqdm(train_batches(), desc=f"epoch {epoch + 1}/{epochs}", leave=False, disable=None):
            optimizer.zero_grad(set_to_none=True)
            value = loss(batch)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            total, count = total + value.item(), count + 1
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {total}")
        model.eval()
        with torch.no_grad():
            metric = validate()
        best = history.best_metric if history.metric else None
        better = best is None or (metric > best if maximise else metric < best)
        history.loss.append(total / count)
        history.metric.append(metric)
        if better:
            history.best, best_weights = epoch, copy.deepcopy(model.state_dict())
        print(f"epoch {epoch + 1:3}  loss {history.loss[-1]:.4f}  {name} {metric:.4f}{'  best' * better}")
        if checkpoint is not None:
            _save(checkpoint, model, optimizer, history, best_weights)
        if on_epoch:
            on_epoch(history)
    model.load_state_dict(best_weights)
    model.eval()
    return history


def save_atomically(value: Any, path: Path) -> None:
    """``torch.save`` that leaves the old file or the new one, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    best_weights: dict[str, Tensor],
) -> None:
    state = {
        "model": model.state_dict(),
        "best": best_weights,
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
        "history": asdict(history),
    }
    save_atomically(state, path)


def _load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[History, dict[str, Tensor]]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    history = History(**state["history"])
    print(f"resumed from {path} after epoch {len(history.loss)}")
    return history, state["best"]
