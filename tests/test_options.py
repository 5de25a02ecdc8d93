"""The options of the constructors: against plain loops, ONNX Runtime and the modules themselves."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn.plan import Problem, cannot_serve

from . import loops
from .loops import Draws

LAYERS = ("LSTM", "GRU", "RNN")
F64 = torch.float64
# The same sums of some ten terms, grouped otherwise: fp64 roundings of 1.1e-16 through some dozen steps, and
# divided by standard deviations of about a tenth where there is a layer norm.
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}

# name of the module, options
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "peephole": ("LSTM", {"peephole": True}),
    "reset_before": ("GRU", {"reset_after": False}),
    "norm_lstm": ("LSTM", {"layer_norm": True}),
    "norm_gru": ("GRU", {"layer_norm": True}),
    "norm_rnn": ("RNN", {"layer_norm": True}),
    "norm_no_bias": ("LSTM", {"layer_norm": True, "bias": False}),
    "norm_reset_before": ("GRU", {"layer_norm": True, "reset_after": False}),
    "heads_lstm": ("LSTM", {"num_heads": 2}),
    "heads_gru": ("GRU", {"num_heads": 2}),
    "heads_rnn": ("RNN", {"num_heads": 4, "nonlinearity": "relu"}),
    "residual": ("LSTM", {"residual": True}),
    "zoneout_lstm": ("LSTM", {"zoneout": (0.3, 0.2)}),
    "zoneout_gru": ("GRU", {"zoneout": 0.3}),
    "zoneout_proj": ("LSTM", {"zoneout": 0.3, "proj_size": 2}),
    "recurrent_dropout_lstm": ("LSTM", {"recurrent_dropout": 0.4}),
    "recurrent_dropout_gru": ("GRU", {"recurrent_dropout": 0.4}),
    "recurrent_dropout_before": ("GRU", {"recurrent_dropout": 0.4, "reset_after": False}),
    "variational": ("GRU", {"dropout": 0.4, "variational_dropout": True}),
    "peephole_heads_norm": ("LSTM", {"peephole": True, "num_heads": 2, "layer_norm": True}),
    "peephole_proj_residual": ("LSTM", {"peephole": True, "proj_size": 3, "residual": True}),
    "norm_heads_before": ("GRU", {"layer_norm": True, "num_heads": 2, "reset_after": False}),
    "all_lstm": (
        "LSTM",
        {
            "peephole": True,
            "layer_norm": True,
            "num_heads": 2,
            "residual": True,
            "zoneout": 0.2,
            "recurrent_dropout": 0.3,
            "dropout": 0.3,
            "variational_dropout": True,
            "forget_bias": 1.0,
        },
    ),
    "all_gru": (
        "GRU",
        {
            "reset_after": False,
            "layer_norm": True,
            "num_heads": 2,
            "residual": True,
            "zoneout": 0.2,
            "recurrent_dropout": 0.3,
            "dropout": 0.3,
        },
    ),
}
T, B, I, H, L = 3, 2, 3, 4, 2
RESET = torch.tensor([[0, 1], [1, 0], [0, 1]]).bool()
DRAWN = {"zoneout", "recurrent_dropout", "dropout"}


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def as_hx(state: list[Tensor]) -> Any:
    return tuple(state) if len(state) > 1 else state[0]


def make(name: str, options: dict[str, Any], *, layers: int = L, bidirectional: bool = False) -> nn.Module:
    """Every parameter at random, so that none is at a value that hides what it does."""
    module = getattr(fusedrnn, name)(I, H, layers, bidirectional=bidirectional, dtype=F64, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-0.6, 0.6)
    return module


def random_state(module: nn.Module) -> list[Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H] + ([H] if module.mode == "LSTM" else [])
    return [torch.randn(rows, B, width, dtype=F64) for width in widths]


def drawn(module: nn.Module, options: dict[str, Any], seed: int) -> Draws:
    """What the module draws after this seed in training, in the order in which it does."""
    torch.manual_seed(seed)
    D, P = 2 if module.bidirectional else 1, module.proj_size or H
    inputs, recurrent, zoneout = [], [], []
    for k in range(module.num_layers):
        if module.dropout and k:
            steps = () if options.get("variational_dropout") else (T,)
            inputs.append(torch.dropout(torch.ones(*steps, B, D * P, dtype=F64), module.dropout, True))
        if p := options.get("recurrent_dropout"):
            recurrent.append(torch.dropout(torch.ones(D, B, P, dtype=F64), p, True))
        if p := options.get("zoneout"):
            widths = [P, H] if module.mode == "LSTM" else [H]
            rates = p if isinstance(p, tuple) else (p,) * len(widths)
            zoneout.append(
                [torch.empty(T, B, D, w, dtype=F64).bernoulli_(q) for w, q in zip(widths, rates, strict=True)]
            )
    return Draws(inputs, recurrent, zoneout)


def compare(module: nn.Module, options: dict[str, Any], draws: Draws | None, **asked: Any) -> None:
    """Outputs, states and gradients of everything against the loop."""
    x, hx = torch.randn(T, B, I, dtype=F64), random_state(module)
    lengths = asked.get("lengths")

    def ours(x: Tensor, hx: list[Tensor]) -> list[Tensor]:
        given = {**asked, "lengths": None if lengths is None else torch.tensor(lengths)}
        torch.manual_seed(7)
        y, final = module(x, as_hx(hx), **given)
        return [y, *as_tuple(final)]

    def loop(x: Tensor, hx: list[Tensor]) -> list[Tensor]:
        y, final, _ = loops.run(module, x, hx, options=options, draws=draws, **asked)
        return [y, *final]

    results = []
    for run in (ours, loop):
        leaves = [t.detach().requires_grad_() for t in (x, *hx)]
        out = run(leaves[0], leaves[1:])
        torch.manual_seed(3)
        seeds = [torch.randn(t.shape, dtype=F64) for t in out]
        inputs = [*leaves, *module.parameters()]
        results.append(out + list(torch.autograd.grad(out, inputs, seeds)))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop(case: str) -> None:
    """In eval mode, and in training with what it draws."""
    name, options = CASES[case]
    module = make(name, options, bidirectional=True)
    compare(module.eval(), options, None)
    if DRAWN & options.keys():
        compare(module.train(), options, drawn(module, options, 7))


@pytest.mark.parametrize("case", CASES)
def test_with_lengths_and_resets(case: str) -> None:
    name, options = CASES[case]
    module = make(name, options, bidirectional=True).eval()
    compare(module, options, None, lengths=[3, 2], reset=RESET)


def test_one_mask_for_a_sequence_whatever_its_resets() -> None:
    """Recurrent and variational dropout draw for a sample, and its pieces share what was drawn."""
    options = {"recurrent_dropout": 0.4, "dropout": 0.4, "variational_dropout": True}
    for name in LAYERS:
        module = make(name, options, bidirectional=True)
        compare(module, options, drawn(module, options, 7), lengths=[3, 2], reset=RESET)


@pytest.mark.parametrize("case", CASES)
def test_packed(case: str) -> None:
    name, options = CASES[case]
    module = make(name, options, bidirectional=True).eval()
    x, hx, lengths = torch.randn(T, B, I, dtype=F64), random_state(module), [2, 3]
    output, final = module(pack_padded_sequence(x, lengths, enforce_sorted=False), as_hx(hx))
    expected = loops.run(module, x, hx, options=options, lengths=lengths)
    torch.testing.assert_close(pad_packed_sequence(output)[0], expected.y, **TOLERANCE)
    for a, b in zip(as_tuple(final), expected.final, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    module.train()  # draws are for packed rows; nothing to compare with but itself
    torch.manual_seed(1)
    first, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.manual_seed(1)
    again, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert torch.equal(first.data, again.data)


@pytest.mark.parametrize("case", CASES)
def test_states_of_all_steps(case: str) -> None:
    name, options = CASES[case]
    module = make(name, options, bidirectional=True).eval()
    x, hx = torch.randn(T, B, I, dtype=F64), random_state(module)
    _, _, states = module(x, as_hx(hx), return_all_states=True)
    expected = loops.run(module, x, hx, options=options).states
    for a, b in zip(as_tuple(states), expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 9])
def test_peephole_kernels(B: int, dtype: torch.dtype) -> None:
    """The CPU kernels against the reference in fp64, at sizes on both sides of a vector."""
    # Relative L2, as for the other cells: unit roundoff times sums of some ten terms; 16-bit: inputs, h and
    # results are each rounded to 8 bits.
    tolerance = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for H, P in ((1, 0), (19, 0), (40, 7)):
        module = fusedrnn.LSTM(5, H, 1, bidirectional=True, peephole=True, proj_size=P, dtype=dtype)
        exact = copy.deepcopy(module).double()
        x = torch.randn(6, B, 5, dtype=dtype)
        lengths = [6, 4, 4, 3, 2, 2, 1, 1, 1][:B]
        for given in (x, pack_padded_sequence(x, lengths)):
            results = []
            for backend, m in (("cpu", module), ("reference", exact)):
                to = given.to(m.weight_ih_l0.dtype)
                with fusedrnn.use_backend(backend):
                    y, (h, c), (_, all_c) = m(to, return_all_states=True)
                    with torch.no_grad():
                        plain, _ = m(to)
                y, plain = (getattr(t, "data", t) if given is not x else t for t in (y, plain))
                assert torch.equal(y, plain)
                torch.manual_seed(2)
                seeds = [torch.randn(t.shape).to(dtype).to(t.dtype) for t in (y, h, c, all_c)]
                grads = torch.autograd.grad((y, h, c, all_c), list(m.parameters()), seeds)
                results.append([y, h, c, all_c, *grads])
            for i, (a, b) in enumerate(zip(*results, strict=True)):
                assert (a.double() - b).norm() <= tolerance * b.norm(), f"result {i}"


def test_peephole_under_vmap() -> None:
    """The kernels have no rule for it and leave it to the reference."""
    module = make("LSTM", {"peephole": True})
    x = torch.randn(4, T, B, I, dtype=F64)
    y = torch.func.vmap(lambda x: module(x)[0])(x)
    torch.testing.assert_close(y, torch.stack([module(one)[0] for one in x]), **TOLERANCE)


@pytest.mark.parametrize("case", ["peephole", "reset_before", "norm_lstm", "heads_gru"])
def test_derivatives_of_second_order(case: str) -> None:
    name, options = CASES[case]
    module = make(name, options, layers=1).eval()
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))[0]

    inputs = [torch.randn(2, 1, I, dtype=F64), *(p.detach() for p in module.parameters())]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_sixteen_bits(case: str) -> None:
    """bf16 against fp64: h and the outputs are rounded to 8 bits at every step, all else is fp32."""
    name, options = CASES[case]
    module = make(name, options).eval()
    x = torch.randn(T, B, I, dtype=F64).bfloat16()
    half = copy.deepcopy(module).bfloat16()
    module.load_state_dict(half.state_dict())  # the same numbers
    y, _ = half(x)
    expected, _ = module(x.double())
    assert y.dtype == torch.bfloat16
    assert float((y.double() - expected).norm() / expected.norm()) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = copy.deepcopy(module).float()(x.float())
    assert float((mixed.double() - expected).norm() / expected.norm()) < 0.03


def onnx_run(
    operator: str, inputs: dict[str, np.ndarray | None], outputs: int, **attributes: Any
) -> list[np.ndarray]:
    names = [name if value is not None else "" for name, value in inputs.items()]
    given = {name: value for name, value in inputs.items() if value is not None}
    results = [f"out{i}" for i in range(outputs)]
    node = helper.make_node(operator, names, results, **attributes)
    types = {np.dtype("float32"): TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "cell",
        [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in given.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(results, given)


def onnx_weights(module: nn.Module, order: tuple[int, ...]) -> dict[str, np.ndarray | None]:
    """X to initial state as ONNX has them, gates in its order."""

    def read(kind: str) -> list[Tensor]:
        suffixes = ("", "_reverse") if module.bidirectional else ("",)
        return [getattr(module, f"{kind}_l0{s}").detach() for s in suffixes]

    def reordered(kind: str) -> Tensor:
        return torch.stack([torch.cat([w.chunk(len(order))[g] for g in order]) for w in read(kind)])

    return {
        "W": reordered("weight_ih").numpy(),
        "R": reordered("weight_hh").numpy(),
        "B": torch.cat((reordered("bias_ih"), reordered("bias_hh")), 1).numpy(),
        "sequence_lens": None,
    }


# fp32: unit roundoff 6e-8, sums of some ten terms, and onnxruntime's approximate tanh and sigmoid.
FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_peephole_is_that_of_onnx(bidirectional: bool) -> None:
    module = make("LSTM", {"peephole": True}, layers=1, bidirectional=bidirectional).float()
    x, (h, c) = torch.randn(T, B, I), (s.float() for s in random_state(module))
    y, (h_n, c_n) = module(x, (h, c))
    weights = onnx_weights(module, (0, 3, 1, 2))  # i o f c
    suffixes = ("", "_reverse") if bidirectional else ("",)
    # P: i o f
    p = torch.stack([getattr(module, f"peephole_l0{s}").detach()[[0, 2, 1]].flatten() for s in suffixes])
    inputs = {"X": x.numpy(), **weights, "initial_h": h.numpy(), "initial_c": c.numpy(), "P": p.numpy()}
    direction = "bidirectional" if bidirectional else "forward"
    ort_y, ort_h, ort_c = onnx_run("LSTM", inputs, 3, hidden_size=H, direction=direction)
    torch.testing.assert_close(y, torch.tensor(ort_y).transpose(1, 2).flatten(2), **FP32)
    torch.testing.assert_close(h_n, torch.tensor(ort_h), **FP32)
    torch.testing.assert_close(c_n, torch.tensor(ort_c), **FP32)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_is_that_of_onnx(reset_after: bool, bidirectional: bool) -> None:
    module = make("GRU", {"reset_after": reset_after}, layers=1, bidirectional=bidirectional).float()
    x, (h,) = torch.randn(T, B, I), (s.float() for s in random_state(module))
    y, h_n = module(x, h)
    inputs = {"X": x.numpy(), **onnx_weights(module, (1, 0, 2)), "initial_h": h.numpy()}  # z r h
    direction = "bidirectional" if bidirectional else "forward"
    ort_y, ort_h = onnx_run(
        "GRU", inputs, 2, hidden_size=H, direction=direction, linear_before_reset=int(reset_after)
    )
    torch.testing.assert_close(y, torch.tensor(ort_y).transpose(1, 2).flatten(2), **FP32)
    torch.testing.assert_close(h_n, torch.tensor(ort_h), **FP32)


def test_parameters() -> None:
    module = fusedrnn.LSTM(
        I, H, 2, bidirectional=True, peephole=True, layer_norm=True, learn_initial_state=True, proj_size=2
    )
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    plain = {
        name: tuple(p.shape)
        for name, p in nn.LSTM(I, H, 2, bidirectional=True, proj_size=2).named_parameters()
    }
    extra = {name: shape for name, shape in shapes.items() if name not in plain}
    assert {name: shapes[name] for name in plain} == plain
    assert extra == {
        **{f"peephole_l{k}{s}": (3, H) for k in (0, 1) for s in ("", "_reverse")},
        **{f"norm_ih_l{k}{s}": (4 * H,) for k in (0, 1) for s in ("", "_reverse")},
        **{f"norm_hh_l{k}{s}": (4 * H,) for k in (0, 1) for s in ("", "_reverse")},
        **{f"norm_c_l{k}{s}": (2, H) for k in (0, 1) for s in ("", "_reverse")},
        "initial_h": (4, 2),
        "initial_c": (4, H),
    }
    for _ in range(2):
        assert all(module.get_parameter(f"norm_{kind}_l1").eq(1).all() for kind in ("ih", "hh"))
        assert module.norm_c_l0.tolist() == [[1.0] * H, [0.0] * H]
        assert not module.initial_h.any()
        assert 0 < module.peephole_l0.abs().max() <= H**-0.5
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(7.0)
        module.reset_parameters()
    heads = fusedrnn.GRU(I, H, num_heads=2, dtype=F64)
    assert heads.weight_hh_l0.shape == (3 * H, H // 2)
    assert heads.weight_ih_l0.shape == (3 * H, I)


def test_forget_bias() -> None:
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True, forget_bias=1.5)
    torch.manual_seed(0)
    for _ in range(2):
        for k in (0, 1):
            for s in ("", "_reverse"):
                both = getattr(module, f"bias_ih_l{k}{s}") + getattr(module, f"bias_hh_l{k}{s}")
                assert both[H : 2 * H].eq(1.5).all()
                assert both[:H].ne(1.5).all()
        module.reset_parameters()
    # All else is as without: the option draws nothing.
    torch.manual_seed(1)
    ours = fusedrnn.LSTM(I, H, forget_bias=1.0)
    torch.manual_seed(1)
    theirs = nn.LSTM(I, H)
    assert torch.equal(ours.weight_hh_l0, theirs.weight_hh_l0)
    assert torch.equal(ours.bias_hh_l0[2 * H :], theirs.bias_hh_l0[2 * H :])


@pytest.mark.parametrize("name", LAYERS)
def test_learned_initial_state(name: str) -> None:
    module = make(name, {"learn_initial_state": True}, bidirectional=True)
    learned = [module.initial_h, *([module.initial_c] if name == "LSTM" else [])]
    x = torch.randn(T, B, I, dtype=F64)
    given = [s.detach()[:, None].expand(-1, B, -1).contiguous() for s in learned]
    inputs = list(module.parameters())
    for asked in ({}, {"reset": RESET}, {"lengths": [2, 0]}, {"lengths": [3, 2], "reset": RESET}):
        lengths = asked.get("lengths")
        torch_asked = {**asked, "lengths": None if lengths is None else torch.tensor(lengths)}
        y, final = module(x, **torch_asked)
        start = [s[:, None].expand(-1, B, -1) for s in learned]
        expected = loops.run(module, x, start, reset_state=start, **asked)
        torch.testing.assert_close(y, expected.y, **TOLERANCE)
        grads = torch.autograd.grad(y.square().sum() + sum(f.sum() for f in as_tuple(final)), inputs)
        loss = expected.y.square().sum() + sum(f.sum() for f in expected.final)
        for a, b in zip(grads, torch.autograd.grad(loss, inputs), strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
    step, _ = module(x[:1], reset=torch.ones(1, B, dtype=torch.bool))
    torch.testing.assert_close(step, module(x[:1])[0], **TOLERANCE)
    # A given state is what counts, also after a reset where one is given for it.
    zeros = as_hx([torch.zeros_like(s) for s in given])
    plain = getattr(nn, name)(I, H, L, bidirectional=True, dtype=F64)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("initial")})
    torch.testing.assert_close(module(x, zeros)[0], plain(x)[0], **TOLERANCE)
    packed = pack_padded_sequence(x, [2, 3], enforce_sorted=False)
    torch.testing.assert_close(module(packed)[0].data, plain(packed, as_hx(given))[0].data, **TOLERANCE)


def test_variational_dropout_is_one_mask() -> None:
    """Without recurrent weights and for one input a step differs from another by its mask alone."""
    x = torch.randn(1, B, I, dtype=F64).expand(T, B, I)
    for variational in (True, False):
        module = make("RNN", {"dropout": 0.5, "variational_dropout": variational})
        with torch.no_grad():
            module.weight_hh_l0.zero_()
            module.weight_hh_l1.zero_()
            y, _ = module(x)
        assert (y == y[0]).all() == variational


def test_draws_have_their_rates() -> None:
    """Zoneout keeps and recurrent dropout drops as often as asked, within five standard deviations."""
    torch.manual_seed(0)
    module = fusedrnn.RNN(1, 64, zoneout=0.3, dtype=F64)
    with torch.no_grad():
        y, _ = module(torch.randn(200, 8, 1, dtype=F64), torch.full((1, 8, 64), 7.0, dtype=F64))
    kept = torch.cat((torch.full((1, 8, 64), 7.0, dtype=F64), y))
    share = (kept[1:] == kept[:-1]).double().mean()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / y.numel()) ** 0.5
    dropped = fusedrnn.RNN(1, 4096, recurrent_dropout=0.3, bias=False, nonlinearity="relu", dtype=F64)
    with torch.no_grad():
        dropped.weight_hh_l0.copy_(torch.eye(4096))
        h, _ = dropped(torch.zeros(1, 1, 1, dtype=F64), torch.ones(1, 1, 4096, dtype=F64))
    assert set(h.unique().tolist()) <= {0.0, 1 / 0.7}
    assert abs((h == 0).double().mean() - 0.3) < 5 * (0.3 * 0.7 / 4096) ** 0.5


def test_zoneout_of_everything_keeps_the_state() -> None:
    for name in LAYERS:
        module = make(name, {"zoneout": 1.0})
        hx = random_state(module)
        for m in (module.train(), module.eval()):
            _, final = m(torch.randn(T, B, I, dtype=F64), as_hx(hx))
            for a, b in zip(as_tuple(final), hx, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_copies_and_checkpoints(case: str) -> None:
    name, options = CASES[case]
    module = make(name, {**options, "learn_initial_state": True}).eval()
    x = torch.randn(T, B, I, dtype=F64)
    expected, _ = module(x)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    fresh = make(name, {**options, "learn_initial_state": True}).eval()
    assert not torch.equal(fresh(x)[0], expected)
    assert str(fresh.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    for other in (
        fresh,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(x)[0], expected)
        assert repr(other) == repr(module)
    for option, value in options.items():
        if option not in ("bias", "dropout", "proj_size", "nonlinearity"):
            assert f"{option}={value}" in repr(module)


def test_repr() -> None:
    assert (
        repr(fusedrnn.LSTM(3, 4, peephole=True, zoneout=(0.1, 0.0)))
        == "LSTM(3, 4, peephole=True, zoneout=(0.1, 0.0))"
    )
    assert repr(fusedrnn.GRU(3, 4, 2, reset_after=False)) == "GRU(3, 4, num_layers=2, reset_after=False)"
    assert repr(fusedrnn.GRU(3, 4, zoneout=0.0, num_heads=1)) == "GRU(3, 4)"


WRONG: list[tuple[str, dict[str, Any], type, str]] = [
    ("LSTM", {"num_heads": 2, "proj_size": 2}, ValueError, "num_heads does not go with proj_size"),
    ("LSTM", {"num_heads": 3}, ValueError, "hidden_size must be a multiple of num_heads, got 4 and 3"),
    ("LSTM", {"num_heads": 0}, ValueError, "num_heads must be greater than zero"),
    ("LSTM", {"num_heads": 2.0}, TypeError, "num_heads should be of type int, got float"),
    ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias needs bias=True"),
    ("LSTM", {"forget_bias": "1"}, TypeError, "forget_bias should be a number, got str"),
    ("LSTM", {"peephole": 1}, TypeError, "peephole should be of type bool, got int"),
    ("LSTM", {"reset_after": False}, TypeError, "unexpected keyword argument 'reset_after'"),
    ("GRU", {"peephole": True}, TypeError, "unexpected keyword argument 'peephole'"),
    ("RNN", {"forget_bias": 1.0}, TypeError, "unexpected keyword argument 'forget_bias'"),
    ("GRU", {"residual": True}, ValueError, "residual needs num_layers of two or more"),
    ("GRU", {"variational_dropout": True}, ValueError, "variational_dropout needs num_layers of two or more"),
    (
        "GRU",
        {"recurrent_dropout": 1.0},
        ValueError,
        r"recurrent_dropout should be a number in \[0, 1\), got 1.0",
    ),
    ("GRU", {"recurrent_dropout": True}, TypeError, "recurrent_dropout should be a number, got bool"),
    ("GRU", {"zoneout": -0.1}, ValueError, r"zoneout should be a number in \[0, 1\], got -0.1"),
    ("GRU", {"zoneout": (0.1, 0.2)}, ValueError, "one number or one for each of 1 states, got 2"),
    ("LSTM", {"zoneout": (0.1,)}, ValueError, "one number or one for each of 2 states, got 1"),
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), WRONG)
def test_what_makes_no_sense(name: str, options: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        getattr(fusedrnn, name)(I, H, **options)


# Option, module, arguments, and the backends that serve it.
SERVED: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("peephole", "LSTM", {"peephole": True}, ["cpu", "reference"]),
    ("reset_after", "GRU", {"reset_after": False}, ["reference"]),
    ("recurrent_dropout", "GRU", {"recurrent_dropout": 0.3}, ["reference"]),
    ("zoneout", "LSTM", {"zoneout": (0.3, 0.2)}, ["reference"]),
    ("layer_norm", "LSTM", {"layer_norm": True}, ["reference"]),
    ("forget_bias", "LSTM", {"forget_bias": 1.0}, ["cpu", "emulator", "triton", "torch", "reference"]),
    ("num_heads", "LSTM", {"num_heads": 2}, ["cpu", "emulator", "triton", "reference"]),
    ("residual", "GRU", {"residual": True}, ["cpu", "emulator", "triton", "torch", "reference"]),
    (
        "variational_dropout",
        "RNN",
        {"variational_dropout": True, "dropout": 0.3},
        ["cpu", "emulator", "triton", "torch", "reference"],
    ),
    (
        "learn_initial_state",
        "LSTM",
        {"learn_initial_state": True},
        ["cpu", "emulator", "triton", "torch", "reference"],
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "backends"),
    [pytest.param(*row, marks=pytest.mark.feature(f, backends=row[2]), id=f) for f, *row in SERVED],
)
def test_every_backend_that_can(name: str, options: dict[str, Any], backends: list[str]) -> None:
    module = make(name, options, layers=2)
    x = torch.randn(T, B, I, dtype=F64)
    results = []
    for backend in backends:
        torch.manual_seed(1)
        with fusedrnn.use_backend(backend):
            y, _ = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for result in results[:-1]:
        for a, b in zip(result, results[-1], strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        pytest.param(
            row[0],
            f,
            row[1][f],
            marks=pytest.mark.feature(f, nn="no", backends=[]),
            id=f"{f} of the built-in",
        )
        for f, *row in SERVED
    ],
)
def test_the_builtin_has_none(name: str, option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        getattr(nn, name)(I, H, 2, **{option: value})


@pytest.mark.parametrize("case", CASES)
def test_backends_that_cannot_say_so(case: str) -> None:
    name, options = CASES[case]
    module = make(name, options)
    x = torch.randn(T, B, I, dtype=F64)
    within = not set(options) - {
        "residual",
        "dropout",
        "variational_dropout",
        "num_heads",
        "bias",
        "forget_bias",
        "nonlinearity",
    }
    if within:  # nothing but other weights and sums of layers
        with fusedrnn.use_backend("emulator"):
            y, _ = module.eval()(x)
        torch.testing.assert_close(y, module(x)[0], **TOLERANCE)
        return
    with fusedrnn.use_backend("emulator"), pytest.raises(RuntimeError, match=r"its kernels have no [a-z]"):
        module(x)
    with fusedrnn.use_backend("torch"), pytest.raises(RuntimeError, match=r"the built-in has no [a-z]"):
        module(x)


def test_reasons_name_the_options() -> None:
    problem = Problem(
        cell="lstm",
        device="cuda",
        dtype=torch.float32,
        T=4,
        B=2,
        I=3,
        H=5,
        P=0,
        reverse=(False,),
        training=True,
        packed=False,
        autocast=False,
        transformed=False,
        options=("layer_norm", "zoneout"),
    )
    assert cannot_serve("cuda", problem) == "its kernels have no layer_norm, zoneout"
    assert cannot_serve("triton", problem) == "its kernels have no layer_norm, zoneout"
    assert cannot_serve("torch", problem) == "the built-in has no layer_norm, zoneout"
    assert cannot_serve("reference", problem) == ""


def test_what_knows_the_builtin_alone_refuses() -> None:
    module = fusedrnn.LSTM(I, H, peephole=True)
    x = torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match=r"TorchScript cannot trace what torch\.nn does not have"):
        torch.jit.trace(module, x)
    reverted, report = fusedrnn.revert(nn.Sequential(module), report=True)
    assert reverted[0] is module
    assert type(module) is fusedrnn.LSTM
    assert report.left == {"0": "the built-in has no peephole=True"}
