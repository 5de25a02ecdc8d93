"""What a layer's recurrences can do beyond their cell, as every backend is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Variation(NamedTuple):
    """Changes to the recurrences of one layer; of the fields that are lists one entry per recurrence.

    docs/options.md has the equations. Dims: N recurrences, G gates, H units, P width of h, B batch.

    Attributes:
        peephole: weights ``[3, H]`` from the cell state to the gates i, f and o of an LSTM.
        norm_ih: gains ``[G*H]`` of the layer norm of ``W_ih x``.
        norm_hh: gains ``[G*H]`` of the layer norm of ``W_hh h``.
        norm_c: gain and bias ``[2, H]`` of the layer norm of an LSTM's cell state.
        reset_after: whether a GRU applies r after its recurrent product, as torch does.
        mask: ``[N, B, P]``, factors of h where it enters the recurrent product.
        zoneout: for each state, what of its last value stays: a number in [0, 1], or for each step and unit
            whether all of it does, bool ``[T, B, N, *]`` or packed ``[rows, N, *]``. Empty: nothing.
    """

    peephole: Sequence[Tensor] = ()
    norm_ih: Sequence[Tensor] = ()
    norm_hh: Sequence[Tensor] = ()
    norm_c: Sequence[Tensor] = ()
    reset_after: bool = True
    mask: Tensor | None = None
    zoneout: Sequence[float | Tensor] = ()

    def names(self) -> tuple[str, ...]:
        """The options of the modules that ask for this."""
        return tuple(
            name
            for name, wanted in (
                ("peephole", bool(self.peephole)),
                ("layer_norm", bool(self.norm_ih)),
                ("reset_after=False", not self.reset_after),
                ("recurrent_dropout", self.mask is not None),
                ("zoneout", bool(self.zoneout)),
            )
            if wanted
        )


PLAIN = Variation()
