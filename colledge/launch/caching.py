"""The activation cache of a run: which rows it needs, what they take on which disk, and filling it before training."""

from __future__ import annotations

import hashlib
import time
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
from colledge.launch.job import FILLING, LINE_EVERY_S, Job
from colledge.launch.run_config import RunConfig
from colledge.launch.step_metrics import device_figures
from colledge.launch.stop import StopRequest
from colledge.parallel import Engine, RouteEstimate, Wire
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


def caches_of(
    job: Job,
    wire: Wire,
    ranks: Mapping[str, int],
    data: RunData,
    plan: Plan,
    row_shape: tuple[int, ...],
    routes: Mapping[str, Mapping[str, RouteEstimate]],
) -> ActivationCaches:
    """Return the caches of the devices that read activations in a run, not yet open.

    Args:
        job: The training.
        wire: This rank's messages.
        ranks: Of every device of the run.
        data: The rows.
        plan: That trains from the caches.
        row_shape: Of one row's activations.
        routes: Measured, by target and source.
    """
    assert job.run.activation_cache is not None
    readers = rows_read(plan, cached_batches(job.run, data.num_rows))
    key, limit = _key(job, data, plan), job.run.activation_cache.limit_bytes
    return ActivationCaches(wire, ranks, readers, key, row_shape, job.run.precision, limit, routes)


def fill_caches(
    caches: ActivationCaches,
    prefix: Callable[[], Engine],
    data: RunData,
    modes: Mapping[str, PowerMode],
    stop: StopRequest,
) -> CacheFill:
    """Open caches, compute what is missing in them until asked to stop, and return what that took.

    Args:
        caches: Of a run.
        prefix: Makes the engine of the layers before the cached boundary; not called where nothing is missing.
        data: The run's rows.
        modes: The power mode of every device of the pool.
        stop: Whether to stop.
    """
    missing, fill, printed_s = caches.open(), CacheFill(), 0.0
    if len(missing) == 0:
        return fill
    engine, num_train, held = prefix(), data.train.num_rows, data.validation
    parts = [caches.fill(engine, missing[missing < num_train], lambda rows: numbered(data.train, rows))]
    if held is not None:
        later = missing[missing >= num_train]
        parts.append(caches.fill(engine, later, lambda rows: numbered(held, rows - num_train, num_train)))
    for step in chain(*parts):
        fill += _fill_of(step, modes)
        if time.monotonic() - printed_s >= LINE_EVERY_S or fill.num_rows == len(missing):
            printed_s = time.monotonic()
            print(f"{FILLING} {fill.num_rows} of {len(missing)} rows", flush=True)
        if stop.asked:
            break
    engine.close()
    return fill


def _fill_of(step: FillStep, modes: Mapping[str, PowerMode]) -> CacheFill:
    figures = device_figures(step.step_s, step.devices, modes).values()
    joules = sum(one.energy_joules for one in figures)
    return CacheFill(num_rows=step.num_rows, seconds=step.step_s, energy_joules=joules)


def _key(job: Job, data: RunData, plan: Plan) -> str:
    """Return a name that changes with whatever cached activations depend on."""
    run, digest = job.run, hashlib.sha256()
    for rows in (data.train, data.validation):
        if rows is not None:
            digest.update(rows.digest.encode())
    files = sorted(path for path in Path(job.model).iterdir() if path.suffix in (".json", ".safetensors"))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    versions = [version(name) for name in ("colledge", "torch", "transformers")]
    settings = (run.precision, run.mixed_precision, run.frozen_precision, plan.layer_range)
    digest.update(repr((str(job.model), stamps, versions, settings)).encode())
    return digest.hexdigest()[:32]
