"""Bad arguments, inputs, states and dtypes: ours raise what torch raises, and raise where torch is silent.

What torch raises is found by running it, so the tables below hold calls and no messages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, randn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.functional import Weights, step

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def outcome(call: Callable[[], Any]) -> tuple[type, str]:
    """Type and message of what the call raises; type and repr of what it returns."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    return type(result), repr(result)


def assert_same_error(call: Callable[[Any], Any]) -> None:
    """``call(package)`` raises the same for ``fusedrnn`` and for ``torch.nn``."""
    kind, message = outcome(lambda: call(nn))
    assert issubclass(kind, Exception), "torch takes this"
    assert outcome(lambda: call(fusedrnn)) == (kind, message)


LAYER_ARGUMENTS: list[tuple[tuple, dict[str, Any]]] = [
    ((), {}),
    ((3,), {}),
    ((3, 0), {}),
    ((3, -1), {}),
    ((0, 5), {}),
    ((-3, 5), {}),
    ((3.0, 5), {}),
    ((3, 5.0), {}),
    (("3", 5), {}),
    ((None, 5), {}),
    ((3, 5, 0), {}),
    ((3, 5, -2), {}),
    ((3, 5, "2"), {}),
    ((3, 5, 1.5), {}),
    ((3, 5), {"bias": 1}),
    ((3, 5), {"bias": None}),
    ((3, 5), {"bias": "True"}),
    ((3, 5), {"batch_first": 0}),
    ((3, 5), {"batch_first": "False"}),
    ((3, 5, 2), {"dropout": -0.1}),
    ((3, 5, 2), {"dropout": 1.1}),
    ((3, 5, 2), {"dropout": True}),
    ((3, 5, 2), {"dropout": "0.5"}),
    ((3, 5, 2), {"dropout": "much"}),
    ((3, 5, 2), {"dropout": None}),
    ((3, 5), {"proj_size": -1}),
    ((3, 5), {"proj_size": 5}),
    ((3, 5), {"proj_size": 6}),
    ((3, 5), {"proj_size": 2.5}),
    ((3, 5), {"nonlinearity": "sigmoid"}),
    ((3, 5), {"nonlinearity": None}),
    ((3, 5, 1, "gelu"), {}),
    ((3, 5), {"mode": "LSTM"}),
    ((3, 5), {"hidden_size": 5}),
    ((3, 5), {"no_such_argument": 1}),
    ((3, 5), {"device": "nowhere"}),
    ((3, 5), {"dtype": torch.int64}),
    ((3, 5), {"dtype": "float32"}),
    ((3, 5, 1, True, False, 0.0, False, 2, "cpu", torch.float32, 0), {}),
]
CELL_ARGUMENTS: list[tuple[tuple, dict[str, Any]]] = [
    ((), {}),
    ((3,), {}),
    ((3, -1), {}),
    ((-3, 5), {}),
    ((3.0, 5), {}),
    ((3, "5"), {}),
    ((3, 5), {"batch_first": True}),
    ((3, 5), {"device": "nowhere"}),
    ((3, 5), {"dtype": torch.int64}),
    ((3, 5, True, "tanh", "cpu", torch.float32, 0), {}),
]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [(n, *row) for n in LAYERS for row in LAYER_ARGUMENTS]
    + [(n, *row) for n in CELLS for row in CELL_ARGUMENTS],
)
def test_constructor_errors(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    # A row may be bad for one module and fine for another.
    kind, text = outcome(lambda: getattr(nn, name)(*args, **kwargs))
    expected = getattr(fusedrnn, name) if issubclass(kind, nn.Module) else kind
    assert outcome(lambda: getattr(fusedrnn, name)(*args, **kwargs)) == (expected, text)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_warning(name: str) -> None:
    caught = []
    for package in (nn, fusedrnn):
        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("always")
            getattr(package, name)(3, 5, dropout=0.5)
        caught.append([(w.category, str(w.message)) for w in log])
    assert caught[0] == caught[1]
    assert len(caught[0]) == 1


BAD_INPUTS: dict[str, Callable[[], Any]] = {
    "no steps": lambda: randn(0, 2, 3),
    "no steps, unbatched": lambda: randn(0, 3),
    "no steps, no batch": lambda: randn(0, 0, 3),
    "0-D": lambda: randn(()),
    "1-D": lambda: randn(3),
    "4-D": lambda: randn(1, 4, 2, 3),
    "features": lambda: randn(4, 2, 4),
    "features, unbatched": lambda: randn(4, 4),
    "no features": lambda: randn(4, 2, 0),
    "float64": lambda: randn(4, 2, 3, dtype=torch.float64),
    "bfloat16": lambda: randn(4, 2, 3, dtype=torch.bfloat16),
    "int64": lambda: torch.ones(4, 2, 3, dtype=torch.int64),
    "bool": lambda: torch.ones(4, 2, 3, dtype=torch.bool),
    "meta": lambda: randn(4, 2, 3, device="meta"),
    "None": lambda: None,
    "list": lambda: [[1.0]],
    "tuple": lambda: (randn(4, 2, 3), torch.tensor([2, 2, 2, 2])),
    "numpy": lambda: randn(4, 2, 3).numpy(),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_input_errors(name: str, bad: str, batch_first: bool) -> None:
    x = BAD_INPUTS[bad]()
    if batch_first and isinstance(x, Tensor) and x.dim() == 3:
        x = x.transpose(0, 1)
    assert_same_error(lambda package: getattr(package, name)(3, 5, 2, batch_first=batch_first)(x))
    hx = pair(name == "LSTM", randn(2, 2, 5))
    assert_same_error(lambda package: getattr(package, name)(3, 5, 2, batch_first=batch_first)(x, hx))


# Each is called with whether the cell is an LSTM.
BAD_STATES: dict[str, Callable[[bool], Any]] = {
    "batch": lambda lstm: pair(lstm, randn(2, 3, 5)),
    "batch of one": lambda lstm: pair(lstm, randn(2, 1, 5)),
    "layers": lambda lstm: pair(lstm, randn(1, 2, 5)),
    "hidden": lambda lstm: pair(lstm, randn(2, 2, 4)),
    "1-D": lambda lstm: pair(lstm, randn(5)),
    "2-D": lambda lstm: pair(lstm, randn(2, 5)),
    "4-D": lambda lstm: pair(lstm, randn(1, 2, 2, 5)),
    "float64": lambda lstm: pair(lstm, randn(2, 2, 5, dtype=torch.float64)),
    "bfloat16": lambda lstm: pair(lstm, randn(2, 2, 5, dtype=torch.bfloat16)),
    "int64": lambda lstm: pair(lstm, torch.ones(2, 2, 5, dtype=torch.int64)),
    "meta": lambda lstm: pair(lstm, randn(2, 2, 5, device="meta")),
    "number": lambda lstm: 1.0,
    "string": lambda lstm: "zeros",
    "other cell's": lambda lstm: pair(not lstm, randn(2, 2, 5)),
    "empty": lambda lstm: (),
    "one": lambda lstm: (randn(2, 2, 5),),
    "three": lambda lstm: (randn(2, 2, 5),) * 3,
    "None in a pair": lambda lstm: (None, None),
    "None for c": lambda lstm: (randn(2, 2, 5), None),
    "c batch": lambda lstm: (randn(2, 2, 5), randn(2, 3, 5)),
    "c hidden": lambda lstm: (randn(2, 2, 5), randn(2, 2, 4)),
    "c 2-D": lambda lstm: (randn(2, 2, 5), randn(2, 5)),
    "c float64": lambda lstm: (randn(2, 2, 5), randn(2, 2, 5, dtype=torch.float64)),
    "one tensor": lambda lstm: randn(2, 2, 2, 5) if lstm else (randn(2, 2, 5),),
}


def pair(lstm: bool, h: Tensor) -> Any:
    return (h, h.clone()) if lstm else h


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bad", BAD_STATES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_state_errors(name: str, bad: str, batch_first: bool) -> None:
    hx = BAD_STATES[bad](name == "LSTM")
    x = randn(2, 4, 3) if batch_first else randn(4, 2, 3)
    assert_same_error(lambda package: getattr(package, name)(3, 5, 2, batch_first=batch_first)(x, hx))


@pytest.mark.parametrize("shape", [(2, 1, 5), (1, 5), (2, 4), (5,), (3, 5)])
@pytest.mark.parametrize("name", LAYERS)
def test_unbatched_state_errors(name: str, shape: tuple[int, ...]) -> None:
    hx = pair(name == "LSTM", randn(*shape))
    assert_same_error(lambda package: getattr(package, name)(3, 5, 2)(randn(4, 3), hx))


def test_an_unbatched_lstm_takes_its_state_as_one_tensor() -> None:
    x, hx = randn(4, 3), randn(2, 2, 5)
    ours, theirs = fusedrnn.LSTM(3, 5, 2), nn.LSTM(3, 5, 2)
    ours.load_state_dict(theirs.state_dict())
    # 1e-5: fp32 sums of 8 terms in another order, through 4 steps and 2 layers
    torch.testing.assert_close(ours(x, hx)[0], theirs(x, hx)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"proj_size": 2}, {"proj_size": 2, "bidirectional": True}])
@pytest.mark.parametrize("shapes", [((2, 2, 5), (2, 2, 5)), ((2, 2, 2), (2, 2, 2)), ((2, 3, 2), (2, 2, 5))])
def test_projection_state_errors(sizes: dict[str, Any], shapes: tuple) -> None:
    layers = 1 if "bidirectional" in sizes else 2
    hx = tuple(randn(*shape) for shape in shapes)
    assert_same_error(lambda package: package.LSTM(3, 5, layers, **sizes)(randn(4, 2, 3), hx))


@pytest.mark.parametrize("name", LAYERS)
def test_module_on_another_device(name: str) -> None:
    assert_same_error(lambda package: getattr(package, name)(3, 5, device="meta")(randn(4, 2, 3)))


@pytest.mark.parametrize("name", LAYERS)
def test_module_converted_after_use(name: str) -> None:
    """The message names the dtype the weights have now, also when they came by functional_call."""

    def converted(package: Any) -> Any:
        module = getattr(package, name)(3, 5)
        module(randn(4, 2, 3))
        return module.double()(randn(4, 2, 3))

    def called(package: Any) -> Any:
        module = getattr(package, name)(3, 5)
        module(randn(4, 2, 3))
        doubles = {k: p.double() for k, p in module.named_parameters()}
        return torch.func.functional_call(module, doubles, randn(4, 2, 3))

    assert_same_error(converted)
    assert_same_error(called)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64, None),
        (torch.float64, torch.float32, None),
        (torch.float32, torch.int64, None),
        (torch.float32, torch.float32, torch.float64),
        (torch.float64, torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_autocast_mixes_no_float64_or_integers(name: str, dtypes: tuple) -> None:
    weight, data, state = dtypes
    cell = name in CELLS
    x = randn(*((2, 3) if cell else (4, 2, 3))).to(data)
    args = (
        () if state is None else (pair("LSTM" in name, randn(*((2, 5) if cell else (1, 2, 5)), dtype=state)),)
    )

    def call(package: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return getattr(package, name)(3, 5, dtype=weight)(x, *args)

    assert_same_error(call)


def test_autocast_of_another_device_does_not_count() -> None:
    def call(package: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16), warnings.catch_warnings():
            return package.GRU(3, 5)(randn(4, 2, 3, dtype=torch.bfloat16))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: autocast disabled where there is no CUDA
        assert_same_error(call)


BAD_CELL_INPUTS: dict[str, Callable[[], Any]] = {
    "0-D": lambda: randn(()),
    "3-D": lambda: randn(1, 2, 3),
    "features": lambda: randn(2, 4),
    "features, unbatched": lambda: randn(4),
    "no features": lambda: randn(2, 0),
    "float64": lambda: randn(2, 3, dtype=torch.float64),
    "bfloat16": lambda: randn(2, 3, dtype=torch.bfloat16),
    "int64": lambda: torch.ones(2, 3, dtype=torch.int64),
    "meta": lambda: randn(2, 3, device="meta"),
    "None": lambda: None,
    "list": lambda: [1.0],
    "packed": lambda: pack_padded_sequence(randn(4, 2, 3), [4, 2]),
}


@pytest.mark.parametrize("bad", BAD_CELL_INPUTS)
@pytest.mark.parametrize("name", CELLS)
def test_cell_input_errors(name: str, bad: str) -> None:
    x = BAD_CELL_INPUTS[bad]()
    assert_same_error(lambda package: getattr(package, name)(3, 5)(x))
    assert_same_error(lambda package: getattr(package, name)(3, 5)(x, pair(name == "LSTMCell", randn(2, 5))))


BAD_CELL_STATES: dict[str, Callable[[bool], Any]] = {
    "batch": lambda lstm: pair(lstm, randn(3, 5)),
    "batch of one": lambda lstm: pair(lstm, randn(1, 5)),
    "hidden": lambda lstm: pair(lstm, randn(2, 4)),
    "0-D": lambda lstm: pair(lstm, randn(())),
    "1-D": lambda lstm: pair(lstm, randn(5)),
    "3-D": lambda lstm: pair(lstm, randn(1, 2, 5)),
    "float64": lambda lstm: pair(lstm, randn(2, 5, dtype=torch.float64)),
    "bfloat16": lambda lstm: pair(lstm, randn(2, 5, dtype=torch.bfloat16)),
    "int64": lambda lstm: pair(lstm, torch.ones(2, 5, dtype=torch.int64)),
    "meta": lambda lstm: pair(lstm, randn(2, 5, device="meta")),
    "number": lambda lstm: 1.0,
    "other cell's": lambda lstm: pair(not lstm, randn(2, 5)),
    "empty": lambda lstm: (),
    "one": lambda lstm: (randn(2, 5),),
    "three": lambda lstm: (randn(2, 5),) * 3,
    "None in a pair": lambda lstm: (None, None),
    "one tensor": lambda lstm: randn(2, 2, 5),
    "c batch": lambda lstm: (randn(2, 5), randn(3, 5)),
    "c hidden": lambda lstm: (randn(2, 5), randn(2, 1)),
    "c 1-D": lambda lstm: (randn(2, 5), randn(5)),
}


@pytest.mark.parametrize("bad", BAD_CELL_STATES)
@pytest.mark.parametrize("name", CELLS)
def test_cell_state_errors(name: str, bad: str) -> None:
    hx = BAD_CELL_STATES[bad](name == "LSTMCell")
    assert_same_error(lambda package: getattr(package, name)(3, 5)(randn(2, 3), hx))


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (4,), ()])
@pytest.mark.parametrize("name", CELLS)
def test_unbatched_cell_state_errors(name: str, shape: tuple[int, ...]) -> None:
    hx = pair(name == "LSTMCell", randn(shape))
    assert_same_error(lambda package: getattr(package, name)(3, 5)(randn(3), hx))


def test_cell_nonlinearity_error() -> None:
    assert_same_error(lambda package: package.RNNCell(3, 5, nonlinearity="gelu")(randn(2, 3)))


def test_cell_states_of_two_dtypes() -> None:
    """The built-in promotes to the wider one, and the next step then fails."""
    hx = (randn(2, 5), randn(2, 5, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match=r"LSTMCell expects input, state and weights of one dtype.*float64"
    ):
        fusedrnn.LSTMCell(3, 5)(randn(2, 3), hx)


def test_a_step_with_states_of_two_dtypes(backend: str) -> None:
    lstm, x = fusedrnn.LSTMCell(3, 5), randn(2, 3)
    weights = Weights((lstm.weight_ih,), (lstm.weight_hh,), (lstm.bias_ih,), (lstm.bias_hh,))
    for dtype in (torch.float32, torch.float64):  # a call that fits does not let one pass that does not
        state = [randn(2, 5), randn(2, 5, dtype=dtype)]
        if dtype is x.dtype:
            step("lstm", x, state, weights)
        else:
            with pytest.raises(RuntimeError, match="dtype"):
                step("lstm", x, state, weights)


def test_three_states_for_an_unbatched_lstm() -> None:
    with pytest.raises(RuntimeError, match="state of the documented form"):
        fusedrnn.LSTM(3, 5)(randn(4, 3), (randn(1, 5),) * 3)
    with pytest.raises(RuntimeError, match="state of the documented form"):
        fusedrnn.LSTMCell(3, 5)(randn(3), (randn(5),) * 3)


@pytest.mark.parametrize("parameter", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_weight_of_the_wrong_shape(backend: str, name: str, parameter: str) -> None:
    """The built-in reads past the end of some of them."""
    module = getattr(fusedrnn, name)(3, 5)
    attribute = parameter if name in CELLS else f"{parameter}_l0"
    good = getattr(module, attribute)
    for bad in (good[..., :-1], torch.cat((good, good)), good.unsqueeze(0)):
        delattr(module, attribute)
        setattr(module, attribute, bad.detach())
        with pytest.raises(RuntimeError):
            module(randn(2, 3) if name in CELLS else randn(4, 2, 3))


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
@pytest.mark.parametrize("parameter", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_weights_of_two_kinds(
    backend: str, name: str, parameter: str, other: torch.dtype | torch.device
) -> None:
    """Also after a call that fits: the built-in takes some of them."""
    module = getattr(fusedrnn, name)(3, 5)
    x = randn(2, 3) if name in CELLS else randn(4, 2, 3)
    state = torch.zeros(2, 5) if name in CELLS else torch.zeros(1, 2, 5)
    hx = pair("LSTM" in name, state)
    attribute = parameter if name in CELLS else f"{parameter}_l0"
    for hidden in (hx, None):
        good = getattr(module, attribute)
        module(x, hidden)
        delattr(module, attribute)
        setattr(module, attribute, good.detach().to(other))
        with pytest.raises((RuntimeError, ValueError), match=r"dtype|device|is on meta"):
            module(x, hidden)
        delattr(module, attribute)
        setattr(module, attribute, good)


def packed(rows: int, batch_sizes: Any, features: int = 3, **kwargs: Any) -> PackedSequence:
    sizes = batch_sizes if isinstance(batch_sizes, Tensor) else torch.tensor(batch_sizes)
    return PackedSequence(randn(rows, features), sizes, **kwargs)


SILENT_PACKED: dict[str, tuple[Callable[[], PackedSequence], str]] = {
    "features": (
        lambda: packed(8, [3, 3, 2], 4),
        r"input.size\(-1\) must be equal to input_size. Expected 3, got 4",
    ),
    "3-D": (
        lambda: PackedSequence(randn(8, 1, 3), torch.tensor([3, 3, 2])),
        "input must have 2 dimensions, got 3",
    ),
    "1-D": (lambda: PackedSequence(randn(3), torch.tensor([1])), "input must have 2 dimensions, got 1"),
    "rows left over": (lambda: packed(9, [3, 3, 2]), "batch_sizes must add up .* Expected 9, got 8"),
    "rows missing": (lambda: packed(7, [3, 3, 2]), "batch_sizes must add up .* Expected 7, got 8"),
    "increasing": (lambda: packed(8, [2, 3, 3]), "must not increase"),
    "increasing later": (lambda: packed(9, [3, 2, 1, 3]), "must not increase"),
    "zero": (lambda: packed(4, [3, 1, 0]), "must be positive"),
    "negative": (lambda: packed(3, [3, 1, -1]), "must be positive"),
    "no steps": (lambda: packed(0, []), "torch.int64, got a 1-D tensor of torch.float32"),
    "no steps, int64": (
        lambda: packed(0, torch.empty(0, dtype=torch.int64)),
        "Expected sequence length to be larger than 0 in RNN",
    ),
    "int32": (
        lambda: packed(8, torch.tensor([3, 3, 2], dtype=torch.int32)),
        "torch.int64, got .* torch.int32",
    ),
    "float32": (lambda: packed(8, torch.tensor([3.0, 3.0, 2.0])), "torch.int64, got .* torch.float32"),
    "2-D sizes": (lambda: packed(8, [[3], [3], [2]]), "1-D tensor of torch.int64, got a 2-D"),
    "list": (lambda: PackedSequence((randn(8, 3), [3, 3, 2])), "1-D tensor of torch.int64, got list"),
    "sizes on another device": (
        lambda: PackedSequence((randn(8, 3), torch.tensor([3, 3, 2]).to("meta"))),
        "batch_sizes should always be on CPU, got meta",
    ),
    "sorted_indices": (
        lambda: packed(8, [3, 3, 2], sorted_indices=torch.tensor([1, 0])),
        r"sorted_indices must have shape \(3,\), one entry per sequence, got \(2,\)",
    ),
    "unsorted_indices": (
        lambda: packed(8, [3, 3, 2], unsorted_indices=torch.tensor([1, 0, 2, 3])),
        r"unsorted_indices must have shape \(3,\), one entry per sequence, got \(4,\)",
    ),
}


@pytest.mark.parametrize("bad", SILENT_PACKED)
@pytest.mark.parametrize("name", LAYERS)
def test_bad_packed_sequence(name: str, bad: str) -> None:
    make, message = SILENT_PACKED[bad]
    with pytest.raises(RuntimeError, match=message):
        getattr(fusedrnn, name)(3, 5)(make())


@pytest.mark.parametrize(
    "shape", [(2, 4, 5), (2, 2, 5), (2, 1, 5), (1, 3, 5), (4, 3, 5), (2, 3, 4), (2, 5), (5,)]
)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_state_that_does_not_fit_a_packed_sequence(name: str, enforce_sorted: bool, shape: tuple) -> None:
    lengths = [4, 2, 1] if enforce_sorted else [2, 4, 1]
    x = pack_padded_sequence(randn(4, 3, 3), lengths, enforce_sorted=enforce_sorted)
    which = r"hidden\[0\]" if name == "LSTM" else "hidden"
    message = rf"Expected {which} size \(2, 3, 5\), got \[{', '.join(map(str, shape))}\]"
    with pytest.raises(RuntimeError, match=message):
        getattr(fusedrnn, name)(3, 5, 2)(x, pair(name == "LSTM", randn(*shape)))


def test_cell_state_that_does_not_fit_a_packed_sequence() -> None:
    x = pack_padded_sequence(randn(4, 3, 3), [2, 4, 1], enforce_sorted=False)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(2, 3, 5\), got \[2, 4, 5\]"):
        fusedrnn.LSTM(3, 5, 2)(x, (randn(2, 3, 5), randn(2, 4, 5)))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_errors_that_torch_raises_itself(name: str, enforce_sorted: bool) -> None:
    def x(**kwargs: Any) -> PackedSequence:
        lengths = [4, 2, 1] if enforce_sorted else [2, 4, 1]
        return pack_padded_sequence(randn(4, 3, 3, **kwargs), lengths, enforce_sorted=enforce_sorted)

    lstm, good = name == "LSTM", randn(2, 3, 5)
    calls: list[tuple[PackedSequence, tuple]] = [
        (x(dtype=torch.float64), ()),
        (x(dtype=torch.bfloat16), ()),
        (x(dtype=torch.float64), (pair(lstm, good.double()),)),
        (x(), (pair(lstm, good.double()),)),
        (x(), (pair(lstm, good.bfloat16()),)),
        (x(), (1.0,)),
        (x(), ((),)),
        (x(), ((good,),)),
    ]
    for args in calls:
        assert_same_error(lambda package, args=args: getattr(package, name)(3, 5, 2)(args[0], *args[1]))
