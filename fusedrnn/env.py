"""Every environment variable the package reads, in one place."""

from __future__ import annotations

import os

BACKEND = "FUSEDRNN_BACKEND"
# Read by csrc/cpu/dispatch.cpp: avx512, avx2 or portable, instead of the widest the processor runs.
CPU_ISA = "FUSEDRNN_CPU_ISA"


def backend() -> str | None:
    """Name of the backend forced by ``FUSEDRNN_BACKEND``, or None."""
    return os.environ.get(BACKEND) or None
