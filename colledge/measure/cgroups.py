"""What Linux' control groups leave of their limits on memory: those of this process, up to the root.

/sys/fs/cgroup/machine.slice            memory.max 8 GB     the least of what any of them leaves counts
machine.slice/job.scope  memory.max 1 GB     here a process is, says /proc/self/cgroup
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class _Files(NamedTuple):
    """The files of one version: limits, what is used, and in `memory.stat` what would be given back."""

    limits: tuple[str, ...]
    used: str
    cached: str


_FILES = {
    "cgroup": _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    "cgroup2": _Files(("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


class CgroupRoom(NamedTuple):
    """A limit in bytes, and what is left of it."""

    limit_bytes: int
    left_bytes: int


def cgroup_rooms(process: Path = Path("/proc/self")) -> list[CgroupRoom]:
    """Return every limit that a process is under, and what it leaves. Page cache that was not used lately is no use.

    Args:
        process: Its folder in /proc.
    """
    rooms = []
    for version, folder in _folders(process):
        files = _FILES[version]
        used = _number(folder / files.used) or 0
        room_in_use = max(0, used - _cached_bytes(folder / "memory.stat", files.cached))
        for name in files.limits:
            limit = _number(folder / name)
            if limit is not None:
                rooms.append(CgroupRoom(limit, max(0, limit - room_in_use)))
    return rooms


def _folders(process: Path) -> Iterator[tuple[str, Path]]:
    """Yield the folders of the groups that a process is in, the innermost first, each with its version."""
    try:
        groups = (process / "cgroup").read_text(errors="replace").splitlines()
        mounts = (process / "mountinfo").read_text(errors="replace").splitlines()
    except OSError:  # no Linux
        return
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        _, _, _, root, point, *_ = fields.split()
        kind, _, options = [*rest.split(), "", "", ""][:3]
        if kind not in _FILES or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        for group in groups:
            _, controllers, path = group.split(":", 2)
            if ("memory" in controllers.split(",")) if kind == "cgroup" else not controllers:
                for inner in _within(path, root):
                    yield kind, Path(point) / inner


def _within(path: str, root: str) -> list[PurePosixPath]:
    """Return a group and those above it as paths in a mount whose root is a group itself."""
    group = PurePosixPath(path)
    inner = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()  # mounted elsewhere
    return [inner, *inner.parents]


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or `max`
        return None


def _cached_bytes(stat: Path, key: str) -> int:
    try:
        pairs = dict(line.split() for line in stat.read_text().splitlines())
        return int(pairs.get(key, 0))
    except (OSError, ValueError):
        return 0
