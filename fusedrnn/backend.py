"""Which backends exist, whether each can be used here and why not, and how one is forced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

from . import env, libraries

_forced: ContextVar[str | None] = ContextVar("fusedrnn_backend", default=None)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used in this process.

    Attributes:
        name: one of ``cuda``, ``triton``, ``cpu``, ``emulator``, ``torch``, ``reference``.
        available: True if it serves at least one kind of problem here.
        reason: why it is not available; empty if it is.
    """

    name: str
    available: bool
    reason: str = ""


def backends() -> dict[str, BackendStatus]:
    """Returns the status of every backend, by name.

    ``cuda``, ``triton`` and ``cpu`` are this package's kernels, ``torch`` is the built-in that ``torch.nn``
    uses, and ``reference`` is a differentiable loop of torch operations. Slowly, for tests, and only where
    they are forced, two more serve CPU tensors: ``emulator`` runs the CUDA kernels there, and ``triton`` its
    own with ``TRITON_INTERPRET=1``.
    """
    return {name: BackendStatus(name, not reason, reason) for name, reason in reasons().items()}


@cache
def reasons() -> dict[str, str]:
    """For every backend, why it is not available; empty if it is."""
    return {
        "cuda": libraries.cuda_reason(),
        "triton": libraries.triton_reason(),
        "cpu": libraries.cpu_reason(),
        "emulator": libraries.emulator_reason(),
        "torch": "",
        "reference": "",
    }


def forced() -> str | None:
    """The backend forced by :func:`use_backend` or ``FUSEDRNN_BACKEND``, or None.

    Raises:
        ValueError: ``FUSEDRNN_BACKEND`` names no backend.
    """
    return _forced.get() or _of_environment()


@cache
def _of_environment() -> str | None:
    # Read once: a look at the environment is a fiftieth of the shortest call.
    name = env.backend()
    if name is not None:
        _check_name(name, f"{env.BACKEND}=")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside a ``with`` block, for the current thread or task.

    A problem the backend cannot serve raises; nothing falls back silently. A forward pass that ran in the
    block keeps its backend for its backward pass.

    Args:
        name: a key of :func:`backends`.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here; the message says why.
    """
    _check_name(name, "")
    if reasons()[name]:
        raise RuntimeError(f"backend {name!r} is not available: {reasons()[name]}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _check_name(name: str, prefix: str) -> None:
    if name not in reasons():
        raise ValueError(f"{prefix}{name!r} is not a backend; choose from {', '.join(reasons())}")
