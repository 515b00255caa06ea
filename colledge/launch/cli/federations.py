"""The commands of a federation: federate simulate, provision, serve, join, report, status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from colledge.errors import ConfigError
from colledge.launch.cli.arguments import AsJson, Overrides, PrintCommands, make_console

app = typer.Typer(help="Federations: trees of unequal nodes that learn together.", no_args_is_help=True)

FederationFile = Annotated[
    Path, typer.Argument(help="federation.yaml: strategy, rounds, data, models, nodes.")
]


@app.command()
def simulate(
    federation_file: FederationFile,
    overrides: Overrides = None,
    migrate: Annotated[
        float, typer.Option(help="Share of the leaves that moves in every round.", min=0, max=1)
    ] = 0.0,
    print_commands: PrintCommands = False,
) -> None:
    """Run all nodes on this machine, and the devices of their pools, in virtual time."""
    from colledge.launch import federate

    federation = federate.read_federation(federation_file, overrides or [])
    if print_commands:
        typer.echo(federate.simulation_commands(federation, migrate))
        return
    federate.simulate(federation, make_console(), migrate)
    federate.report(federation.config.output, make_console())


Credentials = Annotated[
    Path | None,
    typer.Option(
        help="Where provision put certificates; default: credentials/ beside the file.", show_default=False
    ),
]


@app.command()
def provision(
    federation_file: FederationFile,
    credentials: Credentials = None,
    valid_days: Annotated[
        float, typer.Option(help="How long certificates are valid.", min=1, max=3650)
    ] = 365.0,
) -> None:
    """Make a certificate authority, and a certificate for every node."""
    from colledge.launch import federate

    folder = credentials or federation_file.parent / "credentials"
    for id, path in federate.provision(federate.read_federation(federation_file), folder, valid_days):
        typer.echo(f"{id}: copy {federation_file.name} and {path} to it")
    typer.echo(f"keep {folder / 'authority'} to yourself: its key signs certificates")


@app.command()
def serve(
    federation_file: FederationFile,
    overrides: Overrides = None,
    credentials: Credentials = None,
    print_commands: PrintCommands = False,
) -> None:
    """Run the root of a real federation, here; it goes on where it stopped."""
    _run_node(federation_file, overrides, None, None, credentials, print_commands)


@app.command()
def join(
    federation_file: FederationFile,
    overrides: Overrides = None,
    node: Annotated[str, typer.Option(help="Which node this device is.")] = ...,  # type: ignore[assignment]
    parent: Annotated[
        str | None, typer.Option(help="Another parent than the file's, from now on.", show_default=False)
    ] = None,
    credentials: Credentials = None,
    print_commands: PrintCommands = False,
) -> None:
    """Run a node below the root of a real federation, here; it goes on where it stopped."""
    _run_node(federation_file, overrides, node, parent, credentials, print_commands)


def _run_node(
    path: Path,
    overrides: list[str] | None,
    node: str | None,
    parent: str | None,
    credentials: Path | None,
    print_commands: bool,
) -> None:
    from colledge.launch import federate

    federation = federate.read_federation(path, overrides or [])
    if node == federation.tree.root:
        raise ConfigError(f"{node!r} is the root, which joins nobody.", fix="run it with serve.")
    id = node or federation.tree.root
    own = (credentials or path.parent / "credentials") / id
    if print_commands:
        typer.echo(federate.node_commands(federation, id, own, parent))
    else:
        federate.run_node(federation, id, own, parent)


@app.command()
def report(
    output: Annotated[Path, typer.Argument(help="The output folder of a federation, at its root.")],
    target: Annotated[
        float | None,
        typer.Option(help="An accuracy: rounds and joules up to it.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a federation did in accuracy, seconds, joules and bytes; writes federation.html."""
    from colledge.launch import federate

    made = federate.report(output, make_console(stderr=as_json), target)
    if as_json:
        typer.echo(made.to_json())


@app.command()
def status(
    output: Annotated[Path, typer.Argument(help="The output folder of a federation.")],
    as_json: AsJson = False,
) -> None:
    """Print where the nodes stand that run on this device."""
    from colledge.launch import federate

    found = federate.read_status(output)
    if as_json:
        typer.echo("[" + ",".join(status.to_json() for status in found) + "]")
        return
    for status in found:
        typer.echo(f"{status.node}  {status.phase}, round {status.round}, parent {status.parent or '-'}")
