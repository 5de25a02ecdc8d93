"""``python -m fusedrnn`` and the command ``fusedrnn``."""

from __future__ import annotations

import sys

_ASK = "The command line of fusedrnn needs {}; type: pip install 'fusedrnn[cli]'"


def main() -> None:
    """Runs the command line; says what to install where its packages are missing."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(_ASK.format(error.name))
    from .cli import app

    app(prog_name="fusedrnn")


if __name__ == "__main__":
    main()
