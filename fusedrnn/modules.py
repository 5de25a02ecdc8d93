"""Drop-in modules for ``torch.nn.LSTM``, ``GRU``, ``RNN`` and their cells.

Each is a subclass of the module it replaces and takes its constructor, parameters, initialisation,
``state_dict`` and ``repr`` from it; only ``forward`` is new. A call that does not fit is handed to the
built-in's own ``forward``, which raises: type and message of an error are those of the torch installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from . import autocast, builtin, compiler, functional, options, segments, stack
from .cells import CELLS
from .functional import Weights

_CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # of a cell
_NONLINEARITIES = {"tanh": "rnn_tanh", "relu": "rnn_relu"}
_AUTOCAST_MIXES = (torch.float32, torch.bfloat16, torch.float16)


class _Layers(RNNBase):
    """What LSTM, GRU and RNN share: normalises the input, checks it and runs the layers in turn."""

    _states: ClassVar[int] = 1
    _kind: ClassVar[str] = "RNN"
    _options: options.Options = options.NONE  # of the class: a converted module has none

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        chosen = options.take(self._kind, kwargs)
        super().__init__(*args, **kwargs)
        if chosen is not options.NONE:
            options.check(self, chosen)
            self._options = chosen
            options.add_parameters(self, chosen)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        options.initialise(self, self._options)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), str(self._options))))

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the parameters where they are. Callers of the built-in's need it."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Any = None,
        return_all_states: bool = False,
    ) -> Any:
        asked = _NOTHING
        if not (lengths is reset is reset_state is None and return_all_states is False):
            asked = _Asked(lengths, reset, reset_state, return_all_states)
        if _traced():
            if asked is not _NOTHING or self._options is not options.NONE:
                raise RuntimeError("TorchScript cannot trace what torch.nn does not have")
            return super().forward(input, hx)
        # Read at every call, and once: a parametrization computes its tensor at each read, and weight_norm,
        # functional_call or weight drop may have put another tensor in the place of a parameter.
        parameters = _read(self, self._flat_weights_names)
        if asked is _NOTHING and (results := self._plain(input, hx, parameters)):
            return results
        weights = self._layer_weights(parameters)
        run = self._forward_packed if isinstance(input, PackedSequence) else self._forward_padded
        y, final, states = run(input, hx, weights, asked)
        results = y, tuple(final) if self._states > 1 else final[0]
        if not return_all_states:
            return results
        return *results, tuple(states) if self._states > 1 else states[0]

    def _plain(self, input: Any, hx: Any, parameters: list[Tensor]) -> tuple | None:
        """One layer without options, where checks would take as long as a step of a stream.

        The backend checks what it is given. Where it refuses, and for a call not as simple, the result
        is None: torch's checks come first then, and its words.
        """
        if self.num_layers > 1 or self._options is not options.NONE or type(input) is not Tensor:
            return None
        if input.dim() != 3 or torch.compiler.is_compiling() or autocast.enabled(input):
            return None
        x = input.transpose(0, 1) if self.batch_first else input
        state = stack.zeros(x, self._state_shapes(x.size(1))) if hx is None else self._given_state(hx)
        if not state:
            return None
        reverse, cell = (False, True) if self.bidirectional else (False,), _CELLS[self.mode]
        # Of single steps, those recorded for a backward are often the built-in's: for others it is not asked.
        recorded = x.size(0) == 1 and torch.is_grad_enabled()
        try:
            if recorded and functional.left_to_builtin(cell, x, state, parameters):
                biases, D = bool(self.bias), len(reverse)
                y, final = builtin.layer(CELLS[cell], x, state, parameters, biases=biases, directions=D)
            else:
                weights = self._layer_weights(parameters)[0]
                y, final = functional.plain_layer(cell, x, state, weights, reverse)
        except RuntimeError:
            return None
        return y.transpose(0, 1) if self.batch_first else y, tuple(final) if self._states > 1 else final[0]

    def _forward_padded(
        self, input: Tensor, hx: Any, weights: list[Weights], asked: _Asked
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        rank = input.dim()
        if rank == 3:
            x = input.transpose(0, 1) if self.batch_first else input
        elif rank == 2:
            x = input.unsqueeze(1)  # [T, 1, I]: batch_first means nothing here
        else:
            self._refuse(input, hx)
        T, B, features = x.shape
        state = self._given_state(hx, stacked=rank == 2)
        if state and rank == 2:
            state = [s.unsqueeze(1) for s in state]
        if state is None or T == 0 or features != self.input_size or not _alike(x, weights[0].ih[0], state):
            self._refuse(input, hx)
        if state and [s.shape for s in state] != self._state_shapes(B):
            self._refuse(input, hx)
        if asked is _NOTHING:
            y, final, states = self._run(x, state, weights, stack.Batch(B))
        else:
            y, final, states = self._run_asked(x, state, weights, rank, asked)
        if rank == 2:
            return y.squeeze(1), [s.squeeze(1) for s in final], [s.squeeze(2) for s in states]
        if self.batch_first:
            return y.transpose(0, 1), final, [s.transpose(1, 2) for s in states]
        return y, final, states

    def _run_asked(
        self, x: Tensor, state: list[Tensor], weights: list[Weights], rank: int, asked: _Asked
    ) -> stack.Outcome:
        """Runs all layers with lengths and resets, on ``[T, B, I]``."""
        T, B, _ = x.shape
        lengths, reset, reset_state, all_states = asked
        if lengths is not None:
            if rank == 2:
                raise RuntimeError("lengths are those of a batch; the input is one sequence")
            segments.check_lengths(lengths, T, B)
        if reset is not None:
            segments.check_reset(reset, (T,) if rank == 2 else (B, T) if self.batch_first else (T, B))
            reset = reset[:, None] if rank == 2 else reset.t() if self.batch_first else reset
        others = self._given_reset_state(reset, reset_state, x, rank)
        if self._options.learn_initial_state:
            state = state or options.initial_state(self, B)
            others = others or (state if reset is None else options.initial_state(self, B))
        if lengths is None and reset is None:
            return self._run(x, state, weights, stack.Batch(B), all_states)
        if T == 1:
            run_one = stack.run_one_step
            lengths, reset = (None if t is None else t.to(x.device) for t in (lengths, reset))
            batch = stack.Batch(B, reset_state=others)
            return run_one(self._stack(weights), x, state, batch, lengths, reset, all_states=all_states)
        cuts = segments.cut(T, B, x.device, lengths, reset, bidirectional=self.bidirectional)
        return self._run(x, state, weights, stack.Batch(B, None, cuts, others), all_states)

    def _forward_packed(
        self, packed: PackedSequence, hx: Any, weights: list[Weights], asked: _Asked
    ) -> tuple[PackedSequence, list[Tensor], list[Tensor]]:
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        # The built-in checks little of this and can answer with wrong numbers, so the errors are ours.
        if x.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
        if x.size(1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(1)}"
            )
        if asked.lengths is not None or asked.reset is not None or asked.reset_state is not None:
            raise ValueError("lengths and reset are for padded input; packed input has lengths of its own")
        segments.check_batch_sizes(batch_sizes, x.size(0))
        state = self._given_state(hx)
        B = segments.packed_batch(packed, state)
        for name, indices in (("sorted_indices", sorted_indices), ("unsorted_indices", unsorted_indices)):
            if indices is not None and indices.shape != (B,):
                raise RuntimeError(
                    f"{name} must have shape ({B},), one entry per sequence, got {tuple(indices.shape)}"
                )
        if state is None:
            self._refuse(packed, hx)
        self._check_state(state, B, "hidden")
        if not _alike(x, weights[0].ih[0], state):
            self._refuse(packed, hx)
        if sorted_indices is not None:
            state = [s.index_select(1, sorted_indices) for s in state]
        batch = stack.Batch(B, batch_sizes.contiguous())
        y, final, states = self._run(x, state, weights, batch, asked.return_all_states)
        if unsorted_indices is not None:
            final = [s.index_select(1, unsorted_indices) for s in final]
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), final, states

    def _run(
        self,
        x: Tensor,
        state: list[Tensor],
        weights: list[Weights],
        batch: stack.Batch,
        all_states: bool = False,
    ) -> stack.Outcome:
        """Runs all layers on ``[T, B, I]`` or packed rows; no ``state`` means zeros, or what was learned."""
        if self._options.learn_initial_state and not state:
            state = options.initial_state(self, batch.B)
        return stack.run(self._stack(weights), x, state, batch, all_states=all_states)

    def _stack(self, weights: list[Weights]) -> stack.Stack:
        chosen = self._options
        return stack.Stack(
            _CELLS[self.mode],
            self._states,
            weights,
            [False, True] if self.bidirectional else [False],
            self.hidden_size,
            self.proj_size,
            self.dropout if self.training else 0.0,
            chosen,
            () if chosen.plain else options.variations(self, chosen),
            self.training,
        )

    def _layer_weights(self, parameters: list[Tensor]) -> list[Weights]:
        of_layer = len(parameters) // self.num_layers
        of_direction = of_layer // 2 if self.bidirectional else of_layer
        layers = []
        for first in range(0, len(parameters), of_layer):
            # weight_ih, weight_hh, with biases bias_ih and bias_hh, with a projection weight_hr
            last = first + of_layer
            groups = [parameters[k:last:of_direction] for k in range(first, first + of_direction)]
            hr: Any = groups.pop() if self.proj_size else ()
            ih, hh, bias_ih, bias_hh = groups if len(groups) > 2 else (*groups, (), ())
            layers.append(Weights(ih, hh, bias_ih, bias_hh, hr))
        return layers

    def _given_state(self, hx: Any, *, stacked: bool = False) -> list[Tensor] | None:
        """The initial states, empty if not given, or None if ``hx`` is of the wrong kind.

        ``stacked``: whether h and c may come as one tensor.
        """
        if hx is None:
            return []
        if self._states == 1:
            return [hx] if isinstance(hx, Tensor) else None
        if not isinstance(hx, (tuple, list)) and not (stacked and isinstance(hx, Tensor)):
            return None
        state = list(hx)
        return state if len(state) == self._states and all(isinstance(s, Tensor) for s in state) else None

    def _given_reset_state(
        self, reset: Tensor | None, reset_state: Any, x: Tensor, rank: int
    ) -> list[Tensor]:
        """What states are set to, empty if not given."""
        if reset_state is None:
            return []
        if reset is None:
            raise ValueError("reset_state says what a reset sets the state to: it needs reset")
        state = self._given_state(reset_state, stacked=rank == 2)
        if state is None:
            raise RuntimeError("reset_state must be of the form of hx")
        if rank == 2:
            state = [s.unsqueeze(1) for s in state]
        self._check_state(state, x.size(1), "reset_state")
        if not _alike(x, x, state):
            raise RuntimeError("reset_state must have the dtype and device of the input")
        return state

    def _check_state(self, state: list[Tensor], B: int, name: str) -> None:
        for i, (s, shape) in enumerate(zip(state, self._state_shapes(B), strict=False)):
            which = f"{name}[{i}]" if self._states > 1 else name
            self.check_hidden_size(s, shape, f"Expected {which} size {{}}, got {{}}")

    def _state_shapes(self, B: int) -> list[tuple[int, int, int]]:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        h = (rows, B, self.proj_size or self.hidden_size)
        return [h] if self._states == 1 else [h, (rows, B, self.hidden_size)]

    def _refuse(self, input: Any, hx: Any) -> NoReturn:
        with torch.no_grad():
            super().forward(input, hx)
        _refuse(self, input, hx)


compiler.accept(_Layers)


class _Asked(NamedTuple):
    """What a call asks for besides torch's arguments."""

    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_state: Any = None
    return_all_states: bool = False


_NOTHING = _Asked()


class LSTM(_Layers, torch.nn.LSTM):
    """Multi-layer LSTM.

    Equivalent to :class:`torch.nn.LSTM`, whose arguments, parameters and checkpoints it shares. It takes
    keyword arguments that torch does not have, whose equations and sources are in docs/options.md.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of the state.
        num_layers: L, layers stacked on one another. Default: 1.
        bias: whether there are biases. Default: True.
        batch_first: whether input and output are ``[B, T, *]`` instead of ``[T, B, *]``. Default: False.
        dropout: probability of dropout between layers, in training. Default: 0.
        bidirectional: whether each layer also runs from the last step to the first (D=2; else D=1).
            Default: False.
        proj_size: P, features that ``h`` is projected to; 0 for no projection (P=H below). Default: 0.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.

    Keyword Args:
        peephole: gates that see the cell state (Gers and Schmidhuber, 2000), by parameters
            ``peephole_l{k}[_reverse] [3, H]`` for i, f and o. Default: False.
        layer_norm: normalised gates and cell state (Ba et al., 2016). Default: False.
        recurrent_dropout: probability, in training, that a unit of h stays out of recurrent products, for a
            whole sequence (Gal and Ghahramani, 2016). Default: 0.
        zoneout: probability, in training, that a unit keeps its state (Krueger et al., 2017), for all states
            or one for each. Default: 0.
        num_heads: blocks on the diagonal of W_hh, whose parameter is ``[G*H, H/num_heads]``. Default: 1.
        forget_bias: what the bias of the forget gate is initialised to. Default: None, as torch does.
        residual: whether layers above the first add their input to their output. Default: False.
        variational_dropout: whether ``dropout`` draws one mask for all steps. Default: False.
        learn_initial_state: whether the state starts from parameters ``initial_h [L*D, P]`` and
            ``initial_c [L*D, H]``. Default: False.

    Call with:
        input: ``[T, B, I]``, unbatched ``[T, I]``, or a :class:`~torch.nn.utils.rnn.PackedSequence`; of the
            dtype and device of the parameters, with any strides.
        hx: ``(h_0 [L*D, B, P], c_0 [L*D, B, H])``, without B for unbatched input. Default: zeros.
        lengths: int64 ``[B]``: the steps of each sample, from 0 to T; keyword-only, as those that follow.
            Default: T of each.
        reset: bool ``[T, B]``, ``[B, T]`` with ``batch_first``: whether the state is set before a step, in
            the order in which a direction runs. Default: nowhere.
        reset_state: what ``reset`` sets it to, shaped as ``hx``. Default: what the state starts from if
            ``hx`` is not given.
        return_all_states: whether to return the states of all steps as well. Default: False.

    Returns:
        ``output [T, B, D*P]``, in the form of the input, and ``(h_n, c_n)``, shaped as ``hx``. With
        ``return_all_states`` a third: ``(h [L*D, T, B, P], c [L*D, T, B, H])``, ``[L*D, B, T, *]`` with
        ``batch_first``, rows ``[L*D, rows, *]`` of packed input.

    Raises:
        What :class:`torch.nn.LSTM` raises; also RuntimeError for a packed input whose features,
        ``batch_sizes`` or state do not fit, where the built-in may go on, and for lengths and resets that do
        not; ValueError for options that do not go together.
    """

    _states, _kind = 2, "LSTM"


class GRU(_Layers, torch.nn.GRU):
    """Multi-layer GRU.

    Equivalent to :class:`torch.nn.GRU`, whose arguments, parameters and checkpoints it shares. Arguments,
    shapes and errors are those of :class:`LSTM`, without ``proj_size``, ``peephole`` and ``forget_bias``;
    ``hx`` and the final state are one tensor ``[L*D, B, H]``.

    Keyword Args:
        reset_after: whether r is applied after the recurrent product, as torch does, or to h before it, as
            Cho et al. (2014) do. Default: True.
    """

    _kind = "GRU"


class RNN(_Layers, torch.nn.RNN):
    """Multi-layer Elman RNN.

    Equivalent to :class:`torch.nn.RNN`, whose arguments, parameters and checkpoints it shares. Arguments,
    shapes and errors are those of :class:`GRU`, without ``reset_after``, with ``nonlinearity`` (``"tanh"`` or
    ``"relu"``) as the fourth argument.
    """


class _Cell(RNNCellBase):
    """What the cells share: a step is a sequence of length one."""

    _states: ClassVar[int] = 1

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if _traced():
            return super().forward(input, hx)
        cell, parameters = self._cell_name(), _read(self, _PARAMETERS)
        if (next_state := self._plain(cell, input, hx, parameters)) is not None:
            return next_state
        rank = input.dim()
        if rank not in (1, 2) or cell is None:
            self._refuse(input, hx)
        ih, hh, bias_ih, bias_hh = parameters
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            state = [input.new_zeros(shape)] * self._states
        else:
            state = [hx] if self._states == 1 else list(hx)
            fits = len(state) == self._states and all(
                isinstance(s, Tensor) and s.shape == shape for s in state
            )
            if not fits or (rank == 2 and self._states > 1 and isinstance(hx, Tensor)):
                self._refuse(input, hx)
        if input.shape[-1] != self.input_size or not _alike(input, ih, state):
            self._refuse(input, hx)
        if bias_ih is None and bias_hh is None:
            weights = Weights((ih,), (hh,))
        else:  # the built-in takes either without the other
            if bias_ih is None or bias_hh is None:
                zeros = ih.new_zeros(ih.size(0))
                bias_ih, bias_hh = (zeros if b is None else b for b in (bias_ih, bias_hh))
            weights = Weights((ih,), (hh,), (bias_ih,), (bias_hh,))
        if rank == 1:
            input, state = input[None], [s[None] for s in state]
        final = functional.step(cell, input, state, weights)
        if rank == 1:
            final = [s[0] for s in final]
        return tuple(final) if self._states > 1 else final[0]

    def _plain(self, cell: str | None, input: Any, hx: Any, parameters: list[Any]) -> Any:
        """As :meth:`_Layers._plain`, for a batch and a state that are given."""
        state = (hx,) if self._states == 1 else hx
        if type(state) is not tuple or {type(input), *map(type, state)} != {Tensor}:
            return None
        if cell is None or input.dim() != 2 or torch.compiler.is_compiling():
            return None
        present = [p for p in parameters if p is not None]
        if functional.left_to_builtin(cell, input, state, present, one_step=True):
            return builtin.step(CELLS[cell], input, hx, parameters)
        if len(state) != self._states or autocast.enabled(input) or len(present) < len(parameters):
            return None
        try:
            final = functional.step(cell, input, state, Weights(*[(p,) for p in parameters]))
        except RuntimeError:
            return None
        return tuple(final) if self._states > 1 else final[0]

    def _cell_name(self) -> str | None:
        raise NotImplementedError

    def _refuse(self, input: Any, hx: Any) -> NoReturn:
        with torch.no_grad():
            super().forward(input, hx)
        _refuse(self, input, hx)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """One LSTM step.

    Equivalent to :class:`torch.nn.LSTMCell`, whose arguments, parameters and checkpoints it shares.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of the state.
        bias: whether there are biases. Default: True.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16.

    Call with:
        input: ``[B, I]`` or unbatched ``[I]``, of the dtype and device of the parameters, with any strides.
        hx: ``(h [B, H], c [B, H])``, without B for unbatched input. Default: zeros.

    Returns:
        The next ``(h, c)``.

    Raises:
        What :class:`torch.nn.LSTMCell` raises; also RuntimeError where h and c differ in dtype.
    """

    _states = 2

    def _cell_name(self) -> str:
        return "lstm"


class GRUCell(_Cell, torch.nn.GRUCell):
    """One GRU step.

    Equivalent to :class:`torch.nn.GRUCell`. Arguments, shapes and errors are those of :class:`LSTMCell`; the
    state is one tensor ``[B, H]``.
    """

    def _cell_name(self) -> str:
        return "gru"


class RNNCell(_Cell, torch.nn.RNNCell):
    """One Elman RNN step.

    Equivalent to :class:`torch.nn.RNNCell`. Arguments, shapes and errors are those of :class:`GRUCell`, with
    ``nonlinearity`` (``"tanh"`` or ``"relu"``) as the fourth argument.
    """

    def _cell_name(self) -> str | None:
        return _NONLINEARITIES.get(self.nonlinearity)


def _traced() -> bool:
    """Whether TorchScript traces the call: it knows the built-in's ops alone, so the built-in runs."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def _read(module: torch.nn.Module, names: Iterable[str]) -> list[Any]:
    # Parameters are found here at once; getattr looks here last, after everything else has failed.
    try:
        return list(itemgetter(*names)(module._parameters))
    except KeyError:
        return [getattr(module, name) for name in names]


def _alike(x: Tensor, weight: Tensor, state: list[Tensor]) -> bool:
    """Whether all are on one device, and of one dtype or of dtypes that the active autocast can mix."""
    dtype, device = x.dtype, x.device
    mixed = False
    for tensor in (weight, *state):
        if tensor.device != device:
            return False
        if tensor.dtype is not dtype:
            mixed = True
    if not mixed:
        return True
    dtypes = [t.dtype for t in (x, weight, *state)]
    return torch.is_autocast_enabled(device.type) and all(d in _AUTOCAST_MIXES for d in dtypes)


def _refuse(module: torch.nn.Module, input: Any, hx: Any) -> NoReturn:
    """For what the built-in takes and these modules do not."""

    def kind(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(kind, value))})"
        return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    data = input.data if isinstance(input, PackedSequence) else input
    raise RuntimeError(
        f"{type(module).__name__} expects input, state and weights of one dtype on one device, and a state "
        f"of the documented form; got input {kind(data)} and state {kind(hx)}"
    )
