"""Joules of a step from its timeline and the devices' power modes.

    E_d = idle_w * step_s + (compute_w - idle_w) * compute_s + (communicate_w - idle_w) * communicate_s

Whole-pool energy counts devices left out as idle in their first mode; marginal energy leaves them out too.
"""

from __future__ import annotations

from collections.abc import Mapping

from colledge.plan import DeviceFigures, Plan, StepFigures
from colledge.planner.memory import MemoryParts
from colledge.profiles import DeviceProfile, PoolProfile
from colledge.schedule import DeviceTimes, Timeline


def device_joules(device: DeviceProfile, mode_name: str | None, step_s: float, times: DeviceTimes) -> float:
    """Return the energy of one device in a step; paced computations draw the watts of their own mode."""
    mode = device.mode(mode_name)
    joules = mode.joules(step_s, times.compute_s, times.communicate_s)
    return joules + sum((device.mode(name).compute_w - mode.compute_w) * s for name, s in times.paced_s)


def plan_joules(plan: Plan, pool: PoolProfile, timeline: Timeline) -> tuple[float, float]:
    """Return the whole-pool and the marginal energy of a step, in joules."""
    marginal = idle = 0.0
    modes = {place.shard.device: place.shard.mode for place in plan.places()}
    for device in pool.devices:
        if device.id in modes:
            marginal += device_joules(device, modes[device.id], timeline.step_s, timeline.devices[device.id])
        else:
            idle += device.modes[0].idle_w * timeline.step_s
    return marginal + idle, marginal


def step_figures(
    plan: Plan, pool: PoolProfile, timeline: Timeline, memory: Mapping[str, MemoryParts]
) -> StepFigures:
    """Return a plan's prediction: every device of the pool, those left out idle all the step."""
    whole, marginal = plan_joules(plan, pool, timeline)
    modes = {place.shard.device: place.shard.mode for place in plan.places()}
    devices = {}
    for device in pool.devices:
        times = timeline.devices.get(device.id, DeviceTimes(0.0, 0.0, timeline.step_s))
        devices[device.id] = DeviceFigures(
            compute_s=times.compute_s,
            communicate_s=times.communicate_s,
            idle_s=times.idle_s,
            energy_joules=max(0.0, device_joules(device, modes.get(device.id), timeline.step_s, times)),
            peak_memory_bytes=memory[device.id].total_bytes if device.id in memory else None,
        )
    return StepFigures(
        step_s=timeline.step_s,
        energy_joules_per_step=max(0.0, whole),
        marginal_energy_joules_per_step=max(0.0, marginal),
        devices=devices,
    )
