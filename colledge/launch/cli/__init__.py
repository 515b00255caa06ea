"""The `colledge` command: reads arguments, calls `launch.run`, prints; every fault is one line and an exit code.

runs           init, profile, plan, train, report, export, generate, demo
files          config, data, catalog
federations    federate
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from colledge import __version__
from colledge.errors import ColledgeError, ConfigError, lack_of_memory, one_line
from colledge.launch.cli import federations
from colledge.launch.cli.files import catalog_app, config_app, data_app
from colledge.launch.cli.runs import app
from colledge.launch.terminal import replace_unprintable

__all__ = ["app", "main"]

app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(catalog_app, name="catalog")
app.add_typer(federations.app, name="federate")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"colledge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; print a fault as one line and exit with its code."""
    replace_unprintable()
    try:
        code = app(standalone_mode=False)
    except TyperException as fault:  # a command line that cannot be read
        context = getattr(fault, "ctx", None)
        asked = context.command_path if context is not None else "colledge"
        message = fault.format_message().rstrip(".")
        if message:  # else no command was given, and the help has been printed
            print(f"colledge: {message}. Fix: see `{asked} --help`.", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    except Exception as fault:
        said = _said_of(fault)
        if said is None:
            raise
        print(f"colledge: {said}", file=sys.stderr)
        sys.exit(said.exit_code)
    sys.exit(code if isinstance(code, int) else 0)  # 130 after Ctrl-C


def _said_of(fault: Exception) -> ColledgeError | None:
    """Return what a user is told of a fault; None of one that is colledge's own."""
    if isinstance(fault, ColledgeError):
        return fault
    said = lack_of_memory(fault)
    if said is None and isinstance(fault, OSError):
        where = f"{fault.strerror} ({str(fault.filename)[:200]})" if fault.strerror and fault.filename else ""
        said = ConfigError(
            f"{where or one_line(fault)}.", fix="make room, or give a folder that can be written."
        )
    return said
