"""Why this plan and not the others, in plain sentences with numbers."""

from __future__ import annotations

from collections.abc import Mapping

from colledge.plan import Plan
from colledge.planner.request import PlanBounds, PlanningRequest
from colledge.profiles import ModelProfile, PoolProfile
from colledge.profiles.device import Source
from colledge.units import format_joules, format_seconds

_NOISY_SPREAD = 0.1


def joules(plan: Plan, request: PlanningRequest) -> float:
    """Return a plan's predicted energy of a step under the request's accounting."""
    assert plan.prediction is not None
    if request.accounting == "marginal":
        return plan.prediction.marginal_energy_joules_per_step
    return plan.prediction.energy_joules_per_step


def explain(
    best: Plan,
    families: Mapping[str, Plan],
    bounds: PlanBounds,
    request: PlanningRequest,
    pool: PoolProfile,
    model: ModelProfile,
) -> list[str]:
    """Return the reasons for a choice, most important first."""
    reasons = [_choice(best, bounds, request)]
    reasons += _one_machine(best, families, request)
    reasons += [_rival(name, plan, best, request) for name, plan in families.items() if name != best.family]
    reasons += _left_out(best, request, pool)
    reasons += _memory(best)
    reasons += _estimates(best, pool, model)
    return reasons


def _figures(plan: Plan, request: PlanningRequest) -> str:
    assert plan.prediction is not None
    return f"{format_seconds(plan.prediction.step_s)} and {format_joules(joules(plan, request))} a step"


def _choice(best: Plan, bounds: PlanBounds, request: PlanningRequest) -> str:
    assert best.prediction is not None
    goal = {"energy": "least energy", "time": "least time", "energy-delay": "least energy x time"}
    text = f"Chosen for {goal[request.objective]}"
    if request.deadline_step_s is not None:
        text += f" within {format_seconds(request.deadline_step_s)} a step"
    text += f" ({request.accounting} accounting): {best.describe()}, predicted {_figures(best, request)}"
    ratios = []
    if bounds.step_s > 0:
        ratios.append(f"{best.prediction.step_s / bounds.step_s:.2f} times the least possible time")
    if bounds.energy_joules_per_step > 0:
        ratio = joules(best, request) / bounds.energy_joules_per_step
        ratios.append(f"{ratio:.2f} times the least possible energy")
    return text + (f"; that is {' and '.join(ratios)}." if ratios else ".")


def _one_machine(best: Plan, families: Mapping[str, Plan], request: PlanningRequest) -> list[str]:
    single = families.get("single")
    if best.family != "single":
        return [] if single else ["No single device can hold this model; only a pool can train it."]
    others = [plan for name, plan in families.items() if name != "single"]
    if not others:
        return []
    rival = min(others, key=lambda plan: _wanted(plan, request))
    return [
        f"The pool is worse than one machine here: {best.devices[0]} alone takes {_figures(best, request)}, "
        f"the best plan of several devices ({rival.describe()}) {_figures(rival, request)}."
    ]


def _wanted(plan: Plan, request: PlanningRequest) -> float:
    assert plan.prediction is not None
    match request.objective:
        case "time":
            return plan.prediction.step_s
        case "energy":
            return joules(plan, request)
        case "energy-delay":
            return plan.prediction.step_s * joules(plan, request)


def _rival(name: str, plan: Plan, best: Plan, request: PlanningRequest) -> str:
    assert plan.prediction is not None
    assert best.prediction is not None
    parts = []
    for what, mine, other in (
        ("time", best.prediction.step_s, plan.prediction.step_s),
        ("energy", joules(best, request), joules(plan, request)),
    ):
        if mine > 0:
            parts.append(f"{100 * (other / mine - 1):+.0f} % {what}")
    late = request.deadline_step_s is not None and plan.prediction.step_s > request.deadline_step_s
    return f"Best {name} plan: {plan.describe()}, {_figures(plan, request)} ({', '.join(parts)})" + (
        ", which misses the deadline." if late else "."
    )


def _left_out(best: Plan, request: PlanningRequest, pool: PoolProfile) -> list[str]:
    assert best.prediction is not None
    out = [device for device in pool.devices if device.id not in best.devices]
    if not out:
        return []
    idle = sum(device.modes[0].idle_w for device in out) * best.prediction.step_s
    names = ", ".join(device.id for device in out)
    refused = [device.id for device in out if device.id in request.must_not_use]
    why = "on request" if len(refused) == len(out) else "as no plan with them is better"
    counted = "counted" if request.accounting == "whole-pool" else "not counted"
    return [
        f"Left out {why}: {names}. Idle, they draw {format_joules(idle)} a step ({counted} in the energy above); "
        "switching them off saves that."
    ]


def _memory(best: Plan) -> list[str]:
    stages = [str(s) for s in range(best.num_stages) if best.recomputes(s)]
    if not stages:
        return []
    return [
        f"Activations are computed again in the backward pass of stage {', '.join(stages)} to fit in memory."
    ]


def _estimates(best: Plan, pool: PoolProfile, model: ModelProfile) -> list[str]:
    notes = []
    sources: dict[Source, list[str]] = {}
    for place in best.places():
        source = pool.device(place.shard.device).mode(place.shard.mode).source
        if source != "measured":
            sources.setdefault(source, []).append(place.shard.device)
    for source, devices in sources.items():
        notes.append(f"Estimate: the watts of {', '.join(devices)} are {source}, not measured.")
    kinds = {pool.device(device).kind for device in best.devices}
    noisy = [row for row in model.timings if row.device_kind in kinds and row.spread > _NOISY_SPREAD]
    if noisy:
        worst = max(noisy, key=lambda row: row.spread)
        notes.append(
            f"Estimate: {len(noisy)} timings are noisy; the worst is {worst.layer_kind!r} on {worst.device_kind!r} "
            f"with a spread of {100 * worst.spread:.0f} %."
        )
    return notes
