"""What each of two processes of a gloo group does: see test_frameworks.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedrnn

STEPS, BATCH = 2, 6
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "LSTM with a projection": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {"bidirectional": True}),
    "RNN": ("RNN", {"num_layers": 2}),
    "GRUCell": ("GRUCell", {}),
}


class Model(nn.Module):
    def __init__(self, kind: str, package: Any) -> None:
        super().__init__()
        name, options = LAYERS[kind]
        torch.manual_seed(1)
        self.embed = nn.Linear(4, 5)
        self.rnn = getattr(package, name)(5, 6, **options)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, 4]
        if isinstance(self.rnn, nn.RNNCellBase):
            h = None
            for x_t in self.embed(x).unbind(0):
                h = self.rnn(x_t, h)
            return h
        return self.rnn(self.embed(x))[0]


def train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of the last of some steps of SGD; of sharded ones the whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()}


def work(
    rank: int, folder: str, expected: dict[str, dict[str, Tensor]], x: Tensor, shared: nn.Module
) -> None:
    """Trains on this rank's half of the batch, both ways; fails unless gradients are those of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, own = init_device_mesh("cpu", (2,)), x.chunk(2, 1)[rank]
    for kind, grads in expected.items():
        package = nn if kind.endswith("of torch.nn") else fusedrnn
        kind = kind.removesuffix(" of torch.nn")
        for way in ("DDP", "FSDP2"):
            model: nn.Module = Model(kind, package)
            if way == "DDP":
                model = DistributedDataParallel(model)
            else:
                fully_shard(model.rnn, mesh=mesh)
                fully_shard(model, mesh=mesh)
            for name, grad in train(model, own).items():
                torch.testing.assert_close(grad, grads[name], msg=lambda m, w=way, k=kind: f"{w} {k}: {m}")
    with torch.no_grad():  # in the memory of the process that started this one
        dict(shared.named_parameters())["bias_hh_l0"][rank] = 7.0 + rank
    dist.destroy_process_group()
