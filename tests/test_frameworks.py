"""What else a training program does with a module: processes, checkpoints, hooks, parametrizations."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fusedrnn

from . import two_ranks
from .problems import served

F64 = torch.float64
NAMES = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
OURS = ("cpu", "emulator", "reference")


def sample(name: str) -> Tensor:
    return torch.randn((5, 3) if name in CELLS else (4, 5, 3), dtype=F64)


def loss(module: nn.Module, x: Tensor, flat: Callable) -> Tensor:
    return sum(t.square().sum() for t in flat(module(x)))


@pytest.mark.feature("DDP and FSDP2", nn="yes")
@pytest.mark.feature("shared memory", nn="yes")
def test_two_processes(tmp_path: Any) -> None:
    """DDP and FSDP2 give the gradients of one process, and a module in shared memory is one for all."""
    x = torch.randn(3, two_ranks.BATCH, 4)
    expected = {kind: two_ranks.train(two_ranks.Model(kind, fusedrnn), x) for kind in two_ranks.LAYERS}
    expected["LSTM of torch.nn"] = two_ranks.train(two_ranks.Model("LSTM", nn), x)
    for name, grad in expected["LSTM of torch.nn"].items():
        torch.testing.assert_close(expected["LSTM"][name], grad)
    shared = fusedrnn.LSTM(3, 4).share_memory()
    assert shared.bias_hh_l0.is_shared()
    torch.multiprocessing.spawn(two_ranks.work, (str(tmp_path), expected, x, shared), nprocs=2)
    assert shared.bias_hh_l0[:2].tolist() == [7.0, 8.0]


@pytest.mark.feature("activation checkpointing", nn="yes")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "backend"), served([*NAMES, "LSTMCell"], ["RNN"], OURS), indirect=["backend"]
)
def test_checkpoint(name: str, reentrant: bool, backend: str, twins: Callable, flat: Callable) -> None:
    ours, theirs = twins(name, 3, 4, dtype=F64)
    x = sample(name)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        output = checkpoint(lambda x, m=module: tuple(flat(m(x))), leaf, use_reentrant=reentrant)
        leaves = [leaf, *module.parameters()]
        sum(t.square().sum() for t in output).backward()
        results.append([t.grad for t in leaves])
    torch.testing.assert_close(*results)


@pytest.mark.feature("gradient accumulation", nn="yes")
@pytest.mark.parametrize(
    ("name", "backend"), served([*NAMES, *CELLS], ["GRUCell"], OURS), indirect=["backend"]
)
def test_accumulation_and_steps_in_place(name: str, backend: str, twins: Callable, flat: Callable) -> None:
    """Several backward passes add up, also of one graph; an optimizer changes the parameters in between."""
    ours, theirs = twins(name, 3, 4, dtype=F64)
    xs = [sample(name) for _ in range(3)]
    for module in (ours, theirs):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(2):
            for x in xs:
                loss(module, x, flat).backward()
            value = loss(module, xs[0], flat)
            value.backward(retain_graph=True)
            value.backward()
            optimizer.step()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(p, q)


@pytest.mark.feature("offloaded activations", nn="yes")
@pytest.mark.parametrize(
    ("name", "backend"), served([*NAMES, "LSTMCell"], ["RNN"], OURS), indirect=["backend"]
)
def test_saved_tensor_hooks(name: str, backend: str, twins: Callable, flat: Callable) -> None:
    """What a backward needs can live elsewhere: in the memory of the host, or in a file."""
    ours, theirs = twins(name, 3, 4, dtype=F64)
    x = sample(name)
    kept: list[bytes] = []

    def pack(t: Tensor) -> int:
        stream = io.BytesIO()
        torch.save(t.detach(), stream)
        kept.append(stream.getvalue())
        return len(kept) - 1

    def unpack(index: int) -> Tensor:
        return torch.load(io.BytesIO(kept[index]))

    results = []
    for module, hooks in ((theirs, None), (ours, save_on_cpu()), (ours, saved_tensors_hooks(pack, unpack))):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        if hooks is None:
            value = loss(module, leaf, flat)
        else:
            with hooks:
                value = loss(module, leaf, flat)
        value.backward()
        results.append([t.grad for t in (leaf, *module.parameters())])
    assert kept
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.feature("spectral and weight norm", nn="yes")
@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm", "orthogonal"])
@pytest.mark.parametrize("name", [*NAMES, *CELLS])
@pytest.mark.usefixtures("kernels_for_steps")
def test_parametrizations(name: str, norm: str, twins: Callable, flat: Callable) -> None:
    """A parametrized weight is trained as torch.nn trains it."""
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"
    x, results = sample(name), []
    for module in twins(name, 3, 4, dtype=F64):
        torch.manual_seed(3)
        # Enough of them to converge: one is made at each read of the weight, which torch.nn reads more often.
        options = {"n_power_iterations": 50} if norm == "spectral_norm" else {}
        getattr(parametrizations, norm)(module, weight, **options)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(module, x, flat).backward()
            optimizer.step()
        results.append([*module.parameters(), *flat(module(x))])
        assert norm != "orthogonal" or torch.allclose(
            getattr(module, weight).mT @ getattr(module, weight), torch.eye(4, dtype=F64)
        )
    torch.testing.assert_close(*results)


@pytest.mark.feature("checkpoints", nn="yes")
@pytest.mark.parametrize("name", [*NAMES, *CELLS])
@pytest.mark.usefixtures("kernels_for_steps")
def test_checkpoints_of_one_are_those_of_the_other(name: str, twins: Callable, assert_same: Callable) -> None:
    """A state_dict saved of either loads into the other, with the state of its optimizer."""
    options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    ours, theirs = twins(name, 3, 4, dtype=F64, **options)
    x = sample(name)
    for source, target in ((theirs, ours), (ours, theirs)):
        for p in source.parameters():
            nn.init.normal_(p)
        optimizers = [torch.optim.Adam(m.parameters()) for m in (source, target)]
        sum(p.sum() for p in source.parameters()).backward()
        optimizers[0].step()
        stream = io.BytesIO()
        torch.save((source.state_dict(), optimizers[0].state_dict()), stream)
        stream.seek(0)
        weights, state = torch.load(stream, weights_only=True)
        assert list(weights) == list(target.state_dict())
        target.load_state_dict(weights, assign=source is ours)
        optimizers[1] = torch.optim.Adam(target.parameters())
        optimizers[1].load_state_dict(state)
        assert_same(target, source, x)
        grads = [p.grad for p in source.parameters()]
        for p, g in zip(target.parameters(), grads, strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(list(target.parameters()), list(source.parameters()))


@pytest.mark.feature("copies", nn="yes")
@pytest.mark.parametrize("name", [*NAMES, *CELLS])
@pytest.mark.usefixtures("kernels_for_steps")
def test_copies(name: str, assert_same: Callable) -> None:
    module = getattr(fusedrnn, name)(3, 4, dtype=F64)
    x = sample(name)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    )
    for other in copies:
        assert type(other) is type(module)
        assert_same(other, module, x)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert next(module.parameters()).abs().sum() > 0


@pytest.mark.feature("meta device", nn="yes")
@pytest.mark.parametrize("name", [*NAMES, *CELLS])
@pytest.mark.usefixtures("kernels_for_steps")
def test_made_without_memory(name: str, assert_same: Callable) -> None:
    """On the meta device, then given memory; and ``skip_init``, which torch.nn has for its cells alone."""
    theirs = getattr(nn, name)(3, 4, dtype=F64)
    with torch.device("meta"):
        ours = getattr(fusedrnn, name)(3, 4, dtype=F64)
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, sample(name))
    for package in (fusedrnn, nn):
        kind = getattr(package, name)
        if name in CELLS:
            assert type(nn.utils.skip_init(kind, 3, 4)) is kind
        else:
            with pytest.raises(RuntimeError, match="must support a 'device' arg"):
                nn.utils.skip_init(kind, 3, 4)


@pytest.mark.feature("dynamic quantization", nn="yes")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_dynamic_quantization_after_revert() -> None:
    """torch replaces modules whose type is exactly its own: what is quantized has to be reverted first."""
    model, x = nn.Sequential(fusedrnn.LSTM(8, 16)), torch.randn(4, 3, 8)
    expected = model(x)[0]
    quantize: Any = torch.ao.quantization.quantize_dynamic
    assert type(quantize(model, {nn.LSTM})[0]) is fusedrnn.LSTM
    quantized = quantize(fusedrnn.revert(model), {nn.LSTM})
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM
    # weights of eight bits
    torch.testing.assert_close(quantized(x)[0], expected, rtol=0.1, atol=0.02)
