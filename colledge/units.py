"""Quantities people write (`4 GB`, `100 Mbit/s`, `2 ms`, `8h`) to SI numbers and back.

Inside colledge everything is bytes, seconds, watts and joules; only files that people write and lines that
people read have other units.
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*$")

_BYTES = {"": 1, "B": 1}
for _power, _prefix in enumerate("kMGT", start=1):
    _BYTES[f"{_prefix}B"] = 1000**_power
    _BYTES[f"{_prefix.upper()}iB"] = 1024**_power
_BYTES["KB"] = 1000

_BYTES_PER_S = {"": 1.0, "B/s": 1.0, "bit/s": 1 / 8}
for _power, _prefix in enumerate("kMGT", start=1):
    _BYTES_PER_S[f"{_prefix}B/s"] = 1000.0**_power
    _BYTES_PER_S[f"{_prefix}bit/s"] = 1000.0**_power / 8

_PRICE_PER_KWH = {"": 1.0, "/kWh": 1.0, "/MWh": 1e-3}
_GRAMS_PER_KWH = {"": 1.0, "g/kWh": 1.0, "kg/kWh": 1e3, "kg/MWh": 1.0, "g/MWh": 1e-3, "t/MWh": 1e3}

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _parse(value: object, table: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{what} must be a number or a text such as {example!r}")
    if isinstance(value, int | float):
        return _finite(value)
    match = _NUMBER.match(value)
    if match is None or match.group(2) not in table:
        units = ", ".join(unit for unit in table if unit)
        raise ValueError(f"{value!r} is not {what}; write a number and one of {units}, such as {example!r}")
    return _finite(float(match.group(1)) * table[match.group(2)])


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("the number is infinite, no number, or too large")
    return number


def parse_bytes(value: object) -> int:
    """Return a size in bytes from `4 GB`, `512 MiB` or a plain number of bytes.

    Raises:
        ValueError: The text is not a size.
    """
    return round(_parse(value, _BYTES, "a size", "4 GB"))


def parse_bytes_per_s(value: object) -> float:
    """Return a rate in bytes per second from `100 Mbit/s`, `12 MB/s` or a plain number of bytes per second.

    Raises:
        ValueError: The text is not a rate.
    """
    return _parse(value, _BYTES_PER_S, "a rate", "100 Mbit/s")


def parse_seconds(value: object) -> float:
    """Return a duration in seconds from `2 ms`, `8h` or a plain number of seconds.

    Raises:
        ValueError: The text is not a duration.
    """
    return _parse(value, _SECONDS, "a duration", "2 ms")


def parse_price_per_kwh(value: object) -> float:
    """Return money a kilowatt-hour, in whatever currency, from `0.30/kWh`, `300/MWh` or a plain number.

    Raises:
        ValueError: The text is not a price.
    """
    return _parse(value, _PRICE_PER_KWH, "a price of electricity", "0.30/kWh")


def parse_grams_per_kwh(value: object) -> float:
    """Return grams of CO2 a kilowatt-hour from `350g/kWh`, `0.35 kg/kWh` or a plain number of grams.

    Raises:
        ValueError: The text is not a carbon intensity.
    """
    return _parse(value, _GRAMS_PER_KWH, "a carbon intensity", "350g/kWh")


Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema({"type": ["integer", "string"]})]
BytesPerSecond = Annotated[
    float, BeforeValidator(parse_bytes_per_s), WithJsonSchema({"type": ["number", "string"]})
]
Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema({"type": ["number", "string"]})]


def format_bytes(num_bytes: float) -> str:
    """Return a size with a decimal unit, such as `1.50 GB`."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Return a duration that is easy to read: `850 us`, `12.3 ms`, `4.56 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def format_count(number: int, noun: str, plural: str = "s") -> str:
    """Return how many there are of something: `1 round`, `5 rounds`."""
    return f"{number} {noun}{'' if number == 1 else plural}"


def format_joules(joules: float) -> str:
    """Return an energy as J, kJ or MJ."""
    if abs(joules) < 1000:
        return f"{joules:.3g} J"
    if abs(joules) < 1e6:
        return f"{joules / 1e3:.3g} kJ"
    return f"{joules / 1e6:.3g} MJ"
