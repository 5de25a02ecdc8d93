"""The command line: ``fusedrnn info``, ``verify`` and ``bench``. Its packages are the extra ``cli``."""

from __future__ import annotations

import typer

from . import bench, info, verify

app = typer.Typer(
    help="Fused recurrent layers for PyTorch: what is installed, whether it is right here, and how fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
app.command("info")(info.info)
app.command("verify")(verify.verify_command)
app.command("bench")(bench.bench)


@app.callback()
def _commands() -> None:
    """Keeps commands by name, however few there are."""
