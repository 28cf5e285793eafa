"""The application: its commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import importlib
import logging
import sys

import typer

from se_prune import __version__, distributed
from se_prune.errors import SePruneError, UsageError
from se_prune_cli.output import Notices, silence

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
#: Those that several processes of torchrun can share.
SHARED = frozenset({"analyze", "apply", "finetune", "evaluate", "train", "run"})


def _version(show: bool) -> None:
    if show:
        typer.echo(f"se-prune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    del version
    if not distributed.launched():
        return
    distributed.start()
    if not distributed.is_main():
        silence()
    if context.invoked_subcommand not in SHARED:
        raise UsageError(
            f"`se-prune {context.invoked_subcommand}` runs in one process: start it without torchrun, which serves "
            f"{', '.join(sorted(SHARED))}."
        )


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
        if distributed.fails_first():
            typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception:
        distributed.fails_first()  # what the others then say about it is not worth saying
        raise
