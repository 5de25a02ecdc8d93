"""Mixed precision: autocast with the built-in's dtypes, gradients that overflow, precision switches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import autocast, functional
from fusedrnn.backend import reasons as backend_reasons
from fusedrnn.cells import CELLS

from .problems import served

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {"num_layers": 2}),
    "rnn": ("RNN", {"bidirectional": True}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell": ("RNNCell", {"nonlinearity": "relu"}),
}
FP16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # what oneDNN's LSTM needs
OURS = ("cpu", "emulator", "reference")
LOW = (torch.bfloat16, torch.float16)


def sample(kind: str) -> Tensor:
    return torch.randn((3, 5) if kind.endswith("Cell") else (4, 3, 5))


@pytest.mark.feature("autocast", nn="no LSTM in fp16 on most CPUs")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("kind", "backend"), served([*KINDS], ["rnn", "LSTMCell"], OURS), indirect=["backend"]
)
def test_autocast(kind: str, dtype: torch.dtype, backend: str, twins: Callable, flat: Callable) -> None:
    """Outputs have the built-in's dtypes and values, and fp32 parameters get fp32 gradients."""
    name, options = KINDS[kind]
    ours, theirs = twins(name, 5, 6, **options)
    x = sample(kind).requires_grad_()

    def run(module: nn.Module, packed: bool = False) -> list[Tensor]:
        with torch.autocast("cpu", dtype):
            return flat(module(pack_padded_sequence(x, [4, 3, 1]) if packed else x))

    if kind == "lstm_proj":
        for a, b in zip(run(ours, True), run(theirs, True), strict=True):
            assert a.dtype == b.dtype

    results = run(ours)
    if kind == "lstm" and dtype == torch.float16 and not FP16:
        with pytest.raises(RuntimeError, match="could not create a primitive descriptor"):
            run(theirs)
        expected = [t.to(dtype) for t in flat(theirs(x))]
    else:
        expected = run(theirs)
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype
        # 8 bits of bf16, a few roundings of values below one, in two layers
        torch.testing.assert_close(a, b, rtol=4e-2, atol=4e-2)
    leaves = [x, *ours.parameters()]
    grads = torch.autograd.grad([t.float().square().sum() for t in results], leaves)
    exact = torch.autograd.grad([t.square().sum() for t in flat(theirs(x))], [x, *theirs.parameters()])
    for a, b in zip(grads, exact, strict=True):
        assert a.dtype == torch.float32
        # likewise, relative to the largest gradient
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * float(b.abs().max()))


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """As ``torch.autocast("cuda")``, which refuses to be on where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.builtin])
def test_autocast_of_a_gpu(cell: str, dtype: torch.dtype) -> None:
    """On CUDA the built-in casts everything, as it does for cuDNN; traced, since nothing can run there."""
    spec = CELLS[cell]
    for packed in (False, True):
        with FakeTensorMode(), cuda_autocast(dtype):
            x = torch.empty((5, 3) if packed else (4, 2, 3), device="cuda")
            state = [torch.empty(1, 2, 6, device="cuda") for _ in range(spec.states)]
            shapes = ((spec.gates * 6, 3), (spec.gates * 6, 6), (spec.gates * 6,), (spec.gates * 6,))
            weights = [torch.empty(s, device="cuda") for s in shapes]
            sizes = torch.empty(3, dtype=torch.int64) if packed else None
            layer = (spec.id, x, state, *([w] for w in weights), [], [False], sizes, False)
            y, final, saved = torch.ops.fusedrnn.sequence_forward(*layer)
            assert {t.dtype for t in (y, *final)} == {dtype}
            assert {t.dtype for t in saved} <= {torch.float32}  # the cell state
            inference, _ = torch.ops.fusedrnn.sequence(*layer)
            assert inference.dtype == dtype
            args = autocast.cast(spec, "cuda", (x.double(), state), promote=False)
            assert args[0].dtype == torch.float64  # left alone, as by the built-in


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.builtin])
def test_a_layer_under_autocast_of_a_gpu(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way a module takes on a GPU: the rule is applied before the op, once for all."""
    available = dict.fromkeys(backend_reasons(), "") | {"triton": "left out"}
    monkeypatch.setattr(functional, "_standing", lambda: (available, None))
    monkeypatch.setattr(functional, "_capability", lambda x: (9, 0))
    spec = CELLS[cell]
    with FakeTensorMode(), cuda_autocast(torch.float16):
        state = [torch.empty(1, 2, 6, device="cuda") for _ in range(spec.states)]
        shapes = ((spec.gates * 6, 3), (spec.gates * 6, 6), (spec.gates * 6,), (spec.gates * 6,))
        weights = functional.Weights(*([torch.empty(s, device="cuda")] for s in shapes))
        x = torch.empty(5, 2, 3, device="cuda")
        y, final = functional.sequence(cell, x, state, weights)
        assert {t.dtype for t in (y, *final)} == {torch.float16}
        state = [torch.empty(2, 6, device="cuda") for _ in range(spec.states)]
        step = functional.step(cell, torch.empty(2, 3, device="cuda"), state, weights)
        assert {t.dtype for t in step} == {torch.float16}


@pytest.mark.feature("GradScaler", nn="no LSTM in fp16 on most CPUs")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize(
    ("name", "backend"), served(["LSTM", "GRU", "RNN"], ["RNN"], OURS), indirect=["backend"]
)
def test_overflow_skips_the_step(name: str, backend: str, twins: Callable) -> None:
    """fp16 gradients that overflow are inf, never the largest number: a step is skipped, the scale halved."""
    ours, theirs = twins(name, 5, 6)
    x = torch.randn(4, 3, 5)
    hx = torch.zeros(1, 3, 6).half() if name == "GRU" else None  # for a state in fp32 it runs in fp32
    steps: dict[nn.Module, list[bool]] = {}
    for module in (ours, theirs) if FP16 or name != "LSTM" else (ours,):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=100)
        steps[module] = []
        for _ in range(8):
            before = [p.detach().clone() for p in module.parameters()]
            scale = scaler.get_scale()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = module(x, hx)[0].float().square().sum()
            scaler.scale(loss).backward()
            finite = all(bool(p.grad.isfinite().all()) for p in module.parameters())
            scaler.step(optimizer)
            scaler.update()
            same = [torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
            assert all(same) is not finite
            assert scaler.get_scale() == (scale if finite else scale / 2)
            steps[module].append(finite)
    assert steps[ours][0] is False
    assert steps[ours][-1] is True
    if theirs in steps:  # as often, give or take a step: the built-in rounds more of what it adds up
        assert abs(sum(steps[ours]) - sum(steps[theirs])) <= 1


class Flags(TorchDispatchMode):
    """What our ops were told of tf32."""

    def __init__(self) -> None:
        super().__init__()
        self.tf32: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fusedrnn"):
            self.tf32.append(args[10])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts torch's precision switches back to what conftest.py made them: the older one last, it sets all."""
    # torch's own test inputs, which other tests import, forbid to set them; the module hides its own global
    frozen = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(frozen, "__allow_nonbracketed_mutation_flag", True)
    yield
    for place in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        place.fp32_precision = "ieee"
    torch.backends.cudnn.allow_tf32 = False


SWITCHES: dict[str, tuple[Callable[[], Any], bool]] = {
    "rnn ieee": (lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee"), False),
    "rnn tf32": (lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32"), True),
    "allow_tf32=False": (lambda: setattr(torch.backends.cudnn, "allow_tf32", False), False),
    "allow_tf32=True": (lambda: setattr(torch.backends.cudnn, "allow_tf32", True), True),
}


@pytest.mark.feature("fp32 precision", nn="not shown: it takes a GPU", backends=["emulator"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_precision_switches(switch: str, switches: None) -> None:
    """float32 takes tf32 operands only where torch's switches for cuDNN say so, and never on the CPU."""
    turn, tf32 = SWITCHES[switch]
    module, x = fusedrnn.LSTM(64, 40), torch.randn(6, 3, 64)
    exact = module.double()(x.double())[0].detach()
    module.float()
    turn()
    errors = {}
    for name in ("emulator", "cpu"):
        with Flags() as flags, fusedrnn.use_backend(name):
            y = module(x)[0]
            y.sum().backward()
        y = y.detach()
        assert flags.tf32 == [tf32 and name == "emulator"] * 2
        errors[name] = float((y.double() - exact).norm() / exact.norm())
    # fp32 has 24 bits and tf32 11: sums of a hundred terms are right to some 1e-7 and 1e-4.
    assert errors["cpu"] < 1e-6
    assert (1e-5 < errors["emulator"] < 1e-3) if tf32 else errors["emulator"] < 1e-6


def test_fp64_takes_no_switch(switches: None) -> None:
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    with Flags() as flags, fusedrnn.use_backend("emulator"):
        fusedrnn.GRU(3, 4, dtype=torch.float64)(torch.randn(5, 2, 3, dtype=torch.float64))
    assert flags.tf32 == [False]
