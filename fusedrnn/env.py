"""Every environment variable the package reads, in one place."""

from __future__ import annotations

import os

BACKEND = "FUSEDRNN_BACKEND"
# Read by csrc/cpu/dispatch.cpp: one of CPU_ISAS, instead of the widest the processor runs.
CPU_ISA = "FUSEDRNN_CPU_ISA"
CPU_ISAS = ("portable", "avx2", "avx512", "avx512bf16")  # csrc/cpu/kernels.h has the same
# Read at every call by csrc/ops/schedule.cpp: how the CUDA kernels run a sequence. ``stepwise`` is the kill
# switch of the persistent kernels; ``block``, ``cluster`` and ``grid`` demand one of them, or an error. The
# triton backend reads it too and knows all of these but ``cluster``; ``grid:16``, ``grid:32`` and ``grid:64``
# name the units of a program as well.
SCHEDULE = "FUSEDRNN_SCHEDULE"
# Triton's own: its kernels run on the CPU, slowly and for tests. Set before Triton is imported.
INTERPRET = "TRITON_INTERPRET"


def backend() -> str | None:
    """Name of the backend forced by ``FUSEDRNN_BACKEND``, or None."""
    return os.environ.get(BACKEND) or None


def schedule() -> str | None:
    """What ``FUSEDRNN_SCHEDULE`` demands, or None."""
    return os.environ.get(SCHEDULE) or None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get(INTERPRET) == "1"
