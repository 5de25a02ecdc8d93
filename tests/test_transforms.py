"""Forward mode, vmap and function transforms of the modules, against loops over plain calls and torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn

from .problems import served

F64 = torch.float64
# Constructor arguments of small modules that have everything: two layers, both directions.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_proj": ("LSTM", {"num_layers": 2, "proj_size": 2}),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "rnn": ("RNN", {"bidirectional": True, "batch_first": True}),
}
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
OURS = ("cpu", "emulator", "reference")
NO_BATCHING = "Batching rule not implemented for aten::"


class Calls(TorchDispatchMode):
    """The calls of our ops: name and number of recurrences."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fusedrnn"):
            self.ops.append((func._schema.name.partition("::")[2], len(args[4])))
        return func(*args, **(kwargs or {}))


def build(kind: str, package: Any = fusedrnn) -> nn.Module:
    name, options = LAYERS.get(kind, (kind, {}))
    torch.manual_seed(1)
    return getattr(package, name)(3, 4, dtype=F64, **options)


def sample(kind: str) -> Tensor:
    return torch.randn((5, 3) if kind in CELLS else (4, 5, 3), dtype=F64)


def outputs(module: nn.Module, flat: Callable) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: tuple(flat(module(x)))


@pytest.mark.feature("double backward", nn="yes")
@pytest.mark.feature("backward in eval mode", nn="on a CPU")
@pytest.mark.parametrize(
    ("kind", "backend"), served([*LAYERS, *CELLS], ["rnn", "GRUCell"]), indirect=["backend"]
)
def test_gradient_penalty(kind: str, backend: str, flat: Callable) -> None:
    """As a critic of a generative model is trained, in training mode and in eval mode."""
    results = []
    for module, training in ((build(kind), True), (build(kind), False), (build(kind, nn), True)):
        module.train(training)
        torch.manual_seed(4)
        x = sample(kind).requires_grad_()
        (g,) = torch.autograd.grad(sum(t.sum() for t in flat(module(x))), x, create_graph=True)
        ((g.norm(2, -1) - 1).square().mean()).backward()
        results.append([g.detach(), x.grad, *(p.grad for p in module.parameters())])
        assert x.grad.abs().sum() > 1e-3
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.feature("forward mode", backends=["reference"])
@pytest.mark.usefixtures("free_choice")
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


@pytest.mark.feature("vmap over inputs")
@pytest.mark.parametrize(
    ("kind", "backend"), served([*LAYERS, *CELLS], ["rnn", "LSTMCell"], OURS), indirect=["backend"]
)
def test_vmap_over_inputs(kind: str, backend: str, flat: Callable) -> None:
    module = build(kind)
    xs = torch.stack([sample(kind) for _ in range(3)], -1)
    together = vmap(outputs(module, flat), in_dims=-1)(xs)
    alone = [flat(module(x)) for x in xs.unbind(-1)]
    for a, *b in zip(together, *alone, strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.feature("vmap over inputs", nn="no")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_examples_are_sequences_of_one_batch(name: str) -> None:
    """Two levels of vmap: one launch for all examples; torch.nn has no rule at all."""
    ours, theirs = getattr(fusedrnn, name)(3, 4, dtype=F64), getattr(nn, name)(3, 4, dtype=F64)
    xs = torch.randn(2, 3, 4, 5, 3, dtype=F64)
    with Calls() as calls, torch.no_grad():
        together = vmap(vmap(lambda x: ours(x)[0]), in_dims=1, out_dims=1)(xs)
    assert calls.ops == [("sequence", 1)]
    torch.testing.assert_close(together[1, 2], ours(xs[1, 2])[0])
    with pytest.raises(RuntimeError, match=NO_BATCHING):
        vmap(lambda x: theirs(x)[0])(xs[0])


@pytest.mark.feature("vmap over inputs")
@pytest.mark.parametrize("backend", ["cpu", "emulator"], indirect=True)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_vmap_over_inputs_states_and_packed_rows(name: str, backend: str, flat: Callable) -> None:
    module = getattr(fusedrnn, name)(3, 4, bidirectional=True, dtype=F64)
    packed = pack_padded_sequence(torch.randn(4, 3, 3, dtype=F64), [2, 4, 1], enforce_sorted=False)
    rows = torch.stack([packed.data, 2 * packed.data])
    h, c = torch.randn(2, 2, 2, 3, 4, dtype=F64)

    def run(rows: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        state = (h, c) if name == "LSTM" else h
        return tuple(flat(module(PackedSequence(rows, *packed[1:]), state)))

    def loss(rows: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return sum(t.square().sum() for t in run(rows, h, c))

    for function in (run, grad(loss, (0, 1))):
        together = vmap(function)(rows, h, c)
        for i in range(2):
            for a, b in zip(together, function(rows[i], h[i], c[i]), strict=True):
                torch.testing.assert_close(a[i], b)
    together = vmap(run, (None, 0, None))(rows[0], h, c[0])  # rows and c are the same for all
    for a, b in zip(together, run(rows[0], h[1], c[0]), strict=True):
        torch.testing.assert_close(a[1], b)


def test_batch_sizes_are_the_same_for_all() -> None:
    module, rows = fusedrnn.GRU(3, 4), torch.randn(3, 3)
    layer = (rows, [torch.zeros(1, 2, 4)], *([p] for p in module.parameters()), [], [False])
    with pytest.raises(RuntimeError, match="batch_sizes must be the same for all examples of vmap"):
        vmap(lambda s: torch.ops.fusedrnn.sequence(1, *layer, s, False)[0])(torch.tensor([[2, 1], [2, 1]]))


@pytest.mark.feature("per-sample gradients")
@pytest.mark.parametrize(
    ("kind", "backend"), served([*LAYERS, *CELLS], ["LSTMCell"], OURS), indirect=["backend"]
)
def test_per_sample_gradients(kind: str, backend: str, flat: Callable) -> None:
    """vmap(grad): each sample's own gradient, for each sample as an unbatched call."""
    module, x = build(kind), sample(kind)
    dim = 0 if kind in CELLS else 1
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in flat(functional_call(module, parameters, (x,))))

    with Calls() as calls:
        together = vmap(grad(loss), in_dims=(None, dim))(parameters, x)
    if backend != "reference":
        layers, N = getattr(module, "num_layers", 1), 1 + getattr(module, "bidirectional", False)
        assert calls.ops == [("sequence_forward", N)] * layers + [("sequence_backward", 5 * N)] * layers
    for i, alone in enumerate(x.unbind(dim)):
        for a, b in zip(
            together.values(),
            torch.autograd.grad(loss(parameters, alone), list(parameters.values())),
            strict=True,
        ):
            torch.testing.assert_close(a[i], b)


@pytest.mark.feature("per-sample gradients", nn="only an LSTM in fp32 on a CPU")
def test_per_sample_gradients_of_torch_nn() -> None:
    for name, dtype in (("LSTM", torch.float32), ("LSTM", F64), ("GRU", F64), ("RNN", F64)):
        ours, theirs = getattr(fusedrnn, name)(3, 4, dtype=dtype), getattr(nn, name)(3, 4, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        parameters, x = dict(theirs.named_parameters()), torch.randn(5, 2, 3, dtype=dtype)

        def loss(parameters: dict[str, Tensor], x: Tensor, module: nn.Module) -> Tensor:
            return functional_call(module, parameters, (x,))[0].square().sum()

        per_sample = vmap(grad(loss), (None, 1, None))
        result = per_sample(parameters, x, ours)
        if dtype == F64:
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                per_sample(parameters, x, theirs)
            continue
        for key, expected in per_sample(parameters, x, theirs).items():
            torch.testing.assert_close(result[key], expected)


def stacked(kind: str) -> tuple[list[nn.Module], dict[str, Tensor]]:
    """Three modules of different parameters, and these stacked."""
    members = [build(kind) for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.mul_(1 + i)
    return members, stack_module_state(members)[0]


@pytest.mark.feature("ensembles")
@pytest.mark.parametrize("backend", ["cpu", "emulator", "reference"], indirect=True)
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_ensemble(kind: str, backend: str, flat: Callable) -> None:
    """vmap over stacked parameters, each member on its own input or all on one; values and gradients."""
    members, parameters = stacked(kind)
    xs = torch.stack([sample(kind) for _ in members])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in flat(functional_call(members[0], parameters, (x,))))

    for x, dim in ((xs, 0), (xs[0], None)):
        together, dx = vmap(grad(loss, (0, 1)), in_dims=(0, dim))(parameters, x)
        for i, member in enumerate(members):
            member.zero_grad()
            own = (xs[i] if dim == 0 else x).clone().requires_grad_()
            sum(t.square().sum() for t in flat(member(own))).backward()
            torch.testing.assert_close(dx[i], own.grad)
            for name, p in member.named_parameters():
                torch.testing.assert_close(together[name][i], p.grad)
    # Trained in one go: the gradient of the stacked parameters, in one call of each op for a layer.
    for a in parameters.values():
        a.requires_grad_()
    with Calls() as calls:
        vmap(loss)(parameters, xs).sum().backward()
    if backend != "reference":
        layers, N = getattr(members[0], "num_layers", 1), 1 + getattr(members[0], "bidirectional", False)
        assert calls.ops == [("sequence_forward", 3 * N)] * layers + [("sequence_backward", 3 * N)] * layers
    for i, member in enumerate(members):
        for (name, p), b in zip(
            member.named_parameters(),
            torch.autograd.grad(loss(dict(member.named_parameters()), xs[i]), list(member.parameters())),
            strict=True,
        ):
            assert p.shape == b.shape
            torch.testing.assert_close(parameters[name].grad[i], b)


@pytest.mark.feature("ensembles", nn="no")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_ensemble_of_packed_input(name: str) -> None:
    """One launch for packed input as well; torch.nn has no ensembles."""
    members = [getattr(fusedrnn, name)(3, 4, 2, bidirectional=True, dtype=F64) for _ in range(3)]
    parameters, _ = stack_module_state(members)
    packed = pack_padded_sequence(torch.randn(4, 3, 3, dtype=F64), [2, 4, 1], enforce_sorted=False)

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], parameters, (packed,))[0].data

    with Calls() as calls, torch.no_grad():
        together = vmap(run)(parameters)
    assert calls.ops == [("sequence", 6)] * 2
    torch.testing.assert_close(together, torch.stack([m(packed)[0].data for m in members]))
    theirs, x = [getattr(nn, name)(3, 4) for _ in range(3)], torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match=NO_BATCHING):
        vmap(lambda p: functional_call(theirs[0], p, (x,)))(stack_module_state(theirs)[0])


@pytest.mark.feature("ensembles", backends=["triton"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_ensemble_by_triton(name: str) -> None:
    members = [getattr(fusedrnn, name)(3, 4) for _ in range(2)]
    parameters, _ = stack_module_state(members)
    xs = torch.randn(2, 2, 3, 3)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(members[0], parameters, (x,))[0].square().sum()

    results = []
    for kernel in ("triton", "reference"):
        with fusedrnn.use_backend(kernel):
            results.append(vmap(grad(loss, (0, 1)))(parameters, xs))
    torch.testing.assert_close(*results)


def test_derivative_of_the_gradient_of_an_ensemble() -> None:
    """Double backward of recurrences whose inputs lie side by side."""
    members, parameters = stacked("lstm")
    xs = torch.randn(3, 2, 2, 3, dtype=F64)
    for a in (xs, *parameters.values()):
        a.requires_grad_()

    def run(x: Tensor, parameters: dict[str, Tensor], member: nn.Module) -> Tensor:
        return functional_call(member, parameters, (x,))[0].square().sum()

    y = vmap(lambda x, p: run(x, p, members[0]))(xs, parameters)
    (g,) = torch.autograd.grad(y.sum(), xs, create_graph=True)
    g.square().sum().backward()
    for i, member in enumerate(members):
        x = xs[i].detach().requires_grad_()
        (g,) = torch.autograd.grad(run(x, dict(member.named_parameters()), member), x, create_graph=True)
        g.square().sum().backward()
        torch.testing.assert_close(xs.grad[i], x.grad)
        for name, p in member.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], p.grad)


@pytest.mark.feature(
    "forward mode", nn="not by oneDNN, which CPU tensors of an LSTM get", backends=["reference"]
)
@pytest.mark.usefixtures("free_choice")
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


@pytest.mark.feature("vectorized gradients", nn="yes")
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
    theirs = nn.LSTM(2, 3, bidirectional=True, dtype=F64)
    theirs.load_state_dict(module.state_dict())
    expected = jacobian(lambda x: theirs(x)[0], x, vectorize=True)
    torch.testing.assert_close(jacobian(lambda x: run(x)[0], x, vectorize=True), expected)


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
