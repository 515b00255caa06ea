"""A step as a line of metrics.jsonl: what each device did, and the joules that its watts make of it."""

from __future__ import annotations

from collections.abc import Mapping

from colledge.launch.job import Job
from colledge.parallel import DeviceStep, StepRecord
from colledge.plan import DeviceFigures, Plan
from colledge.profiles import PoolProfile, PowerMode
from colledge.report import StepMetrics


def step_metrics(record: StepRecord, modes: Mapping[str, PowerMode], learning_rate: float) -> StepMetrics:
    """Return a step's line of metrics.jsonl; the joules are modelled from each device's watts.

    Args:
        record: What the engine measured.
        modes: The power mode of every device of the pool; one that took no part in the step idled.
        learning_rate: Of the step.
    """
    devices = device_figures(record.step_s, record.devices, modes)
    return StepMetrics(
        step=record.step,
        loss=record.loss,
        step_s=record.step_s,
        tokens=record.num_targets,
        energy_joules=sum(figures.energy_joules for figures in devices.values()),
        learning_rate=learning_rate,
        gradient_norm=record.gradient_norm,
        devices=devices,
    )


def device_figures(
    step_s: float, devices: Mapping[str, DeviceStep], modes: Mapping[str, PowerMode]
) -> dict[str, DeviceFigures]:
    """Return what every device of the pool did in some seconds, and its joules, modelled from its watts.

    Args:
        step_s: The seconds.
        devices: What those did that took part; the others idled.
        modes: The power mode of every device of the pool.
    """
    figures = {}
    for id, mode in modes.items():
        own = devices.get(id)
        compute_s = min(own.compute_s, step_s) if own else 0.0
        communicate_s = min(own.communicate_s, step_s - compute_s) if own else 0.0
        figures[id] = DeviceFigures(
            compute_s=compute_s,
            communicate_s=communicate_s,
            idle_s=step_s - compute_s - communicate_s,
            energy_joules=mode.joules(step_s, compute_s, communicate_s),
            peak_memory_bytes=own.peak_memory_bytes if own else None,
            source="modelled",
        )
    return figures


def power_modes(job: Job, plan: Plan, pool: PoolProfile | None) -> dict[str, PowerMode]:
    """Return the mode of every device: the one its shard runs in where profiled, else what pool.yaml declares."""
    chosen = {place.shard.device: place.shard.mode for place in plan.places()}
    profiled = {device.id: device for device in pool.devices} if pool is not None else {}
    modes = {}
    for device in job.pool.devices:
        known = profiled.get(device.id)
        modes[device.id] = known.mode(chosen.get(device.id)) if known is not None else device.power_mode()
    return modes
