"""Arguments that several commands have, and where they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

RunFile = Annotated[Path, typer.Argument(help="run.yaml: model, data, batch, steps, pool.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value changes to the file, such as seed=1.", show_default=False),
]
PrintCommands = Annotated[
    bool,
    typer.Option("--print-commands", help="Print the torchrun line of each process; start nothing."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]


def make_console(stderr: bool = False) -> Console:
    """Return where tables and sentences go."""
    from colledge.report.tables import make_console as make

    return make(stderr)
