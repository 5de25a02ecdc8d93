"""A language model of characters: a deep residual LSTM, on one process or on many.

Truncated backpropagation through time: the text is cut into streams side by side, each step trains on the
next window of all of them, and the state is carried from window to window. The text is the documentation
that every Python carries (``pydoc_data.topics``), or any file with ``--data``. Judged in bits per character
of text held out, beside what counting characters and pairs of characters gives.

    python -m examples.language_model
    torchrun --standalone --nproc-per-node 2 -m examples.language_model [--fsdp]

With torchrun each process trains on its share of the streams: by default each has the whole model (DDP), with
``--fsdp`` each has a part of every parameter (FSDP2). A checkpoint holds model, optimizer and carried state,
each saved by those who have it; any number of processes can read it, sharded or not. With ``--resume`` a run
that was killed goes on from its last checkpoint, also when torchrun's ``--max-restarts`` starts it again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fusedrnn

from . import common

State = tuple[Tensor, Tensor]  # h and c, each [layers, B, H]
RATE, CLIP = 6e-3, 1.0  # the learning rate at its highest, and the largest norm of the gradients
RARE = "\N{REPLACEMENT CHARACTER}"  # stands for every character seen less than ten times
Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Text:
    """A text as numbers, int64 ``[characters]``, to train on and to be judged by, and what they stand for."""

    training: Tensor
    validation: Tensor
    characters: list[str]

    @classmethod
    def read(cls, path: Path | None, limit: int | None = None) -> Text:
        text = path.read_text("utf-8") if path else "\n".join(topics[name] for name in sorted(topics))
        text = text[:limit]
        characters = [RARE, *sorted(c for c, seen in Counter(text).items() if seen >= 10 and c != RARE)]
        index = {c: i for i, c in enumerate(characters)}
        ids = torch.tensor([index.get(c, 0) for c in text])
        kept = len(ids) * 9 // 10
        return cls(ids[:kept], ids[kept:], characters)

    def counted(self) -> tuple[float, float]:
        """Bits per character of the validation text by how often characters, and pairs of them, are seen."""
        pairs = torch.full((len(self.characters),) * 2, 0.1)  # the usual smoothing: no pair is impossible
        before, after = self.training[:-1], self.training[1:]
        pairs.index_put_((before, after), torch.tensor(1.0), accumulate=True)
        singles = pairs.sum(0)
        before, after = self.validation[:-1], self.validation[1:]
        unigram = -(singles / singles.sum()).log2()[after].mean()
        bigram = -(pairs / pairs.sum(1, keepdim=True)).log2()[before, after].mean()
        return unigram.item(), bigram.item()


class Model(nn.Module):
    """Ids ``[T, B]`` and the state to logits ``[T*B, characters]`` and the next state."""

    def __init__(self, characters: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.lstm = fusedrnn.LSTM(
            hidden,
            hidden,
            layers,
            dropout=dropout,
            variational_dropout=True,
            residual=True,
            forget_bias=1.0,
        )
        self.output = nn.Linear(hidden, characters)
        for name, weight in self.lstm.named_parameters():
            if name.startswith("weight_hh"):
                for gate in weight.data.split(hidden):
                    nn.init.orthogonal_(gate)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = self.lstm(self.embedding(ids), state)
        return self.output(y.flatten(0, 1)), state


@dataclass(frozen=True)
class Settings:
    """What a training is; see ``--help``."""

    epochs: int
    hidden: int
    layers: int
    dropout: float
    streams: int
    window: int
    precision: Precision
    fsdp: bool
    seed: int


class Training:
    """One training: this process's share of the text, and everything a checkpoint holds.

    Args:
        text: the same in all processes.
        settings: likewise; ``streams`` is that of all processes together.
        mesh: the processes, in one dimension.
    """

    def __init__(self, text: Text, settings: Settings, mesh: DeviceMesh) -> None:
        self.settings, self.mesh, device = settings, mesh, mesh.device_type
        self.windows = self._cut(text.training)  # [n, T+1, B]
        self.held_out = self._cut(text.validation)
        self.steps = settings.epochs * len(self.windows)
        torch.manual_seed(settings.seed)  # all processes begin with the same parameters
        model = Model(len(text.characters), settings.hidden, settings.layers, settings.dropout).to(device)
        self.model: nn.Module = model
        if settings.fsdp:
            fully_shard(model.lstm, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif mesh.size() > 1:
            self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.01)
        self.scaler = torch.amp.GradScaler(device, enabled=settings.precision == "fp16")
        self.state = self._zeros()
        self.step = 0
        self.history: dict[str, list[float]] = {"training": [], "validation": [], "validated at": []}

    def _cut(self, ids: Tensor) -> Tensor:
        """Windows ``[n, T+1, B]`` of this process's streams; each begins where the one before ended."""
        streams, window = self.settings.streams, self.settings.window
        length = len(ids) // streams
        if streams % self.mesh.size() or length <= window:
            raise ValueError(f"{len(ids)} characters in {streams} streams for {self.mesh.size()} processes")
        own = ids[: length * streams].view(streams, length).chunk(self.mesh.size())[self.mesh.get_rank()]
        return own.unfold(1, window + 1, window).permute(1, 2, 0).to(self.mesh.device_type)

    def _zeros(self) -> State:
        shape = self.settings.layers, self.windows.size(2), self.settings.hidden
        h, c = torch.zeros(2, *shape, device=self.mesh.device_type)
        return h, c

    def _loss(self, window: Tensor, state: State) -> tuple[Tensor, State]:
        """Nats per character of a window ``[T+1, B]``, and the state to carry on."""
        dtype = PRECISIONS[self.settings.precision]
        with torch.autocast(self.mesh.device_type, dtype, enabled=dtype != torch.float32):
            logits, (h, c) = self.model(window[:-1], state)
        loss = F.cross_entropy(logits.float(), window[1:].flatten())
        return loss, (h.detach().float(), c.detach().float())

    def take_step(self) -> Tensor:
        """Trains on the next window; returns its loss in bits per character of this process's streams."""
        window = self.step % len(self.windows)
        if window == 0:  # the streams begin again
            self.state = self._zeros()
        # Dropout depends on the step and the process alone: there is no random state to save.
        torch.manual_seed(self.settings.seed + self.step * self.mesh.size() + self.mesh.get_rank())
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * warm_cosine((self.step + 1) / self.steps)
        self.model.train()
        self.optimizer.zero_grad()
        loss, self.state = self._loss(self.windows[window], self.state)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.scaler.step(self.optimizer)  # which is left out if fp16 gradients overflowed
        self.scaler.update()
        self.step += 1
        return loss.detach() / math.log(2)

    @torch.no_grad()
    def validate(self) -> Tensor:
        """Bits per character of this process's streams of the text held out."""
        self.model.eval()
        losses, state = [], self._zeros()
        for window in self.held_out:
            loss, state = self._loss(window, state)
            losses.append(loss)
        return torch.stack(losses).mean() / math.log(2)

    def advance(self, until: int) -> Iterator[float]:
        """Trains up to a step and validates; yields the loss of each step in this process."""
        losses = []
        while self.step < until:
            losses.append(self.take_step())
            yield losses[-1].item()
        found = torch.stack([*losses, self.validate()])
        dist.all_reduce(found)  # streams are shared out evenly: the mean of the means is that of all
        *training, validation = (found / self.mesh.size()).tolist()
        self.history["training"] += training
        self.history["validation"].append(validation)
        self.history["validated at"].append(self.step)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            # Each process has that of its streams: together one tensor, which others may cut elsewhere.
            "state": [DTensor.from_local(s, self.mesh, [Shard(1)]) for s in self.state],
            "step": self.step,
            "history": json.dumps(self.history),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
        )
        self.scaler.load_state_dict(saved["scaler"])
        h, c = saved["state"]
        self.state, self.step = (h.to_local(), c.to_local()), saved["step"]
        self.history = json.loads(saved["history"])

    def save(self, folder: Path) -> None:
        """Writes a checkpoint beside the last one, and then removes what is older: one is always whole."""
        dcp.save({"training": self}, checkpoint_id=folder / f"step-{self.step:08d}")
        if self.mesh.get_rank() == 0:
            for old in finished(folder)[:-2]:
                shutil.rmtree(old)

    def resume(self, folder: Path) -> None:
        """Goes on from the newest whole checkpoint; without one, from the beginning."""
        if found := finished(folder):
            dcp.load({"training": self}, checkpoint_id=found[-1])


def finished(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, from the oldest: a checkpoint's metadata is what is written last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def warm_cosine(done: float) -> float:
    """The share of the learning rate to take: up in the first 5 % of the training, then down a cosine."""
    return min(done / 0.05, 0.5 + 0.5 * math.cos(math.pi * done))


@torch.no_grad()
def write(model: nn.Module, text: Text, length: int) -> str:
    """Text that the model makes up, a character at a time."""
    model.eval()
    torch.manual_seed(0)
    device = next(model.parameters()).device
    ids, state = torch.zeros(1, 1, dtype=torch.int64, device=device), None
    written = []
    for _ in range(length):
        logits, state = model(ids, state)
        ids = torch.multinomial((logits / 0.7).softmax(-1), 1)
        written.append(text.characters[ids.item()])
    return "".join(written)


@contextmanager
def processes(device: str) -> Iterator[DeviceMesh]:
    """The processes that torchrun started, or this one alone, as a mesh of one dimension."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    try:
        yield init_device_mesh(device, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def draw(path: Path, history: dict[str, list[float]], baselines: dict[str, float]) -> None:
    with common.figure(path) as drawn:
        axes = drawn.subplots()
        axes.plot(history["training"], color="#cccccc", linewidth=0.8, label="training, each step")
        axes.plot(
            history["validated at"], history["validation"], color=common.OURS, marker=".", label="validation"
        )
        for (name, bits), dashes in zip(baselines.items(), (":", "--"), strict=True):
            axes.axhline(bits, color=common.BASELINE, linestyle=dashes, label=name)
        axes.set(xlabel="step", ylabel="bits per character", ylim=(0, max(baselines.values()) * 1.4))
        axes.legend(frameon=False, fontsize=8)


def main(
    epochs: common.Epochs = 3,
    hidden: Annotated[int, typer.Option(help="Units of each layer.")] = 128,
    layers: Annotated[int, typer.Option(min=2, help="LSTM layers, with residual connections.")] = 3,
    dropout: Annotated[float, typer.Option(help="Between layers, one mask for a window.")] = 0.1,
    streams: Annotated[int, typer.Option(help="Of text side by side, in all processes together.")] = 32,
    window: Annotated[int, typer.Option(help="Characters of a stream in a step.")] = 64,
    precision: Annotated[Precision, typer.Option(help="By autocast; fp16 with a GradScaler.")] = "fp32",
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Processes share parameters out (FSDP2).")] = False,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints and validations.")] = 50,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder, seen by all machines.", is_eager=True)
    ] = None,
    resume: common.Resume = False,
    limit: Annotated[int | None, typer.Option(help="Only so many characters of the text.")] = None,
    data: common.Data = None,
    device: common.Device = "",
    backend: common.Backend = "auto",
    seed: common.Seed = 0,
    plot: common.Plot = common.PLOTS / "language_model.png",
) -> dict[str, list[float]]:
    """Train a language model of characters; beside it, what counting characters and pairs of them gives."""
    settings = Settings(epochs, hidden, layers, dropout, streams, window, precision, fsdp, seed)
    text = Text.read(data, limit)
    unigram, bigram = text.counted()
    with common.prepared(backend, seed, device) as place, processes(place.type) as mesh:
        chief = mesh.get_rank() == 0
        training = Training(text, settings, mesh)
        if checkpoint and resume:
            training.resume(checkpoint)
        if chief:
            size = sum(p.numel() for p in training.model.parameters())
            print(
                f"data: {data or 'the documentation in pydoc_data.topics'}, {len(text.training)} characters"
            )
            print(f"{size} parameters, {mesh.size()} process(es)")
            print(f"from step {training.step} of {training.steps}")
        with tqdm(total=training.steps, initial=training.step, disable=None if chief else True) as bar:
            while training.step < training.steps:
                for bits in training.advance(min(training.step // every * every + every, training.steps)):
                    bar.set_postfix(bits=f"{bits:.2f}", refresh=False)
                    bar.update()
                if checkpoint:
                    training.save(checkpoint)
                if chief:
                    bits = training.history["validation"][-1]
                    bar.write(f"step {training.step:5}  bits per character {bits:.3f}")
        sample = write(training.model, text, 300)
        if chief:
            print(f"\n{sample}\n")
            print(f"bits per character of text held out: {training.history['validation'][-1]:.3f}")
            print(f"by frequencies of characters {unigram:.3f}, of pairs {bigram:.3f}")
            draw(plot, training.history, {"characters counted": unigram, "pairs counted": bigram})
    return training.history


if __name__ == "__main__":
    common.application(main)()
