"""fusedrnn.convert and fusedrnn.revert: what is replaced, what stays, and that nobody notices."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import fusedrnn

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
F64 = torch.float64


class ForgetBias(nn.LSTM):
    """A subclass that leaves the forward pass alone."""

    def __init__(self, *args: Any, forget_bias: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forget_bias = forget_bias

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias_ih_l0[self.hidden_size : 2 * self.hidden_size] += 1

    def describe(self) -> str:
        return f"forget bias {self.forget_bias}"


class Clipped(nn.GRU):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input.clamp(-1, 1), hx)


class Unsorted(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return hx


class GrandChild(Clipped):
    pass


class Model(nn.Module):
    """Every module that is replaced, in every kind of container, one of them twice."""

    def __init__(self, package: Any = nn) -> None:
        super().__init__()
        self.first = package.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.list = nn.ModuleList([package.GRU(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
        self.by_name = nn.ModuleDict({"again": self.list[0], "rnn": package.RNN(8, 4, nonlinearity="relu")})
        self.cells = nn.Sequential(package.RNNCell(4, 4), package.GRUCell(4, 4))
        self.last = package.LSTMCell(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x)
        y, _ = self.list[0](y)
        y, _ = self.by_name["again"](self.list[1](y))
        y, _ = self.by_name["rnn"](y)
        return self.last(self.cells(y[0]))[1]


REPLACED = {
    "first": "LSTM",
    "list.0": "GRU",
    "by_name.rnn": "RNN",
    "cells.0": "RNNCell",
    "cells.1": "GRUCell",
}
REPLACED["last"] = "LSTMCell"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must stay: objects by identity, and what the model says of itself."""
    return {
        "modules": {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "keys": list(model.state_dict()),
        "repr": repr(model),
        "training": [m.training for m in model.modules()],
        "attributes": [vars(m).keys() for m in model.modules()],
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_model_itself(name: str) -> None:
    module = getattr(nn, name)(3, 4)
    assert fusedrnn.convert(module) is module
    assert type(module) is getattr(fusedrnn, name)
    assert fusedrnn.revert(module) is module
    assert type(module) is getattr(nn, name)


@pytest.mark.feature("convert and revert", nn="no")
def test_a_model_of_everything(assert_same: Callable) -> None:
    model, x = Model().double().train(), torch.randn(2, 5, 3, dtype=F64)
    model.list.eval()
    plain, before = copy.deepcopy(model), snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    converted, report = fusedrnn.convert(model, report=True)
    assert converted is model
    assert report.replaced == {name: f"fusedrnn.{kind}" for name, kind in REPLACED.items()}
    assert report.left == {}
    assert all(type(model.get_submodule(n)) is getattr(fusedrnn, kind) for n, kind in REPLACED.items())
    assert model.by_name["again"] is model.list[0]
    assert snapshot(model) == before
    assert_same(model, plain, x)
    with fusedrnn.use_backend("cpu"):
        assert "fusedrnn" in type(model.first(x)[0].grad_fn.next_functions[0][0]).__name__

    model(x).sum().backward()
    optimizer.step()  # the optimizer still has the parameters of the model
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same(model, plain, x)
    assert_same(model.float().double(), plain.float().double(), x)

    again = fusedrnn.convert(model, report=True)[1]
    assert again.replaced == {}
    assert again.left["by_name.rnn"] == "it is fusedrnn.RNN already"

    reverted, report = fusedrnn.revert(model, report=True)
    assert reverted is model
    assert report.replaced == {name: f"torch.nn.{kind}" for name, kind in REPLACED.items()}
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert snapshot(model) == before
    assert torch.equal(model(x), plain(x))


def test_what_was_built_with_our_modules_reverts(assert_same: Callable) -> None:
    model, x = Model(fusedrnn).double(), torch.randn(2, 5, 3, dtype=F64)
    fused = copy.deepcopy(model)
    fusedrnn.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in Model().modules()]
    assert_same(fused, model, x)


@pytest.mark.feature("convert and revert")
def test_hooks_stay(flat: Callable) -> None:
    log: list[str] = []
    module = nn.LSTM(3, 4, dtype=F64)
    module.register_forward_pre_hook(lambda m, x: log.append("pre") or (2 * x[0],))
    module.register_forward_hook(lambda m, x, y: log.append("post"))
    module.register_full_backward_pre_hook(lambda m, dy: log.append("backward pre"))
    module.register_full_backward_hook(lambda m, dx, dy: log.append("backward"))
    module.register_state_dict_post_hook(lambda m, state, *_: state.update(extra=torch.ones(1)))
    module.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: state.pop(f"{prefix}extra"))
    x = torch.randn(5, 2, 3, dtype=F64, requires_grad=True)
    expected = flat(nn.Module.__call__(module, x))
    log.clear()
    fusedrnn.convert(module)
    for a, b in zip(flat(module(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
    module(x)[0].sum().backward()
    assert log == ["pre", "post", "pre", "post", "backward pre", "backward"]
    assert "extra" in module.state_dict()
    module.load_state_dict(module.state_dict())


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "older weight_norm", "spectral_norm", "custom", "pruned"])
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_parametrizations_stay(assert_same: Callable, name: str, how: str) -> None:
    weight = "weight_hh" if name == "GRUCell" else "weight_hh_l0"
    apply = {
        "weight_norm": lambda m: parametrizations.weight_norm(m, weight),
        "older weight_norm": lambda m: nn.utils.weight_norm(m, weight),
        "spectral_norm": lambda m: spectral_norm(m.eval(), weight),
        "custom": lambda m: parametrize.register_parametrization(m, weight, Half()),
        "pruned": lambda m: prune.l1_unstructured(m, weight, 0.5),
    }[how]
    x = torch.randn((5, 3) if name == "GRUCell" else (4, 5, 3), dtype=F64)
    plain = getattr(nn, name)(3, 4, dtype=F64)
    module = copy.deepcopy(plain)
    for m in (plain, module):
        torch.manual_seed(2)
        apply(m)
    module(x)
    keys, name_before = list(module.state_dict()), type(module).__name__
    fusedrnn.convert(module)
    assert isinstance(module, getattr(fusedrnn, name))
    assert type(module).__name__ == name_before
    assert list(module.state_dict()) == keys
    assert_same(module, plain, x)
    if how == "custom":
        parametrize.remove_parametrizations(module, weight)
        parametrize.remove_parametrizations(plain, weight)
        assert type(module) is getattr(fusedrnn, name)
        assert_same(module, plain, x)
    fusedrnn.revert(module)
    assert not isinstance(module, getattr(fusedrnn, name))
    assert_same(module, plain, x)


@pytest.mark.feature("convert and revert")
def test_a_subclass_that_only_adds_is_converted(assert_same: Callable) -> None:
    x = torch.randn(5, 2, 3, dtype=F64)
    module = nn.Sequential(ForgetBias(3, 4, forget_bias=2.0, dtype=F64))
    plain = copy.deepcopy(module)
    report = fusedrnn.convert(module, report=True)[1]
    assert report.replaced == {"0": "fusedrnn.LSTM"}
    inner = module[0]
    assert isinstance(inner, ForgetBias)
    assert isinstance(inner, fusedrnn.LSTM)
    assert repr(inner) == repr(plain[0])
    assert inner.describe() == "forget bias 2.0"
    assert_same(module, plain, x)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = (
        copy.deepcopy(module),
        nn.Sequential(copy.copy(inner)),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    )
    for other in copies:
        assert type(other[0]) is type(inner)
        assert other[0].describe() == "forget bias 2.0"
        assert_same(other, plain, x)
    assert not any(a is b for a, b in zip(copy.deepcopy(inner).parameters(), inner.parameters(), strict=True))
    fusedrnn.revert(module)
    assert type(inner) is ForgetBias
    assert_same(module, plain, x)


def test_what_is_left_and_why() -> None:
    from torch.ao.nn.quantizable import LSTM as QuantizableLSTM

    patched = nn.RNN(3, 4)
    patched.forward = MethodType(lambda self, x: (x, x), patched)
    ours = type("Ours", (fusedrnn.GRU,), {})(3, 4)
    sharded = nn.GRU(3, 4)
    sharded.__class__ = type("FSDPGRU", (nn.GRU,), {"__module__": "torch.distributed.fsdp"})
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.ModuleDict({"rnn": nn.GRU(3, 4)})).rnn
    left = {
        "own forward": (Clipped(3, 4), "Clipped has its own forward"),
        "inherited forward": (GrandChild(3, 4), "Clipped has its own forward"),
        "own helper": (Unsorted(3, 4), "Unsorted has its own permute_hidden"),
        "patched": (patched, "its forward was replaced by another"),
        "ours": (ours, "Ours is a subclass of ours"),
        "quantizable": (QuantizableLSTM(3, 4), "it is quantized"),
        "dynamic": (torch.ao.nn.quantized.dynamic.GRU(3, 4), "it is quantized"),
        "sharded": (sharded, "it is sharded"),
        "scripted": (scripted, "it is scripted"),
        "base": (nn.RNNBase("LSTM", 3, 4), "RNNBase is none of the modules that ours replace"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in left.items()} | {"linear": nn.Linear(2, 2)})
    kinds = [type(m) for m in model.modules()]
    report = fusedrnn.convert(model, report=True)[1]
    assert report.replaced == {}
    assert {name: report.left[name] for name in left} == {name: why for name, (_, why) in left.items()}
    assert [type(m) for m in model.modules()] == kinds
    assert "own forward: left, Clipped has its own forward" in str(report).splitlines()
    assert str(fusedrnn.convert(nn.GRU(3, 4), report=True)[1]) == "(model): now fusedrnn.GRU"
    assert str(fusedrnn.convert(nn.Linear(2, 2), report=True)[1]) == "no recurrent modules"
    report = fusedrnn.revert(model, report=True)[1]
    assert report.replaced == {}
    assert report.left["own forward"] == "it is none of ours"
    assert report.left["ours"] == "Ours is a subclass of ours"
    assert [type(m) for m in model.modules()] == kinds


def test_modules_without_memory_yet(assert_same: Callable) -> None:
    """On the meta device, and beside lazy modules."""
    with torch.device("meta"):
        module = nn.GRU(3, 4, 2, dtype=F64)
    fusedrnn.convert(module)
    plain = nn.GRU(3, 4, 2, dtype=F64)
    module.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(5, 2, 3, dtype=F64)
    assert_same(module, plain, x)
    lazy = fusedrnn.convert(nn.Sequential(nn.LazyLinear(3, dtype=F64), nn.RNN(3, 4, dtype=F64)))
    assert type(lazy[1]) is fusedrnn.RNN
    assert lazy(torch.randn(5, 2, 7, dtype=F64))[0].shape == (5, 2, 4)
    assert lazy[0].in_features == 7


def test_copies_of_a_converted_model(assert_same: Callable) -> None:
    model, x = Model().double(), torch.randn(2, 5, 3, dtype=F64)
    plain = copy.deepcopy(model)
    fusedrnn.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert_same(other, plain, x)
    assert type(copy.deepcopy(plain).first) is nn.LSTM


def test_bad_input() -> None:
    for function in (fusedrnn.convert, fusedrnn.revert):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
            function([nn.LSTM(3, 4)])
