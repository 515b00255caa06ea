"""`colledge catalog`: what is known of devices that can be bought, and how well. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colledge.profiles.catalog import CatalogDevice, Figure
from colledge.units import format_bytes


def devices_to_json(devices: Iterable[CatalogDevice]) -> str:
    """Return entries for programs: their figures, sources, and which of the figures are estimates."""
    return json.dumps([_values(device) for device in devices], indent=2)


def device_to_json(device: CatalogDevice) -> str:
    """Return one entry for programs."""
    return json.dumps(_values(device), indent=2)


def _values(device: CatalogDevice) -> dict[str, object]:
    return {**device.model_dump(mode="json"), "estimated": list(device.estimated)}


def show_devices(devices: Iterable[CatalogDevice], console: Console) -> None:
    """Print a line a device: its default mode, and how many of the figures are estimates."""
    table = _table("kind", "device", "mode", ">memory", ">GFLOP/s", ">compute", ">idle", ">estimated")
    for device in devices:
        mode = device.mode()
        table.add_row(
            device.kind,
            device.title,
            mode.name,
            format_bytes(device.usable_memory_bytes),
            f"{mode.achieved_flops_per_s / 1e9:,.0f}",
            f"{mode.compute_w:g} W",
            f"{mode.idle_w:g} W",
            f"{len(device.estimated)} of {len(device.figures)}",
        )
    console.print(table)


def show_device(device: CatalogDevice, console: Console) -> None:
    """Print every figure of a device with its source."""
    console.print(f"{device.kind}: {device.title}; default mode {device.default_mode}", highlight=False)
    table = _table("figure", ">value", "", "source")
    for figure in device.figures:
        table.add_row(
            figure.path, _value(figure), "estimated" if figure.estimated else "", Text(figure.source)
        )
    console.print(table)


def _value(figure: Figure) -> str:
    if figure.path.endswith("_w"):
        return f"{figure.value:g} W"
    if figure.path.endswith("memory_bytes_per_s"):
        return f"{figure.value / 1e9:g} GB/s"
    if figure.path.endswith("flops_per_s"):
        return f"{figure.value / 1e9:,.4g} GFLOP/s"
    if figure.path == "allocator_overhead":
        return f"{figure.value:g}"
    return format_bytes(figure.value)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if column != name else "left", overflow="fold")
    return table
