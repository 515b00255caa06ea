"""Which single change to a pool helps most: try each, plan each, compare. Pure over `plan_training`.

Tried, in this order, until the planner has been called often enough: one more device of each kind in the pool;
one device of each promising kind of a catalog; each slow segment, and the slow links together, as cables of
1 Gbit/s; each device switched off; each device held in another of its power modes. Devices that are alike are
tried once. A change is never shown as worse than staying with the present plan, where that still runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from colledge.errors import ColledgeError
from colledge.plan import Plan
from colledge.planner import PlanningRequest, PoolCosts, check_memory, plan_training, predict
from colledge.planner.whatif import (
    CABLE_BYTES_PER_S,
    Changed,
    add_devices,
    cable_segment,
    cable_slow_links,
    fix_mode,
    remove_devices,
    without_missing,
)
from colledge.profiles import DeviceProfile, ModelProfile, PoolProfile
from colledge.records import Record

_EFFORT = 0.1  # of a plan for each change
_MOST_CHANGES = 20
_MOST_CATALOG_KINDS = 6
_SAME = 1e-6


class AdvisedChange(Record):
    """A single change and what the best plan then takes; `why_not` where nothing can be planned with it.

    Gains are relative to the pool as it is, positive where the change is better; None where the pool as it is
    cannot be planned for.
    """

    change: str
    step_s: float | None = Field(default=None, ge=0)
    energy_joules_per_step: float | None = Field(default=None, ge=0)
    energy_gain: float | None = None
    time_gain: float | None = None
    plan: str = ""
    notes: tuple[str, ...] = ()
    why_not: str = ""


class Advice(Record):
    """The answer: `now` is the pool as it is; `changes` the best for the objective first."""

    now: AdvisedChange
    changes: tuple[AdvisedChange, ...]
    best_for_energy: str | None
    best_for_time: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Trial:
    change: str
    changed: Changed


def advise(
    pool: PoolProfile,
    model: ModelProfile,
    request: PlanningRequest,
    catalog: Sequence[DeviceProfile] = (),
    most_changes: int = _MOST_CHANGES,
    progress: Callable[[str], None] = lambda text: None,
) -> Advice:
    """Return what each single change of a pool brings.

    Args:
        pool: The devices and links as they are.
        model: The layers and timings.
        request: What is planned for; energies follow its accounting.
        catalog: Devices that could be bought, one a kind; only the most promising are tried.
        most_changes: Changes to plan at most; the pool as it is comes on top.
        progress: Told what is being planned.
    """
    progress("planning the pool as it is")
    now, plan = _plan(_Trial("the pool as it is", Changed(pool)), model, request, None, None)
    trials = list(_trials(pool, model, request, catalog))
    tried = []
    for number, trial in enumerate(trials[:most_changes], start=1):
        progress(f"planning change {number} of {min(len(trials), most_changes)}: {trial.change}")
        tried.append(_plan(trial, model, request, now, plan)[0])
    objective = request.objective
    changes = sorted(tried, key=lambda change: _order_of(change, objective))
    possible = [change for change in changes if change.step_s is not None]
    notes = [f"{len(tried)} single changes were planned, by a shorter search than `colledge plan`'s"]
    if len(trials) > len(tried):
        notes.append(f"{len(trials) - len(tried)} more were not tried: " + _names(trials[len(tried) :]))
    return Advice(
        now=now,
        changes=tuple(changes),
        best_for_energy=_best(possible, now, "energy"),
        best_for_time=_best(possible, now, "time"),
        notes=tuple(notes),
    )


def _plan(
    trial: _Trial, model: ModelProfile, request: PlanningRequest, now: AdvisedChange | None, kept: Plan | None
) -> tuple[AdvisedChange, Plan | None]:
    """Return what a change brings, and the plan found for it: no worse than the present one where that still runs."""
    pool = trial.changed.pool
    request = without_missing(request, pool)
    stays = _as_it_was(kept, pool, model, request)
    seeds, effort = [] if stays is None else [stays], 1.0 if now is None else _EFFORT
    try:
        found = plan_training(pool, model, request, effort=effort, seeds=seeds).best
    except ColledgeError as fault:
        return AdvisedChange(change=trial.change, notes=trial.changed.notes, why_not=fault.message), None
    plans = [found, *seeds]  # seeds compete before their computations are paced
    best = min(plans, key=lambda plan: _order(*_figures(plan, request), request.objective))
    step_s, joules = _figures(best, request)
    change = AdvisedChange(
        change=trial.change,
        step_s=step_s,
        energy_joules_per_step=joules,
        energy_gain=_gain(now.energy_joules_per_step, joules) if now else None,
        time_gain=_gain(now.step_s, step_s) if now else None,
        plan=best.describe(),
        notes=trial.changed.notes,
    )
    return change, best


def _as_it_was(
    plan: Plan | None, pool: PoolProfile, model: ModelProfile, request: PlanningRequest
) -> Plan | None:
    """Return the present plan with its prediction on a changed pool, or None where it cannot run there."""
    if plan is None:
        return None
    try:
        check_memory(plan, pool, model, request.optimizer_state_factor)
        figures = predict(plan, pool, model, request.optimizer_state_factor)
    except ColledgeError:
        return None
    late = request.deadline_step_s is not None and figures.step_s > request.deadline_step_s
    return None if late else plan.model_copy(update={"prediction": figures})


def _figures(plan: Plan, request: PlanningRequest) -> tuple[float, float]:
    """Return the step's seconds, and its joules by the accounting asked for."""
    figures = plan.prediction
    assert figures is not None
    if request.accounting == "marginal":
        return figures.step_s, figures.marginal_energy_joules_per_step
    return figures.step_s, figures.energy_joules_per_step


def _gain(before: float | None, after: float) -> float | None:
    return None if not before else 1 - after / before


def _order(step_s: float | None, joules: float | None, objective: str) -> tuple[bool, float, float]:
    """Return what to sort by: least first, what has no plan last."""
    if step_s is None or joules is None:
        return True, 0.0, 0.0
    match objective:
        case "time":
            return False, step_s, joules
        case "energy-delay":
            return False, step_s * joules, joules
        case _:
            return False, joules, step_s


def _order_of(change: AdvisedChange, objective: str) -> tuple[bool, float, float]:
    return _order(change.step_s, change.energy_joules_per_step, objective)


def _best(possible: Sequence[AdvisedChange], now: AdvisedChange, objective: str) -> str | None:
    """Return the change that helps most, or None where none helps."""
    if not possible:
        return None
    best = min(possible, key=lambda change: _order_of(change, objective))
    gain = best.energy_gain if objective == "energy" else best.time_gain
    if now.step_s is not None and (gain is None or gain <= _SAME):
        return None
    return best.change


def _names(trials: Sequence[_Trial]) -> str:
    shown = ", ".join(trial.change for trial in trials[:4])
    return shown + (f" and {len(trials) - 4} others" if len(trials) > 4 else "")


def _trials(
    pool: PoolProfile, model: ModelProfile, request: PlanningRequest, catalog: Sequence[DeviceProfile]
) -> Iterator[_Trial]:
    groups = _alike(pool)
    kinds: dict[str, DeviceProfile] = {}
    for device in pool.devices:
        kinds.setdefault(device.kind, device)
    for kind, device in kinds.items():
        yield _Trial(f"one more {kind}", add_devices(pool, device))
    for device in _promising(catalog, kinds):
        yield _Trial(f"add a {device.kind} (catalog)", add_devices(pool, device))
    for segment in pool.segments:
        if segment.bandwidth_bytes_per_s < CABLE_BYTES_PER_S:
            yield _Trial(f"cables of 1 Gbit/s instead of {segment.name}", cable_segment(pool, segment.name))
    if any(link.bandwidth_bytes_per_s < CABLE_BYTES_PER_S for link in pool.links):
        yield _Trial("cables of 1 Gbit/s instead of every slower link", cable_slow_links(pool))
    if len(pool.devices) > 1:
        for device, count in groups:
            if device.id not in request.must_use:
                like = f" (one of {count} alike)" if count > 1 else ""
                yield _Trial(f"{device.id} switched off{like}", remove_devices(pool, [device.id]))
    costs = PoolCosts(pool, model)
    for device, _ in groups:
        for mode in device.modes[1:]:
            if costs.has_mode(device.id, mode.name):
                yield _Trial(f"{device.id} always in mode {mode.name}", fix_mode(pool, device.id, mode.name))


def _alike(pool: PoolProfile) -> list[tuple[DeviceProfile, int]]:
    """Return the first of each set of devices that are alike, and how many there are."""
    links: dict[str, list[tuple[float, float]]] = {device.id: [] for device in pool.devices}
    for link in pool.links:
        for end in (link.source, link.target):
            links[end].append((link.latency_s, link.bandwidth_bytes_per_s))
    found: dict[str, tuple[DeviceProfile, int]] = {}
    for device in pool.devices:
        segments = [segment.name for segment in pool.segments if device.id in segment.devices]
        look = f"{device.model_copy(update={'id': ''})!r} {segments} {sorted(links[device.id])}"
        first, count = found.get(look, (device, 0))
        found[look] = first, count + 1
    return list(found.values())


def _promising(catalog: Sequence[DeviceProfile], kinds: Mapping[str, DeviceProfile]) -> list[DeviceProfile]:
    """Return the catalog's fastest and thriftiest kinds that the pool lacks, by rates of their first mode alone."""
    timed = [
        device
        for device in catalog
        if device.kind not in kinds and device.modes[0].achieved_flops_per_s is not None
    ]

    def flops(device: DeviceProfile) -> float:
        return device.modes[0].achieved_flops_per_s or 0.0

    by_speed = sorted(timed, key=lambda d: -flops(d))
    by_thrift = sorted(timed, key=lambda d: -flops(d) / max(d.modes[0].compute_w, 1e-9))
    half = _MOST_CATALOG_KINDS // 2
    wanted = {device.kind: device for device in (*by_thrift[:half], *by_speed[:half])}
    for device in (*by_thrift, *by_speed):
        if len(wanted) < _MOST_CATALOG_KINDS:
            wanted.setdefault(device.kind, device)
    return list(wanted.values())
