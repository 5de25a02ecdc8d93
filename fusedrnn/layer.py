"""A layer of any registered cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .cells import get_cell
from .functional import Weights, sequence


class Layer(torch.nn.Module):
    """One layer of a registered cell, in one direction or both.

    Parameters have the names, shapes and initialisation of torch's recurrent modules: ``weight_ih_l0
    [G*H, I]``, ``weight_hh_l0 [G*H, H]``, ``bias_ih_l0`` and ``bias_hh_l0 [G*H]``, and the same with
    ``_reverse``.

    Args:
        cell: the name of a cell, of this package's or of :func:`fusedrnn.register_cell`.
        input_size: I, features of the input.
        hidden_size: H, units of the state.
        bias: whether there are biases. Default: True.
        batch_first: whether input and output are ``[B, T, *]`` instead of ``[T, B, *]``. Default: False.
        bidirectional: whether the layer also runs from the last step to the first (D=2; else D=1). Default:
            False.
        device: of the parameters.
        dtype: of the parameters.

    Call with:
        input: ``[T, B, I]``, or a :class:`~torch.nn.utils.rnn.PackedSequence`.
        state: the S initial states, each ``[D, B, H]``. Default: zeros.

    Returns:
        ``output [T, B, D*H]``, in the form of the input, and the S final states.

    Raises:
        ValueError: no cell of that name is registered.
        RuntimeError: input, state and parameters do not fit each other.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        gates = get_cell(cell).gates * hidden_size
        self.cell, self.input_size, self.hidden_size = cell, input_size, hidden_size
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih_l0": (gates, input_size),
            "weight_hh_l0": (gates, hidden_size),
        }
        if bias:
            shapes |= {"bias_ih_l0": (gates,), "bias_hh_l0": (gates,)}
        for suffix in self._suffixes():
            for name, shape in shapes.items():
                parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name + suffix, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters from U(-1/sqrt(H), 1/sqrt(H))."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, input: Tensor | PackedSequence, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Any, tuple[Tensor, ...]]:
        packed = input if isinstance(input, PackedSequence) else None
        x: Any = input.data if packed else input
        batch_sizes = packed.batch_sizes if packed else None
        if self.batch_first and not packed:
            x = x.transpose(0, 1)
        reverse = [False, True][: 1 + self.bidirectional]
        if state is None:
            B = int(batch_sizes[0]) if batch_sizes is not None else x.size(1)
            zeros = x.new_zeros(len(reverse), B, self.hidden_size)
            state = (zeros,) * get_cell(self.cell).states
        elif packed and packed.sorted_indices is not None:
            state = tuple(s.index_select(1, packed.sorted_indices) for s in state)
        y, final = sequence(self.cell, x, state, self._weights(), reverse=reverse, batch_sizes=batch_sizes)
        if packed:
            if packed.unsorted_indices is not None:
                final = [s.index_select(1, packed.unsorted_indices) for s in final]
            return packed._replace(data=y), tuple(final)
        return y.transpose(0, 1) if self.batch_first else y, tuple(final)

    def _suffixes(self) -> list[str]:
        return ["", "_reverse"] if self.bidirectional else [""]

    def _weights(self) -> Weights:
        def group(name: str) -> list[Tensor]:
            return [getattr(self, f"{name}_l0{suffix}") for suffix in self._suffixes()]

        biases = (group("bias_ih"), group("bias_hh")) if self.bias else ((), ())
        return Weights(group("weight_ih"), group("weight_hh"), *biases)

    def extra_repr(self) -> str:
        options = [n for n in ("batch_first", "bidirectional") if getattr(self, n)]
        options += [] if self.bias else ["bias=False"]
        return ", ".join([repr(self.cell), str(self.input_size), str(self.hidden_size), *options])
