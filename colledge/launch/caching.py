"""The activation cache of a run: which rows it needs, what they take on which disk, and filling it before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from colledge.data import Rows, rows_for_step
from colledge.data.batch import ROW, Batch
from colledge.errors import ConfigError
from colledge.launch.inputs import RunData
from colledge.launch.job import Job
from colledge.launch.run_config import RunConfig
from colledge.launch.step_metrics import device_figures
from colledge.parallel import Engine, World
from colledge.parallel.caching import ActivationCaches, FillStep, rows_read
from colledge.plan import Plan
from colledge.planner.caching import CachePlan
from colledge.profiles import PowerMode
from colledge.report.caching import CacheFill
from colledge.units import format_bytes

NumRows = tuple[int, int]  # of the training data and of the validation data


def numbered(rows: Rows, indices: Tensor, first: int = 0) -> Batch:
    """Return rows as a batch that says their numbers in the run's data; those of `rows` begin at `first`."""
    batch = rows.batch(indices)
    return replace(batch, inputs={**batch.inputs, ROW: indices + first})


def cached_batches(run: RunConfig, num_rows: NumRows) -> Iterator[Tensor]:
    """Yield the numbers of the rows of every batch that a run trains on or validates with.

    Validation rows count on from the training rows; the last of them fills its batch up, as the engine does.
    """
    size = run.batch.global_size
    for step in range(run.steps):
        yield rows_for_step(num_rows[0], size, run.seed, step)
    last = sum(num_rows) - 1
    for start in range(num_rows[0], sum(num_rows), size):
        yield torch.arange(start, start + size).clamp(max=last)


def disk_sentence(plan: Plan, cache: CachePlan, run: RunConfig, num_rows: NumRows) -> str:
    """Return what the activation cache takes on each device's disk.

    Raises:
        ConfigError: On one it is more than the limit.
    """
    assert run.activation_cache is not None
    limit = run.activation_cache.limit_bytes
    rows = rows_read(plan, cached_batches(run, num_rows))
    sizes = {device: len(read) * cache.row_bytes for device, read in rows.items()}
    fullest = max(sizes, key=lambda device: sizes[device])
    if sizes[fullest] > limit:
        raise ConfigError(
            f"the activation cache of device {fullest!r} takes {format_bytes(sizes[fullest])} of its disk "
            f"({len(rows[fullest])} rows of {format_bytes(cache.row_bytes)}), activation_cache.limit is "
            f"{format_bytes(limit)}.",
            fix="raise the limit, train on less data or shorter rows, or take activation_cache out.",
        )
    shares = ", ".join(f"{device} {format_bytes(size)}" for device, size in sizes.items())
    return f"activation cache on disk: {shares} (limit {format_bytes(limit)})"


def fill_caches(
    job: Job,
    world: World,
    ranks: Mapping[str, int],
    data: RunData,
    plan: Plan,
    cache: CachePlan,
    row_shape: tuple[int, ...],
    modes: Mapping[str, PowerMode],
    prefix_engine: Callable[[Plan], Engine],
) -> tuple[ActivationCaches, CacheFill]:
    """Open the caches of the devices that read them, and compute what is missing.

    Args:
        job: The training.
        world: The processes.
        ranks: Of every device of the run.
        data: The rows.
        plan: That trains from the caches.
        cache: What computes them.
        row_shape: Of one row's activations.
        modes: The power mode of every device of the pool.
        prefix_engine: Makes the engine of a plan.

    Returns:
        The open caches, and what filling them took.
    """
    num_train = data.train.num_rows
    readers = rows_read(plan, cached_batches(job.run, data.num_rows))
    key = _key(job, data, plan)
    caches = ActivationCaches(world.wire, ranks, readers, key, row_shape, job.run.precision)
    missing = caches.open()
    fill = CacheFill()
    if len(missing) == 0:
        return caches, fill
    engine = prefix_engine(cache.prefix)
    parts = [caches.fill(engine, missing[missing < num_train], lambda rows: numbered(data.train, rows))]
    held = data.validation
    if held is not None:
        later = missing[missing >= num_train]
        parts.append(caches.fill(engine, later, lambda rows: numbered(held, rows - num_train, num_train)))
    for step in chain(*parts):
        fill = _add(fill, step, modes)
        print(f"activation cache: {fill.num_rows} of {len(missing)} rows", flush=True)
    engine.close()
    return caches, fill


def _add(fill: CacheFill, step: FillStep, modes: Mapping[str, PowerMode]) -> CacheFill:
    figures = device_figures(step.step_s, step.devices, modes)
    joules = sum(one.energy_joules for one in figures.values())
    return CacheFill(
        num_rows=fill.num_rows + step.num_rows,
        seconds=fill.seconds + step.step_s,
        energy_joules=fill.energy_joules + joules,
    )


def _key(job: Job, data: RunData, plan: Plan) -> str:
    """Return a name that changes with whatever cached activations depend on."""
    run, digest = job.run, hashlib.sha256()
    for rows in (data.train, data.validation):
        if rows is not None:
            digest.update(rows.ids.numpy().tobytes() + rows.lengths.numpy().tobytes())
    files = sorted(path for path in Path(job.model).iterdir() if path.suffix in (".json", ".safetensors"))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    versions = [version(name) for name in ("colledge", "torch", "transformers")]
    settings = (run.precision, run.mixed_precision, run.frozen_precision, plan.layer_range)
    digest.update(repr((str(job.model), stamps, versions, settings)).encode())
    return digest.hexdigest()[:32]
