"""What each of two processes of a gloo group trains: see test_examples_scale.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from examples import language_model

# 50 steps in an epoch
SMALL: dict[str, Any] = {
    "limit": 20100,
    "hidden": 24,
    "layers": 2,
    "streams": 6,
    "window": 60,
    "epochs": 2,
    "dropout": 0.0,  # whose masks depend on how many processes there are
    "every": 25,
}


def train(folder: Path, way: str, **options: Any) -> None:
    language_model.main(**SMALL | options, checkpoint=folder / way, resume=True, plot=folder / f"{way}.png")


WAYS = ("DDP", "FSDP2", "one, then DDP", "one, then FSDP2")


def work(rank: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for way, port in zip(
        WAYS, ports, strict=True
    ):  # a port each: the other rank may still be at the last one
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        train(folder, way, fsdp=way.endswith("FSDP2"))


def history(checkpoint: Path) -> dict[str, list[float]]:
    """What a training that is over has noted, read by one process."""
    done = language_model.main(**SMALL, checkpoint=checkpoint, resume=True, plot=checkpoint / "plot.png")
    assert done["validated at"][-1] == 100
    return done


def assert_close(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert found["validated at"] == expected["validated at"]
    for curve in ("training", "validation"):
        # fp32 gradients summed in another order; of a rounding error Adam makes up to a step of the rate,
        # 6e-3, of weights whose gradient is no more than that
        torch.testing.assert_close(found[curve], expected[curve], rtol=0, atol=1e-3)
