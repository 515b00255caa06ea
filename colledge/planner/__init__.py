"""Decide how to split a model over a pool: pure functions over profiles; runs on a machine without torch."""

from __future__ import annotations

from time import perf_counter

from colledge.errors import ConfigError, PlanError
from colledge.plan import Plan, StepFigures
from colledge.planner.bounds import lower_bounds
from colledge.planner.cost import PoolCosts
from colledge.planner.energy import step_figures
from colledge.planner.explain import explain
from colledge.planner.memory import MemoryParts, check_memory, out_of_memory, plan_memory
from colledge.planner.request import FAMILIES, PlanBounds, PlanningRequest, PlanningResult
from colledge.planner.search import Found, Search
from colledge.profiles import ModelProfile, PoolProfile
from colledge.schedule import simulate
from colledge.units import format_seconds

__all__ = [
    "MemoryParts",
    "PlanBounds",
    "PlanningRequest",
    "PlanningResult",
    "PoolCosts",
    "check_memory",
    "plan_memory",
    "plan_training",
    "predict",
]


def predict(
    plan: Plan, pool: PoolProfile, model: ModelProfile, optimizer_state_factor: float = 2.0
) -> StepFigures:
    """Return what one step of a plan costs: time, energy and, for every device of the pool, its share and memory.

    Args:
        plan: Any plan; one written by hand too. Whether it fits in memory is for `check_memory` to say.
        pool: The devices and links.
        model: The layers and timings.
        optimizer_state_factor: Bytes of optimizer state a byte of trainable parameter.

    Raises:
        ConfigError: The plan does not fit the pool or the model, or a timing or a route is missing.
    """
    plan.check_pool(pool)
    plan.check_model(len(model.layers), model.shard_units)
    timeline = simulate(plan, PoolCosts(pool, model))
    return step_figures(plan, pool, timeline, plan_memory(plan, pool, model, optimizer_state_factor))


def plan_training(pool: PoolProfile, model: ModelProfile, request: PlanningRequest) -> PlanningResult:
    """Return the best plan for a request, with the best of each family, the frontier, bounds and reasons.

    Raises:
        OutOfMemoryError: No plan fits; names the device that lacks least and what would help.
        ConfigError: A constraint names an unknown device, a timing is missing, or no plan meets the deadline.
    """
    started = perf_counter()
    costs = PoolCosts(pool, model)
    search = Search(costs, request, _usable(pool, request))
    families: dict[str, Found] = {}
    for family in FAMILIES:
        found = search.best([family], request.objective)
        if found is not None:
            families[family] = search.improve_modes(found, request.objective)
    if not families:
        raise _nothing_fits(search, pool, request)
    best = min(families.values(), key=lambda found: found.score)
    if best.score[0] and request.deadline_step_s is not None:
        raise PlanError(
            f"no plan meets the deadline of {format_seconds(request.deadline_step_s)} a step: the fastest takes "
            f"{format_seconds(best.step_s)} ({best.plan.describe()}).",
            fix=f"allow at least {format_seconds(best.step_s)} a step, or add devices.",
        )
    search.find_ends()
    bounds = lower_bounds(costs, request)

    def finish(found: Found) -> Plan:
        plan = Plan.model_validate(found.plan.model_dump(by_alias=True))
        check_memory(plan, pool, model, request.optimizer_state_factor)
        figures = predict(plan, pool, model, request.optimizer_state_factor)
        return plan.model_copy(update={"prediction": figures})

    finished = {family: finish(found) for family, found in families.items()}
    chosen = finished[best.plan.family]
    reasons = explain(chosen, finished, bounds, request, pool, model)
    reasons.append(search.coverage())
    return PlanningResult(
        best=chosen,
        families=finished,
        frontier=tuple(finish(found) for found in sorted(search.frontier, key=lambda found: found.step_s)),
        bounds=bounds,
        reasons=tuple(reasons),
        planning_s=perf_counter() - started,
    )


def _usable(pool: PoolProfile, request: PlanningRequest) -> list[str]:
    for name in (*request.must_use, *request.must_not_use):
        pool.device(name)
    both = set(request.must_use) & set(request.must_not_use)
    if both:
        raise ConfigError(
            f"device {min(both)!r} stands in must_use and in must_not_use.", fix="keep it in one."
        )
    usable = [device.id for device in pool.devices if device.id not in request.must_not_use]
    if not usable:
        raise ConfigError("must_not_use names every device of the pool.", fix="leave at least one device.")
    return usable


def _nothing_fits(search: Search, pool: PoolProfile, request: PlanningRequest) -> ConfigError:
    lack = search.least_lack()
    if lack is None:
        return ConfigError(
            f"no plan is possible with must_use {list(request.must_use)}: the devices are not joined by links, "
            "or are more than the layers and the batch can be shared among.",
            fix="name fewer devices in must_use, or add the missing links to the pool profile.",
        )
    device, parts = lack
    prefix = "no plan fits in memory. In the one that lacks least, "
    return out_of_memory(device, parts, pool.device(device).memory_bytes, prefix)
