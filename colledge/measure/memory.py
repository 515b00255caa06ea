"""Memory of this process and of its device."""

from __future__ import annotations

import gc

import psutil
import torch

from colledge.measure.cgroups import cgroup_rooms


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
    held = resident_bytes()
    usable = int(psutil.virtual_memory().available) + held
    for room in cgroup_rooms():  # a container, a unit or a job may have less than its machine
        usable = min(usable, room.limit_bytes, room.left_bytes + held)
    return usable
