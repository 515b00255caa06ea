"""Addresses of machines: which ones others can reach, and which of ours leads to them."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from colledge.errors import ConfigError

_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_DISCARD_PORT = 9


def check_address(text: str) -> str:
    """Return an address or a host name.

    Raises:
        ValueError: It is neither, such as one with a user, a port or brackets.
    """
    if _parsed(text) is None and (not _NAME.fullmatch(text) or re.fullmatch(r"[0-9.]+", text)):
        raise ValueError("wanted an address or a host name alone, such as 192.168.1.10, fd00::1 or desk.lan")
    return text


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def address_family(address: str) -> socket.AddressFamily:
    """Return the family of an address; of a name the first that it has."""
    if _parsed(address) is None:
        found = _look_up(address)
        address = found or address
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _look_up(host: str) -> str | None:
    """Return the address of a host, None where it has none that is known here."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return None


def reachable_address(host: str, device: str) -> str:
    """Return the address of a device's host. On the device itself its name often means 127.0.1.1.

    Raises:
        ConfigError: The host is not known here, or is this machine.
    """
    address = _look_up(host)
    if address is None:
        raise ConfigError(
            f"device {device!r}: its host {host!r} has no address that is known here.",
            fix="write the device's address in its network as host in pool.yaml.",
        )
    if _stays_here(address):
        raise ConfigError(
            f"device {device!r}: its host {host!r} is {address}, which leads every machine to itself.",
            fix="write host: local for this machine, or the device's address in its network.",
        )
    return address


def check_coordinator(address: str, device: str, theirs: str) -> None:
    """Check that a device on another machine can reach the coordinator at an address.

    Args:
        address: Or name, from pool.yaml.
        device: Named where it cannot.
        theirs: The device's own address.

    Raises:
        ConfigError: The address leads the device to itself, or is of the other family.
    """
    ours = _look_up(address)
    if ours is not None and not _stays_here(ours) and (":" in ours) == (":" in theirs) and "%" not in address:
        return
    known = "" if ours in (None, address) else f" ({ours})"
    towards = _own_address_towards(theirs)
    raise ConfigError(
        f"device {device!r} is on another machine and cannot reach the coordinator at {address}{known}.",
        fix="set coordinator.address in pool.yaml to this machine's address in their network"
        + (f", such as {towards}." if towards is not None else "."),
    )


def _stays_here(address: str) -> bool:
    parsed = _parsed(address)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed is None or parsed.is_loopback or parsed.is_unspecified


def _own_address_towards(address: str) -> str | None:
    """Return this machine's address on the route to another one."""
    with socket.socket(address_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _DISCARD_PORT))  # sends nothing: it only asks the kernel for the route
            own = str(probe.getsockname()[0])
        except OSError:
            return None
    return None if _stays_here(own) else own
