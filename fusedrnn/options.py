"""What LSTM, GRU and RNN are built with besides torch's arguments; docs/options.md has the equations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase

from .variation import Variation

_OF_LSTM = ("peephole", "forget_bias")
_OF_GRU = ("reset_after",)
_SWITCHES = (
    "peephole",
    "reset_after",
    "layer_norm",
    "residual",
    "variational_dropout",
    "learn_initial_state",
)
_GATES = {"LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class Options:
    """The options of a module.

    Attributes:
        peephole: LSTM: whether gates see the cell state.
        reset_after: GRU: whether r is applied after the recurrent product, as torch does.
        forget_bias: LSTM: what the bias of the forget gate is initialised to; None: as torch does.
        recurrent_dropout: probability, in training, that a unit of h is left out of recurrent products.
        zoneout: probability, in training, that a unit keeps its state; one for all states or one for each.
        layer_norm: whether gates, and the cell state of an LSTM, are normalised.
        num_heads: blocks on the diagonal of W_hh.
        residual: whether layers above the first add their input to their output.
        variational_dropout: whether dropout between layers draws one mask for all steps.
        learn_initial_state: whether the initial state is a parameter.
    """

    peephole: bool = False
    reset_after: bool = True
    forget_bias: float | None = None
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, ...] = 0.0
    layer_norm: bool = False
    num_heads: int = 1
    residual: bool = False
    variational_dropout: bool = False
    learn_initial_state: bool = False

    @property
    def plain(self) -> bool:
        """Whether a layer's recurrences are those of torch."""
        return not (
            self.peephole
            or not self.reset_after
            or self.recurrent_dropout
            or self.zoneout
            or self.layer_norm
            or self.num_heads > 1
        )

    def zoneout_of(self, states: int) -> tuple[float, ...]:
        """For each state, the probability that it stays."""
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,) * states

    def __str__(self) -> str:
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in given)


NONE = Options()


def take(mode: str, arguments: dict[str, Any]) -> Options:
    """Takes the options of a kind of module out of keyword arguments.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range.
    """
    others = (*(() if mode == "LSTM" else _OF_LSTM), *(() if mode == "GRU" else _OF_GRU))
    own = [f.name for f in fields(Options) if f.name not in others]
    given = {name: arguments.pop(name) for name in own if name in arguments}
    if not given:
        return NONE
    for name in _SWITCHES:
        if not isinstance(given.get(name, False), bool):
            raise TypeError(f"{name} should be of type bool, got {type(given[name]).__name__}")
    heads = given.get("num_heads", 1)
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"num_heads should be of type int, got {type(heads).__name__}")
    if heads < 1:
        raise ValueError("num_heads must be greater than zero")
    bias = given.get("forget_bias")
    if bias is not None:
        given["forget_bias"] = _number("forget_bias", bias)
    if "recurrent_dropout" in given:
        p = _number("recurrent_dropout", given["recurrent_dropout"])
        if not 0 <= p < 1:  # at 1 nothing is left to be scaled up
            raise ValueError(f"recurrent_dropout should be a number in [0, 1), got {p}")
        given["recurrent_dropout"] = p
    if "zoneout" in given:
        given["zoneout"] = _zoneout(given["zoneout"], 2 if mode == "LSTM" else 1)
    return Options(**given)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} should be a number, got {type(value).__name__}")
    return float(value)


def _zoneout(value: Any, states: int) -> float | tuple[float, ...]:
    several = isinstance(value, (tuple, list))
    if several and len(value) != states:
        raise ValueError(f"zoneout should be one number or one for each of {states} states, got {len(value)}")
    rates = tuple(_number("zoneout", p) for p in (value if several else (value,)))
    for p in rates:
        if not 0 <= p <= 1:
            raise ValueError(f"zoneout should be a number in [0, 1], got {p}")
    if not any(rates):
        return 0.0
    return rates if several else rates[0]


def check(module: RNNBase, options: Options) -> None:
    """Raises ValueError for options that do not go with one another or with the module's arguments."""
    heads = options.num_heads
    for wrong, why in (
        (heads > 1 and module.proj_size > 0, "num_heads does not go with proj_size, which mixes heads"),
        (
            module.hidden_size % heads != 0,
            f"hidden_size must be a multiple of num_heads, got {module.hidden_size} and {heads}",
        ),
        (options.forget_bias is not None and not module.bias, "forget_bias needs bias=True"),
        (
            options.residual and module.num_layers == 1,
            "residual needs num_layers of two or more: it is between layers",
        ),
        (
            options.variational_dropout and module.num_layers == 1,
            "variational_dropout needs num_layers of two or more: it is between layers",
        ),
    ):
        if wrong:
            raise ValueError(why)


def add_parameters(module: RNNBase, options: Options) -> None:
    """Gives the module the parameters of its options, initialised."""
    like: Any = module.weight_ih_l0
    for name, shape in _shapes(module, options):
        module.register_parameter(name, torch.nn.Parameter(like.new_empty(shape)))
    for name in _names(module, "weight_hh") if options.num_heads > 1 else ():
        whole = getattr(module, name)
        columns = module.hidden_size // options.num_heads
        setattr(module, name, torch.nn.Parameter(whole.detach()[:, :columns].clone()))
    initialise(module, options)


@torch.no_grad()
def initialise(module: RNNBase, options: Options) -> None:
    """Sets what is not drawn as torch draws weights. Parameters that are not there yet are passed over."""
    H = module.hidden_size
    for name, _ in _shapes(module, options):
        parameter = getattr(module, name, None)
        if parameter is None:
            continue
        if name.startswith("peephole"):
            torch.nn.init.uniform_(parameter, -(H**-0.5), H**-0.5)
        elif name.startswith("norm_c"):
            parameter.copy_(parameter.new_tensor([[1.0], [0.0]]))
        else:
            parameter.fill_(1 if name.startswith("norm") else 0)
    if options.forget_bias is not None:
        for kind, value in (("bias_ih", options.forget_bias), ("bias_hh", 0.0)):  # their sum is what counts
            for name in _names(module, kind):
                getattr(module, name)[H : 2 * H].fill_(value)


def variations(module: RNNBase, options: Options) -> list[Variation]:
    """The parameters of the options, of each layer."""
    if options.plain:
        return []
    D = 2 if module.bidirectional else 1

    def of(kind: str, wanted: bool) -> list[list[Tensor]]:
        if not wanted:
            return [[] for _ in range(module.num_layers)]
        tensors = [getattr(module, name) for name in _names(module, kind)]
        return [tensors[k * D : (k + 1) * D] for k in range(module.num_layers)]

    norm, lstm = options.layer_norm, module.mode == "LSTM"
    groups = (
        of("peephole", options.peephole),
        of("norm_ih", norm),
        of("norm_hh", norm),
        of("norm_c", norm and lstm),
    )
    return [Variation(*layer, reset_after=options.reset_after) for layer in zip(*groups, strict=True)]


def initial_state(module: RNNBase, B: int) -> list[Tensor]:
    """The learned initial state, for each sample."""
    names = ["initial_h", *(["initial_c"] if module.mode == "LSTM" else [])]
    return [getattr(module, name)[:, None].expand(-1, B, -1) for name in names]


def _names(module: RNNBase, kind: str) -> Iterator[str]:
    for k in range(module.num_layers):
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            yield f"{kind}_l{k}{suffix}"


def _shapes(module: RNNBase, options: Options) -> Iterator[tuple[str, tuple[int, ...]]]:
    H, rows = module.hidden_size, module.num_layers * (2 if module.bidirectional else 1)
    GH, lstm = _GATES.get(module.mode, 1) * H, module.mode == "LSTM"
    if options.peephole:
        yield from ((name, (3, H)) for name in _names(module, "peephole"))
    if options.layer_norm:
        yield from ((name, (GH,)) for kind in ("norm_ih", "norm_hh") for name in _names(module, kind))
        if lstm:
            yield from ((name, (2, H)) for name in _names(module, "norm_c"))
    if options.learn_initial_state:
        yield "initial_h", (rows, module.proj_size or H)
        if lstm:
            yield "initial_c", (rows, H)
