"""Forward mode, vmap and function transforms of the modules, against loops over plain calls and torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

F64 = torch.float64
# Constructor arguments of small modules that have everything: two layers, both directions.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_proj": ("LSTM", {"num_layers": 2, "proj_size": 2}),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "rnn": ("RNN", {"bidirectional": True, "batch_first": True}),
}
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def build(kind: str, package: Any = fusedrnn) -> nn.Module:
    name, options = LAYERS.get(kind, (kind, {}))
    torch.manual_seed(1)
    return getattr(package, name)(3, 4, dtype=F64, **options)


def sample(kind: str) -> Tensor:
    return torch.randn((5, 3) if kind in CELLS else (4, 5, 3), dtype=F64)


def outputs(module: nn.Module, flat: Callable) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: tuple(flat(module(x)))


@pytest.mark.feature("forward mode", backends=["reference"])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_forward_mode(kind: str, flat: Callable) -> None:
    module, x = build(kind), sample(kind)
    tangent, tangents = torch.randn_like(x), {n: torch.randn_like(p) for n, p in module.named_parameters()}
    parameters = dict(module.named_parameters())

    def run(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(functional_call(module, parameters, (x,))))

    values, derivatives = jvp(run, (parameters, x), (tangents, tangent))
    expected, pull = vjp(run, parameters, x)
    for a, b in zip(values, expected, strict=True):
        torch.testing.assert_close(a, b)
    # <v, J u> = <J^T v, u>
    seeds = tuple(torch.randn_like(v) for v in values)
    by_name, dx = pull(seeds)
    forward = sum((s * d).sum() for s, d in zip(seeds, derivatives, strict=True))
    backward = (dx * tangent).sum() + sum((by_name[n] * tangents[n]).sum() for n in by_name)
    torch.testing.assert_close(forward, backward)
    assert forward.abs() > 1e-3


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_vmap_over_inputs(kind: str, flat: Callable) -> None:
    module = build(kind)
    xs = torch.stack([sample(kind) for _ in range(3)], -1)
    together = vmap(outputs(module, flat), in_dims=-1)(xs)
    alone = [flat(module(x)) for x in xs.unbind(-1)]
    for a, *b in zip(together, *alone, strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_vmap_over_inputs_states_and_packed_rows(name: str, flat: Callable) -> None:
    module = getattr(fusedrnn, name)(3, 4, dtype=F64)
    packed = pack_padded_sequence(torch.randn(4, 3, 3, dtype=F64), [2, 4, 1], enforce_sorted=False)
    rows = torch.stack([packed.data, 2 * packed.data])
    h, c = torch.randn(2, 2, 1, 3, 4, dtype=F64)

    def run(rows: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        state = (h, c) if name == "LSTM" else h
        return tuple(flat(module(PackedSequence(rows, *packed[1:]), state)))

    together = vmap(run)(rows, h, c)
    for i in range(2):
        for a, b in zip(together, run(rows[i], h[i], c[i]), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_per_sample_gradients(kind: str, flat: Callable) -> None:
    """vmap(grad): each sample's own gradient, for each sample as an unbatched call."""
    module, x = build(kind), sample(kind)
    dim = 0 if kind in CELLS else 1
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in flat(functional_call(module, parameters, (x,))))

    together = vmap(grad(loss), in_dims=(None, dim))(parameters, x)
    for i, alone in enumerate(x.unbind(dim)):
        for a, b in zip(
            together.values(),
            torch.autograd.grad(loss(parameters, alone), list(parameters.values())),
            strict=True,
        ):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_ensemble(kind: str, flat: Callable) -> None:
    """vmap over stacked parameters, each member on its own input or all on one; values and gradients."""
    members = [build(kind) for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.mul_(1 + i)
    parameters, _ = stack_module_state(members)
    xs = torch.stack([sample(kind) for _ in members])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in flat(functional_call(members[0], parameters, (x,))))

    for x, dim in ((xs, 0), (xs[0], None)):
        together = vmap(grad(loss), in_dims=(0, dim))(parameters, x)
        for i, member in enumerate(members):
            member.zero_grad()
            sum(t.square().sum() for t in flat(member(xs[i] if dim == 0 else x))).backward()
            for name, p in member.named_parameters():
                torch.testing.assert_close(together[name][i], p.grad)
    # Trained in one go: the gradient of the stacked parameters.
    for a in parameters.values():
        a.requires_grad_()
    vmap(loss)(parameters, xs).sum().backward()
    for i, member in enumerate(members):
        for (name, p), b in zip(
            member.named_parameters(),
            torch.autograd.grad(loss(dict(member.named_parameters()), xs[i]), list(member.parameters())),
            strict=True,
        ):
            assert p.shape == b.shape
            torch.testing.assert_close(parameters[name].grad[i], b)


@pytest.mark.feature(
    "forward mode", nn="not by oneDNN, which CPU tensors of an LSTM get", backends=["reference"]
)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_second_order_transforms(name: str) -> None:
    """Forward over reverse over a layer, and both Jacobians, as torch.nn has them."""
    ours, theirs = getattr(fusedrnn, name)(2, 3, dtype=F64), getattr(nn, name)(2, 3, dtype=F64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 1, 2, dtype=F64)
    with torch.backends.mkldnn.flags(enabled=False):  # the built-in's oneDNN kernel has no forward mode
        for transform in (hessian, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacfwd(f))):
            a, b = (transform(lambda x, m=m: m(x)[0].square().sum())(x) for m in (ours, theirs))
            torch.testing.assert_close(a, b)
            assert a.abs().sum() > 0.01


@pytest.mark.parametrize("backend", ["cpu", "emulator", "reference"], indirect=True)
def test_vectorized_backward(backend: str) -> None:
    """Many gradients of one forward pass that ran outside vmap, to the second order."""
    module = fusedrnn.LSTM(2, 3, bidirectional=True, dtype=F64)
    x = torch.randn(2, 2, 2, dtype=F64, requires_grad=True)
    weight = module.weight_hh_l0

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y, (_, c) = module(x)
        return y, c

    jacobian = torch.autograd.functional.jacobian
    for a, b in zip(jacobian(run, x, vectorize=True), jacobian(run, x), strict=True):
        torch.testing.assert_close(a, b)
    penalty = [
        torch.autograd.functional.hessian(lambda x: run(x)[0].square().sum(), x, vectorize=v)
        for v in (True, False)
    ]
    torch.testing.assert_close(*penalty)
    y = run(x)[0]
    seeds = torch.randn(3, *y.shape, dtype=F64)
    together = vmap(lambda s: torch.autograd.grad(y, (x, weight), s, retain_graph=True))(seeds)
    alone = [torch.autograd.grad(y, (x, weight), s, retain_graph=True) for s in seeds]
    for a, *b in zip(together, *alone, strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    assert torch.autograd.gradcheck(run, x, check_batched_grad=True)


def test_random_transforms_of_dropout() -> None:
    """Dropout between layers obeys vmap's rules for randomness."""
    module = fusedrnn.GRU(3, 4, 2, dropout=0.5)
    xs = torch.randn(4, 2, 3).expand(3, 4, 2, 3)
    same = vmap(lambda x: module(x)[0], randomness="same")(xs)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda x: module(x)[0], randomness="different")(xs)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: module(x)[0])(xs)
