"""The modules against torch.nn: values, states, gradients, layouts, and all that users do with modules."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

from .problems import served

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")

# Constructor arguments of every cell the layers have.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
# The built-in and a backend differ by roundings: eps, times the terms of a sum (some 50), times a growth over
# a few steps. Gradients in 16 bits are rounded at every step by the built-in and once by the kernels.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
F64 = torch.float64


def states(name: str, *shapes: tuple[int, ...], dtype: torch.dtype = F64) -> Any:
    """A random ``hx`` for a layer or cell: the shape of h, and for LSTM that of c if it is another."""
    h, c = torch.randn(shapes[0], dtype=dtype), torch.randn(shapes[-1], dtype=dtype)
    return (h, c) if name.startswith("LSTM") else h


def one_layer(name: str, *, given_state: bool = False, **kwargs: Any) -> tuple[tuple, dict, Tensor, Any]:
    """A small case of a layer or a cell: constructor arguments, input and state."""
    cell = name in CELLS
    x = torch.randn((3, 3) if cell else (4, 3, 3), dtype=F64)
    hx = states(name, (3, 5) if cell else (1, 3, 5)) if given_state else None
    return (3, 5), {"dtype": F64, **kwargs}, x, hx


@pytest.mark.parametrize("given_state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed", "packed_unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(
    ("backend", "layers", "dropout"),
    [("cpu", 1, 0.0), ("cpu", 2, 0.0), ("cpu", 3, 0.4), ("torch", 3, 0.4), ("reference", 3, 0.4)],
    indirect=["backend"],
    ids=["cpu-L1", "cpu-L2", "cpu-L3_dropout", "torch-L3_dropout", "reference-L3_dropout"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_parity(
    backend: str,
    twins: Callable,
    assert_same: Callable,
    kind: str,
    layers: int,
    dropout: float,
    bias: bool,
    batch_first: bool,
    bidirectional: bool,
    form: str,
    given_state: bool,
) -> None:
    T, B, I, H = 3, 3, 3, 5
    name, extra = KINDS[kind]
    options = {"num_layers": layers, "dropout": dropout, "bias": bias, "batch_first": batch_first}
    ours, theirs = twins(name, I, H, bidirectional=bidirectional, dtype=F64, **options, **extra)
    x: Any = torch.randn(T, B, I, dtype=F64)
    rows = layers * (2 if bidirectional else 1)
    batch: tuple[int, ...] = (B,)
    if form == "unbatched":
        x, batch = x[:, 0], ()
    elif form == "batched":
        x = x.transpose(0, 1).contiguous() if batch_first else x
    else:
        lengths = [2, 3, 1] if form == "packed_unsorted" else [3, 2, 1]
        x = pack_padded_sequence(x, lengths, enforce_sorted=form == "packed")
    hx = states(name, (rows, *batch, extra.get("proj_size", H)), (rows, *batch, H)) if given_state else None
    assert_same(ours, theirs, x, hx)
    with torch.no_grad():
        torch.manual_seed(2)
        output = ours(x, hx)
        torch.manual_seed(2)
        compare_outputs(output, theirs(x, hx), F64)


@pytest.mark.parametrize("given_state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batched", [False, True], ids=["unbatched", "batched"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(
    ("name", "extra"),
    [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})],
    ids=["lstm", "gru", "rnn_tanh", "rnn_relu"],
)
def test_cell_parity(
    backend: str,
    twins: Callable,
    assert_same: Callable,
    name: str,
    extra: dict[str, str],
    bias: bool,
    batched: bool,
    given_state: bool,
) -> None:
    ours, theirs = twins(name, 3, 5, bias=bias, dtype=F64, **extra)
    batch = (4,) if batched else ()
    x = torch.randn(*batch, 3, dtype=F64)
    hx = states(name, (*batch, 5)) if given_state else None
    assert_same(ours, theirs, x, hx)
    with torch.no_grad():
        compare_outputs(ours(x, hx), theirs(x, hx), F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_other_dtypes(
    backend: str, twins: Callable, assert_same: Callable, name: str, dtype: torch.dtype
) -> None:
    ours, theirs = twins(name, 17, 33, dtype=dtype)
    x = torch.randn((5, 17) if name in CELLS else (6, 5, 17), dtype=dtype)
    hx = states(name, (5, 33) if name in CELLS else (1, 5, 33), dtype=dtype)
    assert_same(ours, theirs, x, hx, **TOLERANCE[dtype])


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_layer_parity_of_drawn_shapes(twins: Callable, assert_same: Callable, data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    T, B, I, H, layers = draw(1, 9), draw(0, 9), draw(1, 20), draw(1, 20), draw(1, 3)
    name, extra = KINDS[data.draw(st.sampled_from([k for k in KINDS if k != "lstm_proj"]))]
    extra = dict(extra)
    if name == "LSTM" and H > 1:
        extra["proj_size"] = draw(0, H - 1)
    bidirectional, batch_first = data.draw(st.booleans()), data.draw(st.booleans())
    ours, theirs = twins(
        name, I, H, layers, bidirectional=bidirectional, batch_first=batch_first, dtype=F64, **extra
    )
    x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=F64)
    hx = None
    if data.draw(st.booleans()):
        rows = layers * (2 if bidirectional else 1)
        hx = states(name, (rows, B, extra.get("proj_size") or H), (rows, B, H))
    assert_same(ours, theirs, x, hx)


def compare_outputs(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    if isinstance(theirs, PackedSequence):
        assert isinstance(ours, PackedSequence)
        assert all(a is b for a, b in zip(ours[1:], theirs[1:], strict=True))
        ours, theirs = ours.data, theirs.data
    if isinstance(theirs, Tensor):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
        return
    assert type(ours) is type(theirs)
    for a, b in zip(ours, theirs, strict=True):
        compare_outputs(a, b, dtype)


def torch_module_cases(which: str) -> list[Any]:
    """(module name, case) for every input torch tests its recurrent modules with."""
    from torch.testing._internal import common_modules  # 5 s, and it wants expecttest: only for its two tests

    cases = []
    for info in common_modules.module_db:
        name = info.module_cls.__name__
        if info.module_cls is not getattr(nn, name, None) or name not in LAYERS + CELLS:
            continue
        make = getattr(info, which)
        extra = (
            {"with_packed_sequence": True} if which == "module_inputs_func" and name in ("RNN", "GRU") else {}
        )
        arguments = {"device": "cpu", "dtype": F64, "requires_grad": False, "training": True, **extra}
        cases += [(name, case) for case in make(info, **arguments)]
    return cases


def test_torch_module_inputs(backend: str, assert_same: Callable) -> None:
    cases = torch_module_cases("module_inputs_func")
    assert {name for name, _ in cases} == {*LAYERS, *CELLS}
    for name, case in cases:
        construct, forward = case.constructor_input, case.forward_input
        torch.manual_seed(1)
        ours = getattr(fusedrnn, name)(*construct.args, **construct.kwargs, dtype=F64)
        torch.manual_seed(1)
        theirs = getattr(nn, name)(*construct.args, **construct.kwargs, dtype=F64)
        assert not forward.kwargs
        assert_same(ours, theirs, *forward.args)
        assert_same(ours.eval(), theirs.eval(), *forward.args)


def test_torch_module_error_inputs() -> None:
    cases = torch_module_cases("module_error_inputs_func")
    assert {name for name, _ in cases} == {*LAYERS, *CELLS}
    for name, case in cases:
        construct, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        build = getattr(fusedrnn, name)
        if case.error_on.name == "CONSTRUCTION_ERROR":
            with pytest.raises(case.error_type, match=case.error_regex):
                build(*construct.args, **construct.kwargs)
        else:
            module = build(*construct.args, **construct.kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*forward.args, **forward.kwargs)


def test_strided_input_and_state(backend: str, twins: Callable, assert_same: Callable) -> None:
    """Transposed, sliced and expanded tensors: assert_same hands on the strides as they are."""
    T, B, I, H = 4, 3, 3, 5
    inputs = {
        "transposed": torch.randn(I, B, T, dtype=F64).permute(2, 1, 0),
        "sliced": torch.randn(2 * T, B + 1, 2 * I, dtype=F64)[::2, 1:, ::2],
        "one step for all": torch.randn(1, B, I, dtype=F64).expand(T, B, I),
        "one sample for all": torch.randn(T, 1, I, dtype=F64).expand(T, B, I),
        "one feature for all": torch.randn(T, B, 1, dtype=F64).expand(T, B, I),
    }
    for name in LAYERS:
        hidden = {
            "transposed": states(name, (2, H, B)),
            "expanded": states(name, (2, 1, H)),
        }
        for x, (how, hx) in itertools.product(inputs.values(), hidden.items()):
            pair = [h.transpose(1, 2) if how == "transposed" else h.expand(2, B, H) for h in as_tuple(hx)]
            ours, theirs = twins(name, I, H, bidirectional=True, dtype=F64)
            assert_same(ours, theirs, x, tuple(pair) if name == "LSTM" else pair[0])
        ours, theirs = twins(name, I, H, batch_first=True, dtype=F64)
        for x in inputs.values():
            assert_same(ours, theirs, x.transpose(0, 1))
            assert_same(ours, theirs, x[:, 1])
    for name in CELLS:
        ours, theirs = twins(name, I, H, dtype=F64)
        for x in inputs.values():
            pair = [h.t() for h in as_tuple(states(name, (H, B)))]
            # The built-in's output takes over the strides of the state; ours is contiguous.
            assert_same(ours, theirs, x[1], tuple(pair) if name == "LSTMCell" else pair[0], layout=False)
            assert_same(ours, theirs, x[1, 1])


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_empty_batch(backend: str, twins: Callable, assert_same: Callable, name: str) -> None:
    for given_state in (False, True):
        args, kwargs, x, hx = one_layer(name, given_state=given_state)
        ours, theirs = twins(name, *args, **kwargs)
        empty = x[:, :0] if name in LAYERS else x[:0]
        if given_state:
            hx = tuple(h[..., :0, :] for h in as_tuple(hx))
            hx = hx if name.startswith("LSTM") else hx[0]
        assert_same(ours, theirs, empty, hx)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_outputs_share_no_memory(backend: str, twins: Callable, flat: Callable, name: str) -> None:
    """Writing to one output changes no other and no input."""
    args, kwargs, x, hx = one_layer(name, given_state=True)
    ours, _ = twins(name, *args, **kwargs)
    for inputs in ((x[:1], hx), (x[:1],)) if name in LAYERS else ((x, hx), (x,)):
        with torch.no_grad():
            tensors = flat(ours(*inputs)) + flat(inputs)
        memory = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(memory)) == len(memory)


OPTIONS: list[tuple[str, tuple, dict[str, Any]]] = [
    ("LSTM", (3, 5, 2, False, True, 0.5, True, 2), {}),
    ("LSTM", (3, 5), {"proj_size": 2, "dtype": F64}),
    ("GRU", (3, 5, 2, False, True, 0.5, True), {}),
    ("GRU", (3, 5), {"bidirectional": True}),
    ("RNN", (3, 5, 2, "relu", False, True, 0.5, True), {}),
    ("RNN", (3, 5), {"nonlinearity": "relu", "dtype": torch.bfloat16}),
    ("LSTMCell", (3, 5, False, "cpu", F64), {}),
    ("GRUCell", (3, 5), {"bias": True}),
    ("RNNCell", (3, 5, True, "relu", "cpu", F64), {}),
    ("RNNCell", (3, 5), {"bias": False}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), OPTIONS)
def test_construction(twins: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    ours, theirs = twins(name, *args, **kwargs)
    assert isinstance(ours, getattr(nn, name))
    assert type(ours).__name__ == name
    assert repr(ours) == repr(theirs)
    public = {k: v for k, v in vars(theirs).items() if not k.startswith("_")}
    assert {k: v for k, v in vars(ours).items() if not k.startswith("_")} == public
    # The same seed gives the same parameters, in the same order, under the same keys.
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    torch.manual_seed(7)
    ours.reset_parameters()
    torch.manual_seed(7)
    theirs.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    # Checkpoints are strict both ways.
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in source.parameters():
                p.normal_()
        assert (
            str(target.load_state_dict(source.state_dict(), strict=True)) == "<All keys matched successfully>"
        )
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_copies_compute_the_same(twins: Callable, assert_same: Callable, name: str, tmp_path: Any) -> None:
    args, kwargs, x, hx = one_layer(name, given_state=True)
    ours, theirs = twins(name, *args, **kwargs)
    ours(x, hx)  # a module that has been used copies as well as a fresh one
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    copies = {
        "copy": copy.copy(ours),
        "deepcopy": copy.deepcopy(ours),
        "pickle": pickle.loads(pickle.dumps(ours)),
        "save": torch.load(stream, weights_only=False),
    }
    for how, module in copies.items():
        assert type(module) is type(ours)
        shared = how == "copy"
        assert all((a is b) == shared for a, b in zip(module.parameters(), ours.parameters(), strict=True))
        assert_same(module, theirs, x, hx)
    # A deep copy is on its own.
    with torch.no_grad():
        for p in copies["deepcopy"].parameters():
            p.zero_()
    assert_same(ours, theirs, x, hx)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_meta_device_and_conversion(
    twins: Callable, assert_same: Callable, flat: Callable, name: str
) -> None:
    args, kwargs, x, hx = one_layer(name, given_state=True)
    ours, theirs = twins(name, *args, **kwargs, device="meta")
    on_meta = (x.to("meta"), tuple(h.to("meta") for h in hx) if isinstance(hx, tuple) else hx.to("meta"))
    for a, b in zip(flat(ours(*on_meta)), flat(theirs(*on_meta)), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    ours, theirs = ours.to_empty(device="cpu"), theirs.to_empty(device="cpu")
    for module in (ours, theirs):
        torch.manual_seed(4)
        module.reset_parameters()
    assert_same(ours, theirs, x, hx)
    ours, theirs = ours.float().double(), theirs.float().double()
    assert_same(ours, theirs, x, hx)
    with torch.device("meta"):
        skeleton = getattr(fusedrnn, name)(*args, **kwargs)
    skeleton.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(skeleton, theirs, x, hx)


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_shared_by_a_cell_and_a_layer(backend: str, flat: Callable, name: str) -> None:
    layer = getattr(fusedrnn, name)(3, 5, dtype=F64)
    cell = getattr(fusedrnn, f"{name}Cell")(3, 5, dtype=F64)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(layer, f"{kind}_l0", getattr(cell, kind))
    x = torch.randn(4, 2, 3, dtype=F64)
    y, _ = layer(x)
    hx, outputs = None, []
    for x_t in x:
        hx = cell(x_t, hx)
        outputs.append(as_tuple(hx)[0])
    torch.testing.assert_close(y, torch.stack(outputs), **TOLERANCE[F64])
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    from_layer = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    (torch.stack(outputs) * weight).sum().backward()
    for p, grad in zip(cell.parameters(), from_layer, strict=True):
        torch.testing.assert_close(p.grad, grad, **TOLERANCE[F64])
    assert {id(p) for p in layer.parameters()} == {id(p) for p in cell.parameters()}


def recurrent_weight(name: str) -> str:
    return "weight_hh" if name in CELLS else "weight_hh_l0"


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_weight_norm(backend: str, twins: Callable, assert_same: Callable, name: str) -> None:
    for apply in (nn.utils.weight_norm, parametrizations.weight_norm):
        args, kwargs, x, hx = one_layer(name, given_state=True)
        pair = twins(name, *args, **kwargs)
        for module in pair:
            apply(module, recurrent_weight(name))
            module(x, hx)
            with torch.no_grad():  # the next forward must see this
                for p in module.parameters():
                    p.mul_(1.25)
        assert_same(*pair, x, hx)
        assert len(dict(pair[0].named_parameters())) == 5


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + w.flip(0)


@pytest.mark.feature("pruning", nn="yes")
@pytest.mark.parametrize(
    ("name", "backend"), served(LAYERS + CELLS, ["RNN", "GRUCell"]), indirect=["backend"]
)
def test_parametrization_and_pruning(backend: str, twins: Callable, assert_same: Callable, name: str) -> None:
    args, kwargs, x, hx = one_layer(name, given_state=True)
    pair = twins(name, *args, **kwargs)
    for module in pair:
        parametrize.register_parametrization(module, recurrent_weight(name), Symmetric())
    assert_same(*pair, x, hx)
    assert isinstance(pair[0], getattr(fusedrnn, name))
    for module in pair:
        parametrize.remove_parametrizations(module, recurrent_weight(name))
    assert_same(*pair, x, hx)
    for module in pair:
        prune.l1_unstructured(module, recurrent_weight(name), amount=0.5)
    assert_same(*pair, x, hx)


def test_a_parametrization_is_computed_once(backend: str) -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            calls.append(1)
            return w

    lstm = fusedrnn.LSTM(3, 5)
    parametrize.register_parametrization(lstm, "weight_hh_l0", Counting())
    calls.clear()
    lstm(torch.randn(4, 2, 3))
    assert len(calls) == 1


@pytest.mark.feature("weight drop", nn="yes")
@pytest.mark.parametrize(
    ("name", "backend"), served(LAYERS + CELLS, ["RNN", "GRUCell"]), indirect=["backend"]
)
def test_weight_drop(backend: str, twins: Callable, assert_same: Callable, name: str) -> None:
    """A parameter deleted and replaced by a tensor with a history: its gradient reaches the raw parameter."""
    args, kwargs, x, hx = one_layer(name, given_state=True)
    pair = twins(name, *args, **kwargs)
    weight = recurrent_weight(name)
    for module in pair:
        raw = getattr(module, weight)
        delattr(module, weight)
        module.register_parameter("raw", raw)

        def drop(module: nn.Module, _: Any) -> None:
            torch.manual_seed(5)
            setattr(module, weight, nn.functional.dropout(module.raw, 0.5))

        module.register_forward_pre_hook(drop)
    assert_same(*pair, x, hx)
    assert pair[0].raw.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_a_deleted_weight_is_missed(name: str) -> None:
    args, kwargs, x, _ = one_layer(name)
    module = getattr(fusedrnn, name)(*args, **kwargs)
    delattr(module, recurrent_weight(name))
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute '{recurrent_weight(name)}'"):
        module(x)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_functional_call(backend: str, twins: Callable, flat: Callable, name: str) -> None:
    args, kwargs, x, hx = one_layer(name, given_state=True)
    ours, theirs = twins(name, *args, **kwargs)
    others = {k: torch.randn_like(p).requires_grad_() for k, p in ours.named_parameters()}
    results = []
    for module in (ours, theirs):
        before = flat(module(x, hx))
        output = flat(torch.func.functional_call(module, others, (x, hx)))
        grads = torch.autograd.grad([t.square().sum() for t in output], list(others.values()))
        after = flat(module(x, hx))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        results.append([*output, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[F64])


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_with_one_bias(backend: str, twins: Callable, assert_same: Callable, name: str) -> None:
    for missing in ("bias_ih", "bias_hh"):
        args, kwargs, x, hx = one_layer(name, given_state=True)
        pair = twins(name, *args, **kwargs)
        for module in pair:
            setattr(module, missing, None)
        assert_same(*pair, x, hx)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_frozen_parameters(backend: str, twins: Callable, flat: Callable, name: str) -> None:
    """Gradients go where they are asked for and nowhere else."""
    args, kwargs, x, hx = one_layer(name, given_state=True)
    ours, theirs = twins(name, *args, **kwargs)
    for wanted in range(4):
        for module in (ours, theirs):
            module.zero_grad()
            for i, p in enumerate(module.parameters()):
                p.requires_grad_(i == wanted)
            flat(module(x, hx))[0].square().sum().backward()
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            if i == wanted:
                torch.testing.assert_close(a.grad, b.grad, **TOLERANCE[F64])
            else:
                assert a.grad is None
    ours.requires_grad_(False)
    assert not any(t.requires_grad for t in flat(ours(x, hx)))


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_modes(backend: str, twins: Callable, assert_same: Callable, name: str) -> None:
    x = torch.randn(4, 3, 3, dtype=F64)
    for p in (0.0, 0.3, 1.0):
        ours, theirs = twins(name, 3, 5, 3, dropout=p, dtype=F64)
        assert_same(ours, theirs, x)
        assert_same(ours.eval(), theirs.eval(), x)
        ours.dropout = theirs.dropout = 0.5  # read at every call
        assert_same(ours.train(), theirs.train(), x)


@pytest.mark.feature("inference mode", nn="yes")
@pytest.mark.parametrize(
    ("name", "backend"), served(LAYERS + CELLS, ["RNN", "GRUCell"]), indirect=["backend"]
)
def test_inference_mode(backend: str, twins: Callable, flat: Callable, name: str) -> None:
    args, kwargs, x, hx = one_layer(name, given_state=True)
    ours, theirs = twins(name, *args, **kwargs)
    with torch.inference_mode():
        for a, b in zip(flat(ours(x, hx)), flat(theirs(x, hx)), strict=True):
            assert a.is_inference()
            torch.testing.assert_close(a, b, **TOLERANCE[F64])


@pytest.mark.feature("hooks", nn="yes")
@pytest.mark.parametrize(
    ("name", "backend"), served(LAYERS + CELLS, ["RNN", "GRUCell"]), indirect=["backend"]
)
def test_hooks(backend: str, twins: Callable, name: str) -> None:
    args, kwargs, x, _ = one_layer(name)
    seen: list[list[Any]] = []
    for module in twins(name, *args, **kwargs):
        log: list[Any] = []
        seen.append(log)
        module.register_forward_pre_hook(
            lambda _, inputs, log=log: log.append(len(inputs)) or (2 * inputs[0],)
        )
        module.register_forward_hook(lambda _, inputs, output, log=log: log.append(output))
        module.register_full_backward_hook(lambda _, dx, dy, log=log: log.extend(dx))
        leaf = x.clone().requires_grad_()
        first = as_tuple(module(leaf))[0]
        first.square().sum().backward()
        log.append(leaf.grad)

    def compare(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, **TOLERANCE[F64])
        elif isinstance(a, tuple):
            for i, j in zip(a, b, strict=True):
                compare(i, j)
        else:
            assert a == b

    compare(tuple(seen[0]), tuple(seen[1]))


@pytest.mark.parametrize("name", LAYERS)
def test_as_a_submodule(backend: str, flat: Callable, name: str) -> None:
    """The import swap inside a model keeps its checkpoint."""

    class Model(nn.Module):
        def __init__(self, package: Any) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.rnn = getattr(package, name)(3, 5, 2, batch_first=True)
            self.head = nn.Linear(5, 7)

        def forward(self, tokens: Tensor) -> Tensor:
            self.rnn.flatten_parameters()
            return self.head(self.rnn(self.embed(tokens))[0])

    ours, theirs = Model(fusedrnn), Model(nn)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(7, (2, 6))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, **TOLERANCE[torch.float32])


AUTOCAST_DTYPES = [
    # weights, input, state
    (torch.float32, torch.float32, None),
    (torch.float32, torch.bfloat16, None),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
]


@pytest.mark.feature("autocast")
@pytest.mark.parametrize("dtypes", AUTOCAST_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "packed"),
    [*((name, False) for name in LAYERS + CELLS), *((name, True) for name in LAYERS)],
    ids=lambda value: {False: "padded", True: "packed"}.get(value, value),
)
def test_autocast(
    backend: str, twins: Callable, flat: Callable, name: str, packed: bool, dtypes: tuple
) -> None:
    """What the built-in accepts is accepted, and the outputs have its dtypes."""
    weight, data, state = dtypes
    args, _, x, hx = one_layer(name, given_state=state is not None)
    ours, theirs = twins(name, *args, dtype=weight)
    x = x.to(data)
    if state is not None:
        hx = tuple(h.to(state) for h in hx) if isinstance(hx, tuple) else hx.to(state)
    given_input = pack_padded_sequence(x, [4, 2, 1]) if packed else x
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = flat(ours(given_input, hx)), flat(theirs(given_input, hx))
    assert [t.dtype for t in result] == [t.dtype for t in expected]
    tolerance = TOLERANCE[F64 if weight == F64 else torch.bfloat16]
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_sample(backend: str, kind: str) -> None:
    name, extra = KINDS[kind]
    module = getattr(fusedrnn, name)(3, 5, 2, dtype=F64, **extra)
    clean = torch.randn(6, 4, 3, dtype=F64)
    dirty = clean.clone()
    dirty[2, 1, 0] = float("nan")
    outputs, grads = [], []
    others = [0, 2, 3]
    for x in (clean, dirty):
        leaf = x.clone().requires_grad_()
        y, _ = module(leaf)
        y[:, others].sum().backward()
        outputs.append(y.detach())
        grads.append(leaf.grad)
    assert torch.equal(outputs[0][:, others], outputs[1][:, others])
    assert torch.equal(grads[0][:, others], grads[1][:, others])
    assert torch.equal(outputs[0][:2, 1], outputs[1][:2, 1])
    assert outputs[1][2:, 1].isnan().all()


@pytest.mark.parametrize("name", LAYERS)
def test_a_million_steps(name: str) -> None:
    """No recursion and no 16-bit or 32-bit step counter: forward equals two halves, backward arrives."""
    T = 1_000_000
    module = getattr(fusedrnn, name)(1, 2)
    x = torch.randn(T, 1, 1)
    with torch.no_grad():
        y, final = module(x)
        y_1, middle = module(x[: T // 2])
        y_2, end = module(x[T // 2 :], middle)
    assert torch.equal(y, torch.cat((y_1, y_2)))
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(final), as_tuple(end), strict=True))
    leaf = x.requires_grad_()
    y, _ = module(leaf)
    y.sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0] != 0
    # Ten steps from the end the gradient is that of the tail alone.
    tail = x[-10:].detach().requires_grad_()
    with torch.no_grad():
        state = module(x[:-10])[1]
    module(tail, state)[0].sum().backward()
    torch.testing.assert_close(leaf.grad[-10:], tail.grad, **TOLERANCE[torch.float32])
