"""Decide how to split a model over a pool: pure functions over profiles; runs on a machine without torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import ceil, floor, log10
from time import perf_counter

from colledge.errors import ColledgeError, ConfigError, PlanError
from colledge.plan import Plan, Shard, StepFigures
from colledge.planner.baselines import all_baselines
from colledge.planner.bounds import lower_bounds
from colledge.planner.cost import PoolCosts
from colledge.planner.draft import make_plan
from colledge.planner.energy import step_figures
from colledge.planner.explain import explain
from colledge.planner.judge import Found
from colledge.planner.layouts import microbatch_sizes
from colledge.planner.memory import MemoryParts, check_memory, plan_memory
from colledge.planner.pace import paced
from colledge.planner.request import Baseline, PlanBounds, PlanningRequest, PlanningResult
from colledge.planner.search import Search
from colledge.planner.shortage import nothing_fits, question_of
from colledge.planner.tables import find_route
from colledge.profiles import ModelProfile, PoolProfile
from colledge.schedule import simulate
from colledge.units import format_seconds

__all__ = [
    "Baseline",
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


_MOST_MICROBATCHES = (
    512,
    16_384,
)  # the second where nothing fits with the first; simulating more takes too long


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
        ConfigError: The plan does not fit the pool or the model, a timing or a route is missing, or the plan has a
            wire precision and the model's profile no precision.
    """
    plan.check_pool(pool)
    plan.check_model(len(model.layers), model.shard_units)
    timeline = simulate(plan, PoolCosts(pool, model, plan.wire_precision))
    return step_figures(plan, pool, timeline, plan_memory(plan, pool, model, optimizer_state_factor))


def plan_training(
    pool: PoolProfile,
    model: ModelProfile,
    request: PlanningRequest,
    *,
    effort: float = 1.0,
    seeds: Sequence[Plan] = (),
) -> PlanningResult:
    """Return the best plan for a request, with the best of each family, the frontier, bounds, baselines and reasons.

    Args:
        pool: The devices and links.
        model: The layers and timings.
        request: What is wanted.
        effort: How long to go on looking for something better once good plans are known; 1 is the usual.
        seeds: Plans for this pool that are known from elsewhere; the answer is no worse than any of them that fits,
            computations not paced.

    Raises:
        OutOfMemoryError: No plan fits; names the device that lacks bytes under the plan that comes closest, and what
            would help.
        PlanError: No plan meets the deadline; names the least possible time and the fastest plan found.
        ConfigError: A constraint names an unknown device, a timing or a link is missing, or a wire precision is asked
            for and the model's profile has no precision.
    """
    started = perf_counter()
    devices = _usable(pool, request)
    whole, layers = model, request.layers or (0, len(model.layers))
    model = whole.part(layers)  # planned for as if it were a model of its own
    costs = PoolCosts(pool, model, request.wire_precision)
    _check_times(costs, devices)
    bounds = lower_bounds(costs, request)
    baselines = all_baselines(costs, request)
    for most_microbatches in _MOST_MICROBATCHES:
        sizes = microbatch_sizes(request.global_batch_size, most_microbatches)
        search = Search(costs, request, devices, sizes, effort)
        known = [baseline.plan for baseline in baselines if baseline.plan is not None]
        best = search.run([*known, *(seed.alone() for seed in seeds)])
        if best is None and request.zero is not None:  # replicas may fit that hold state and compute nothing
            closest = question_of([pool.device(id) for id in devices], model, request).closest()
            best = search.run([closest.plan] if closest.plan is not None else [])
        if best is not None:
            break
    else:
        raise _nothing_found(pool, model, request, devices, sizes[-1])
    deadline = request.deadline_step_s
    if deadline is not None and best.step_s > deadline:
        raise _too_late(search, best, bounds, deadline)

    def finish(found: Found) -> Plan:
        plan = search.judge.plan(found.draft)
        again = tuple(plan.recomputes(s, costs.first_trained) for s in range(plan.num_stages))
        changes = {"wire_precision": request.wire_precision, "recompute": again if any(again) else None}
        return with_prediction(plan.model_copy(update=changes))

    def with_prediction(plan: Plan) -> Plan:
        plan = Plan.model_validate(plan.model_dump(by_alias=True))
        memory = check_memory(plan, pool, model, request.optimizer_state_factor)
        figures = step_figures(plan, pool, simulate(plan, costs), memory)
        return plan.model_copy(update={"prediction": figures})

    def placed(plan: Plan) -> Plan:
        return plan.within(layers, len(whole.layers))

    chosen = finish(best)
    if request.switch_modes:
        chosen = with_prediction(paced(chosen, costs))
    chosen = placed(chosen)
    families: dict[str, Plan] = {name: placed(finish(found)) for name, found in search.families().items()}
    families[chosen.family] = chosen
    baselines = tuple(
        one.model_copy(update={"plan": placed(one.plan)}) if one.plan is not None else one
        for one in baselines
    )
    reasons = explain(chosen, families, bounds, request, pool, whole, baselines)
    reasons.append(search.coverage())
    return PlanningResult(
        best=chosen,
        families=families,
        frontier=tuple(
            chosen if found.draft == best.draft else placed(finish(found)) for found in search.frontier()
        ),
        bounds=bounds,
        baselines=baselines,
        reasons=tuple(reasons),
        planning_s=perf_counter() - started,
    )


def _check_times(costs: PoolCosts, devices: Sequence[str]) -> None:
    """Check that every device that may be used can be timed in its first mode.

    Raises:
        ConfigError: Names the device kind, the mode and the layer kind.
    """
    for device in devices:
        costs.prefix_s(*costs.key(Shard(device=device)), 1, 1.0)


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


def _nothing_found(
    pool: PoolProfile, model: ModelProfile, request: PlanningRequest, devices: Sequence[str], smallest: int
) -> ColledgeError:
    error = nothing_fits([pool.device(device) for device in devices], model, request)
    if error is not None:
        return error
    if request.must_use:
        return ConfigError(
            f"no plan is possible with must_use {list(request.must_use)}: the devices are not joined by links, "
            "or are more than the layers and the batch can be shared among.",
            fix="name fewer devices in must_use, or add the missing links to the pool profile.",
        )
    costs = PoolCosts(pool, model, request.wire_precision)
    apart = [pair for pair in combinations(devices, 2) if find_route(costs, *pair) is None]
    if apart:
        more = f" (and {len(apart) - 1} other pairs)" if len(apart) > 1 else ""
        return ConfigError(
            f"no plan was found over the devices that are joined; nothing joins {' and '.join(apart[0])}{more}.",
            fix="add the missing links, or a segment, to the pool profile; or take a batch with more divisors.",
        )
    return ConfigError(
        f"no plan was found for a batch of {request.global_batch_size} samples in micro-batches of {smallest} or "
        f"more (at most {_MOST_MICROBATCHES[-1]} of them): with the devices and links that are there none fits.",
        fix="take a smaller batch, or one with more divisors (such as a power of two), or join devices by links.",
    )


def _too_late(search: Search, best: Found, bounds: PlanBounds, deadline_s: float) -> PlanError:
    wanted = format_seconds(deadline_s)
    plan = make_plan(best.draft, search.tables.num_layers, search.request.global_batch_size)
    layers = search.request.layers or (0, plan.num_layers)
    fastest = plan.within(layers, layers[1]).describe()
    if deadline_s < bounds.step_s:
        message = (
            f"a deadline of {wanted} a step is impossible: no plan on these devices can take less than "
            f"{format_seconds(bounds.step_s)} (bound), and the fastest takes {format_seconds(best.step_s)} ({fastest})."
        )
    else:
        known = "" if search.proven_for_all_depths else " that was found"
        message = (
            f"no plan{known} meets the deadline of {wanted} a step: the fastest takes "
            f"{format_seconds(best.step_s)} ({fastest}); the bound is {format_seconds(bounds.step_s)}."
        )
    digits = 3 - floor(log10(best.step_s))  # rounded up, so that the advice works
    enough_s = ceil(best.step_s * 10**digits) / 10**digits
    return PlanError(message, fix=f"allow at least {enough_s:g} s a step, or add devices.")
