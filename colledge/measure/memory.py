"""Memory of this process and of its device."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
# Of both versions: the limits, what is used, and the name of what of it can be given back, in memory.stat.
_FILES = {
    "": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "memory": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def runtime_bytes(device: torch.device) -> int:
    """Return the bytes that a worker takes before any weight: the interpreter and its libraries.

    Libraries arrive page by page as they are first used, so a small product runs first. A GPU's runtime is
    not counted: `usable_bytes` is what it leaves.

    Args:
        device: Where the worker computes.
    """
    if device.type == "cuda":
        return 0
    x = torch.randn(64, 64, requires_grad=True)
    torch.nn.functional.softmax(x @ x, -1).sum().backward()  # type: ignore[no-untyped-call]
    del x
    gc.collect()
    return resident_bytes()


def allocator_overhead(device: torch.device) -> float:
    """Return the bytes that an allocator holds for each byte of activations and workspace, beside that byte.

    An estimate, not measured on the device. On CPUs glibc's heap cannot use every hole between the tensors that wait
    for their backward: 0.32 to 0.38 in a process that trains Llamas of 14 million parameters (glibc 2.36). The caching
    allocator of GPUs rounds and splits blocks; 0.1 is a guess.

    Args:
        device: Where the worker computes.
    """
    return 0.1 if device.type == "cuda" else 0.35


def usable_bytes(device: torch.device) -> int:
    """Return the bytes that training may use, runtime included: what is free now and what this process holds.

    Args:
        device: Where the worker computes.
    """
    if device.type == "cuda":
        torch.zeros((), device=device)  # makes the context, which is not ours to use
        return int(torch.cuda.mem_get_info(device)[0])
    usable = int(psutil.virtual_memory().available) + resident_bytes()
    membership = Path("/proc/self/cgroup")
    groups = cgroup_limits(membership.read_text(encoding="utf-8"), _CGROUPS) if membership.is_file() else []
    return min([usable, *(min(limit, left + resident_bytes()) for limit, left in groups)])


def cgroup_limits(membership: str, root: Path) -> list[tuple[int, int]]:
    """Return the limits on memory of a process's control groups, and the bytes that each leaves beside what is used.

    A container, a systemd unit with MemoryMax or a batch system's job may have less than the machine, and every group
    above it too. What the kernel can give back (files that are not in use) does not count as used.

    Args:
        membership: `/proc/self/cgroup`: lines of hierarchy:controllers:path.
        root: Where control groups are mounted.
    """
    found = []
    for line in membership.splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version not in _FILES:
            continue
        top = root / version
        group = top / path.lstrip("/")
        for place in (group, *group.parents):
            limits, usage, idle = _FILES[version]
            found += [room for name in limits for room in _limit(place, name, usage, idle)]
            if place == top:
                break
    return found


def _limit(group: Path, limit: str, usage: str, idle: str) -> list[tuple[int, int]]:
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
    except (OSError, ValueError):  # no such file, or `max`
        return []
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= min(used, int(stat.get(idle, 0)))
    return [(most, max(0, most - used))]
