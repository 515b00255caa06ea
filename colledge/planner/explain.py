"""Why this plan and not the others, and what limits it, in plain sentences with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from colledge.plan import Plan, Replica, Shard, Stage
from colledge.planner.cost import PoolCosts
from colledge.planner.limits import Limits, find_limits
from colledge.planner.memory import plan_memory
from colledge.planner.request import Baseline, PlanBounds, PlanningRequest
from colledge.planner.sources import enumerate_names, estimates
from colledge.profiles import ModelProfile, PoolProfile
from colledge.settings import Precision
from colledge.units import format_bytes, format_joules, format_seconds

_NEAR_LIMIT = 0.9
_WORTH_SAYING = 0.05


def joules(plan: Plan, request: PlanningRequest) -> float:
    """Return a plan's predicted energy of a step under the request's accounting."""
    assert plan.prediction is not None
    if request.accounting == "marginal":
        return plan.prediction.marginal_energy_joules_per_step
    return plan.prediction.energy_joules_per_step


def goal(request: PlanningRequest) -> str:
    """Return what a request wants, such as `least energy within 500 ms a step (whole-pool accounting)`."""
    text = {"energy": "least energy", "time": "least time", "energy-delay": "least energy x time"}
    within = (
        "" if request.deadline_step_s is None else f" within {format_seconds(request.deadline_step_s)} a step"
    )
    return f"{text[request.objective]}{within} ({request.accounting} accounting)"


def explain(
    best: Plan,
    families: Mapping[str, Plan],
    bounds: PlanBounds,
    request: PlanningRequest,
    pool: PoolProfile,
    model: ModelProfile,
    baselines: Sequence[Baseline] = (),
) -> list[str]:
    """Return the reasons for a choice, most important first; before them, what of it rests on estimates."""
    costs, factor = PoolCosts(pool, model, request.wire_precision), request.optimizer_state_factor
    limits = find_limits(best, costs, factor)
    reasons = estimates(best, request, costs)
    reasons.append(_choice(best, bounds, request))
    reasons += rounding(best, model.precision)
    reasons += _division(best)
    reasons += _one_machine(best, families, request, costs)
    reasons += limit_sentences(limits, best, pool)
    reasons += _forwards_only(best, model)
    for name, plan in families.items():
        if name != best.family:
            rival = find_limits(plan, costs, factor, wishes=False)
            reasons.append(_rival(name, plan, best, rival, request, pool))
    reasons += _against_baselines(best, baselines, request)
    reasons += _left_out(best, request, pool)
    reasons += _switching(best)
    return reasons


def _figures(plan: Plan, request: PlanningRequest) -> str:
    assert plan.prediction is not None
    return f"{format_seconds(plan.prediction.step_s)} and {format_joules(joules(plan, request))} a step"


def _choice(best: Plan, bounds: PlanBounds, request: PlanningRequest) -> str:
    assert best.prediction is not None
    text = f"Chosen for {goal(request)}: {best.describe()}, predicted {_figures(best, request)}"
    ratios = []
    if bounds.step_s > 0:
        ratios.append(f"{best.prediction.step_s / bounds.step_s:.2f} times the least possible time")
    if bounds.energy_joules_per_step > 0:
        ratio = joules(best, request) / bounds.energy_joules_per_step
        ratios.append(f"{ratio:.2f} times the least possible energy")
    return text + (f"; that is {' and '.join(ratios)}." if ratios else ".")


def rounding(plan: Plan, precision: Precision | None) -> list[str]:
    """Return what messages of another precision than that of computing mean, where a plan has such messages."""
    if plan.num_stages == 1 or plan.wire_precision in (None, precision):
        return []
    return [
        f"Activations and their gradients travel between stages in {plan.wire_precision}, as asked: training is not "
        "bit for bit that of one machine."
    ]


def _forwards_only(plan: Plan, model: ModelProfile) -> list[str]:
    """Return which stages have no backward, where any has none."""
    first = plan.first_backward(model.first_trained)
    if first == 0:
        return []
    if first == plan.num_stages:
        return ["Nothing trains, so every stage runs forwards only."]
    stages = f"stages {enumerate_names([str(s) for s in range(first)])} run" if first > 1 else "stage 0 runs"
    name = model.layers[model.first_trained].name
    return [f"Nothing trains before {name}, so {stages} forwards only and no gradients travel there."]


def _division(plan: Plan) -> list[str]:
    """Return what the replicas of each stage divide under ZeRO, where a stage has several."""
    several = [stage for stage in plan.stages if len(stage.replicas) > 1]
    if plan.zero is None or not several:
        return []
    what = ("optimizer state", "optimizer state and gradients", "optimizer state, gradients and parameters")
    text = f"Replicas divide {what[plan.zero - 1]} (ZeRO stage {plan.zero}"
    if plan.backend is not None:
        return [f"{text} of backend {plan.backend}), in equal parts."]
    parts = (
        f"{replica.shards[k].device} {share:.0%}"
        for stage in several
        for k in range(stage.num_shards)
        for replica, share in zip(stage.replicas, stage.state_shares(k), strict=True)
    )
    return [f"{text}) by the memory that each has left for it: {', '.join(parts)}."]


def _one_machine(
    best: Plan, families: Mapping[str, Plan], request: PlanningRequest, costs: PoolCosts
) -> list[str]:
    if best.family != "single":
        if "single" in families or any(_holds(device, costs, request) for device in _different(costs.pool)):
            return []
        return ["No single device can hold this model; only a pool can train it."]
    others = [plan for name, plan in families.items() if name != "single"]
    if not others:
        return []
    rival = min(others, key=lambda plan: _wanted(plan, request))
    return [
        f"The pool is worse than one machine here: {best.devices[0]} alone takes {_figures(best, request)}, "
        f"the best plan of several devices ({rival.describe()}) {_figures(rival, request)}."
    ]


def _different(pool: PoolProfile) -> list[str]:
    """Return one device of each amount of memory."""
    return list({(d.room_bytes, d.allocator_overhead): d.id for d in pool.devices}.values())


def _holds(device: str, costs: PoolCosts, request: PlanningRequest) -> bool:
    """Return whether a device can train the model alone in the least memory: single rows, computed again."""
    num_layers = len(costs.model.layers)
    layers = request.layers or (0, num_layers)
    alone = Stage(layers=layers, replicas=(Replica(samples=1, shards=(Shard(device=device),)),))
    plan = Plan(
        schema_tag="colledge/plan/1",
        num_layers=num_layers,
        layers=request.layers,
        global_batch_size=request.global_batch_size,
        microbatch_size=1,
        stages=(alone,),
        recompute=(True,),
    )
    parts = plan_memory(plan, costs.pool, costs.model, request.optimizer_state_factor)[device]
    return parts.total_bytes <= costs.pool.device(device).memory_bytes


def _wanted(plan: Plan, request: PlanningRequest) -> float:
    assert plan.prediction is not None
    match request.objective:
        case "time":
            return plan.prediction.step_s
        case "energy":
            return joules(plan, request)
        case "energy-delay":
            return plan.prediction.step_s * joules(plan, request)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def medium_text(medium: str, pool: PoolProfile) -> str:
    """Return what to call a medium: `the link a->b`, or `the shared medium air`."""
    return f"the {'shared medium' if any(s.name == medium for s in pool.segments) else 'link'} {medium}"


def limit_sentences(limits: Limits, plan: Plan, pool: PoolProfile) -> list[str]:
    """Return what limits a plan, where its time goes, and what would help."""
    parts = f"{limits.slowest_device} computes for {_percent(limits.compute_share)} of the step"
    if plan.num_stages > 1 or limits.bubble_share >= _WORTH_SAYING:
        parts += f", filling and draining the pipeline costs {_percent(limits.bubble_share)}"
    if limits.busiest_medium is not None:
        where = medium_text(limits.busiest_medium, pool)
        busy = f"the busiest, {where}, is in use {_percent(limits.busiest_share)} of the step"
        parts += f", waiting for links {_percent(limits.link_share)} ({busy})"
    return [f"Limited by {_limit(limits, plan, pool)}: {parts}.", *_memory(limits, plan)]


def _limit(limits: Limits, plan: Plan, pool: PoolProfile) -> str:
    match limits.kind:
        case "computing":
            return f"computing on {limits.slowest_device}"
        case "link":
            assert limits.busiest_medium is not None
            return medium_text(limits.busiest_medium, pool)
        case "bubble":
            count = plan.num_microbatches
            batches = f"{count} micro-batch{'' if count == 1 else 'es'}"
            return f"the pipeline's bubble ({plan.num_stages} stages, {batches})"
        case "memory":
            assert limits.wish is not None
            return f"the memory of {limits.wish.device}"


def _memory(limits: Limits, plan: Plan) -> list[str]:
    found = []
    if limits.memory_share >= _NEAR_LIMIT or limits.wish is not None:
        text = f"{limits.fullest_device} is fullest: {_percent(limits.memory_share)} of its memory is used"
        if limits.wish is not None:
            wish = limits.wish
            text += (
                f"; {wish.change} would take {_percent(wish.gain)} less time, but {wish.device} lacks "
                f"{format_bytes(wish.lacks_bytes)} for it"
            )
        found.append(f"{text}.")
    stages = [str(s) for s in range(plan.num_stages) if plan.recomputes(s)]
    if stages:
        found.append(
            f"Activations are computed again in the backward pass of stage {', '.join(stages)}, which saves memory."
        )
    return found


def _rival(
    name: str, plan: Plan, best: Plan, limits: Limits, request: PlanningRequest, pool: PoolProfile
) -> str:
    assert plan.prediction is not None
    assert best.prediction is not None
    times = ""
    if best.prediction.step_s > 0 and joules(best, request) > 0:
        times = (
            f", {plan.prediction.step_s / best.prediction.step_s:.2f} times the time and "
            f"{joules(plan, request) / joules(best, request):.2f} times the energy of the chosen plan"
        )
    late = request.deadline_step_s is not None and plan.prediction.step_s > request.deadline_step_s
    return (
        f"Best {name} plan found: {plan.describe()}, {_figures(plan, request)}{times}"
        f"{', which misses the deadline' if late else ''}; limited by {_limit(limits, plan, pool)} "
        f"({_percent(_share(limits))} of its step)."
    )


def _share(limits: Limits) -> float:
    shares = {"computing": limits.compute_share, "link": limits.link_share, "bubble": limits.bubble_share}
    return shares.get(limits.kind, 0.0)


def _against_baselines(best: Plan, baselines: Sequence[Baseline], request: PlanningRequest) -> list[str]:
    """Return the simplest comparison with other planners: the best of theirs, and those that have no plan."""
    found = []
    ran = {one.name: one.plan for one in baselines if one.plan is not None and not one.why_not}
    if ran and _wanted(best, request) > 0:
        name = min(ran, key=lambda name: _wanted(ran[name], request))
        plan = ran[name]
        assert plan.prediction is not None
        assert best.prediction is not None
        times = plan.prediction.step_s / max(best.prediction.step_s, 1e-30)
        energy = joules(plan, request) / max(joules(best, request), 1e-30)
        found.append(
            f"The best baseline of {len(ran)} is {name!r} ({plan.describe()}): {times:.2f} times the time and "
            f"{energy:.2f} times the energy of the chosen plan."
        )
    without = [one.name for one in baselines if one.plan is None or one.why_not]
    if without:
        names = enumerate_names([repr(name) for name in without])
        found.append(f"Baselines without a plan that can run here: {names}.")
    return found


def _switching(best: Plan) -> list[str]:
    """Return what a plan that names power modes asks of its user: the engine does not set them."""
    modes = {p.shard.device: p.shard.mode for p in best.places() if p.shard.mode is not None}
    notes = []
    if modes:
        named = ", ".join(f"{device} to {mode}" for device, mode in modes.items())
        notes.append(f"Set the power modes before training ({named}): colledge does not switch power modes.")
    if any(place.shard.paced for place in best.places()):
        notes.append(
            "The plan supposes that modes change between two computations; colledge's engine does not switch power "
            "modes, so only software of your own would reach this energy."
        )
    return notes


def _left_out(best: Plan, request: PlanningRequest, pool: PoolProfile) -> list[str]:
    assert best.prediction is not None
    used = set(best.devices)
    out = [device for device in pool.devices if device.id not in used]
    if not out:
        return []
    idle = sum(device.modes[0].idle_w for device in out) * best.prediction.step_s
    names = ", ".join(device.id for device in out)
    refused = [device.id for device in out if device.id in request.must_not_use]
    why = "on request" if len(refused) == len(out) else "as no better plan with them was found"
    counted = "counted" if request.accounting == "whole-pool" else "not counted"
    return [
        f"Left out {why}: {names}. Idle, they draw {format_joules(idle)} a step ({counted} in the energy above); "
        "switching them off saves that."
    ]
