"""Lets torch.compile trace our modules, which are instances of ``torch.nn.LSTM``, ``GRU`` and ``RNN``.

The compiler refuses every such instance, because it would unroll the built-in's loop over time, unless the
user sets ``torch._dynamo.config.allow_rnn``. Ours are one op per layer and need no protection. So that nobody
has to set anything, the refusal is lifted while the compiler looks at one of ours, and only then: it goes on
to refuse the built-in. The compiler is imported by its first use, not by us.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_CONFIG = "torch._dynamo.config"
_BUILDER = "torch._dynamo.variables.builder"  # where the compiler turns a module into what it traces


def accept(base: type) -> None:
    """Makes the compiler trace instances of ``base``: now, or once it is imported."""
    if _BUILDER in sys.modules:
        _patch(sys.modules[_BUILDER], base)
    else:
        sys.meta_path.insert(0, _AfterImport(base))


def _patch(builder: ModuleType, base: type) -> None:
    config: Any = sys.modules[_CONFIG]
    if not hasattr(config, "allow_rnn"):  # nothing is refused
        return
    kind = getattr(builder, "VariableBuilder", None)
    original = getattr(kind, "wrap_module", None)
    if original is None:  # a compiler built otherwise: what a user would be told to do
        config.allow_rnn = True
        return

    @wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, base):
            return original(self, value)
        with config.patch(allow_rnn=True):
            return original(self, value)

    kind.wrap_module = wrap_module  # type: ignore[union-attr]


class _AfterImport(MetaPathFinder):
    """Patches the builder as soon as it has been imported; otherwise takes no part in imports."""

    def __init__(self, base: type) -> None:
        self.base = base

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _BUILDER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _patch(module, self.base)

            loader.exec_module = exec_module
        return spec
