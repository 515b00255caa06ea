"""The commands that look at files and devices: config schema, data check, catalog list, catalog show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from colledge.launch.cli.arguments import AsJson, make_console
from colledge.settings import LossOn

config_app = typer.Typer(help="The formats of the files.", no_args_is_help=True)
data_app = typer.Typer(help="Training data.", no_args_is_help=True)
catalog_app = typer.Typer(
    help="Devices that can be planned with before they are bought.", no_args_is_help=True
)


@config_app.command()
def schema(name: Annotated[str, typer.Argument(help="run, pool, plan, report, ...")]) -> None:
    """Print the JSON schema of a file."""
    from colledge.launch.schemas import schema_text

    typer.echo(schema_text(name))


@data_app.command("check")
def data_check(
    file: Annotated[
        Path, typer.Argument(help="A .jsonl, .json, .parquet or .txt, a folder of them, or a pattern.")
    ],
    model: Annotated[
        str | None, typer.Option(help="A model's folder or hub id: shows tokens by its tokenizer.")
    ] = None,
    loss_on: Annotated[LossOn, typer.Option(help="What the loss counts.")] = "all",
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.", min=2)] = 512,
) -> None:
    """Print what a data file holds: counts, lengths, three samples with what the loss counts, and every fault."""
    from colledge.data import load_tokenizer
    from colledge.launch.data_check import check_file
    from colledge.launch.inputs import find_model

    tokenizer = load_tokenizer(find_model(model)) if model is not None else None
    check_file(file, tokenizer, loss_on, sequence_length, make_console())


@catalog_app.command("list")
def catalog_list(as_json: AsJson = False) -> None:
    """List the devices, and how many of their figures are estimates."""
    from colledge.launch import catalog
    from colledge.profiles.catalog import read_catalog

    devices = read_catalog().values()
    if as_json:
        typer.echo(catalog.devices_to_json(devices))
    else:
        catalog.show_devices(devices, make_console())


@catalog_app.command("show")
def catalog_show(
    kind: Annotated[str, typer.Argument(help="Such as jetson-orin-nano.")], as_json: AsJson = False
) -> None:
    """Print every figure of a device with its source."""
    from colledge.launch import catalog
    from colledge.profiles.catalog import catalog_device

    device = catalog_device(kind)
    if as_json:
        typer.echo(catalog.device_to_json(device))
    else:
        catalog.show_device(device, make_console())
