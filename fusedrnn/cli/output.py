"""Where the commands write."""

from __future__ import annotations

from rich.console import Console

LOG_WIDTH = 150  # a log file has no width; the tables need this one


def make_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console
