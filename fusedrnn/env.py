"""Every environment variable the package reads, in one place."""

from __future__ import annotations

import os

BACKEND = "FUSEDRNN_BACKEND"


def backend() -> str | None:
    """Name of the backend forced by ``FUSEDRNN_BACKEND``, or None."""
    return os.environ.get(BACKEND) or None
