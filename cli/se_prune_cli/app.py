"""The application: its commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import importlib
import logging
import sys

import typer

from se_prune import __version__
from se_prune.errors import SePruneError
from se_prune_cli.output import Notices

app = typer.Typer(
    name="se-prune",
    help="Make a Squeeze-and-Excitation network smaller, guided by its own gates.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS = (
    "demo",
    "archs",
    "inspect",
    "analyze",
    "apply",
    "finetune",
    "evaluate",
    "bench",
    "sweep",
    "report",
    "export",
    "train",
    "run",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"se-prune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


for _name in COMMANDS:
    app.command(_name)(importlib.import_module(f"se_prune_cli.commands.{_name}").command)


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 1, 2 or 3."""
    log = logging.getLogger("se_prune")
    if not any(isinstance(handler, Notices) for handler in log.handlers):
        log.addHandler(Notices())
    try:
        app()
    except SePruneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
