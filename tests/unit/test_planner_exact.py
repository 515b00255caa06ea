"""The planner against enumerating every plan there is, on random small pools.

The enumeration knows nothing of the planner: it builds plans from the rules of plan.json alone, checks their memory
and simulates each. Everything is in it: devices left out, orders, cuts, shares (none too), shards, power modes,
recomputation, micro-batch sizes and every vector of warm-up depths.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, combinations_with_replacement, islice, pairwise, permutations, product

import pytest

from colledge.errors import OutOfMemoryError
from colledge.plan import Plan, PlanSchedule, Replica, Shard, Stage
from colledge.planner import PlanningRequest, PoolCosts, plan_memory, plan_training
from colledge.planner.energy import plan_joules
from colledge.profiles import ModelProfile, PoolProfile
from colledge.schedule import simulate
from tests.unit.test_planner import MB, frozen_below, make_model, make_pool

POOLS, FROZEN = 60, 4  # every fourth model has a frozen prefix
MOST_PLANS = 2000
OBJECTIVES = ("energy", "time", "energy-delay")
ACCOUNTINGS = ("whole-pool", "marginal")

Case = tuple[PoolProfile, ModelProfile, int]


def shapes(size: int, units: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield lists of (replicas, shards) a stage that need `size` devices."""
    if size == 0:
        yield ()
    for count in range(1, size + 1):
        for shards in range(1, min(count, units) + 1):
            if count % shards == 0:
                for rest in shapes(size - count, units):
                    yield ((count // shards, shards), *rest)


def shares(total: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    spare = total - parts * least
    for marks in combinations_with_replacement(range(spare + 1), parts - 1):
        yield tuple(least + b - a for a, b in pairwise((0, *marks, spare)))


def every_stage(
    layers: tuple[int, int],
    names: Sequence[str],
    shape: tuple[int, int],
    m: int,
    units: int,
    pool: PoolProfile,
) -> Iterator[Stage]:
    replicas, shards = shape
    modes = [[None, *(mode.name for mode in pool.device(name).modes[1:])] for name in names]
    for rows in shares(m, replicas, 0):
        for parts in shares(units, shards, 1) if shards > 1 else [(units,)]:
            for chosen in product(*modes):
                spots = iter(zip(names, chosen, strict=True))
                yield Stage.model_construct(
                    layers=layers,
                    replicas=tuple(
                        Replica.model_construct(
                            samples=number,
                            shards=tuple(
                                Shard.model_construct(device=device, fraction=part / units, mode=mode)
                                for part, (device, mode) in zip(parts, islice(spots, shards), strict=True)
                            ),
                        )
                        for number in rows
                    ),
                )


def every_plan(pool: PoolProfile, model: ModelProfile, batch: int) -> Iterator[Plan]:
    ids, layers, units = [d.id for d in pool.devices], len(model.layers), model.shard_units
    for size in range(1, len(ids) + 1):
        for order, shape in product(permutations(ids, size), list(shapes(size, units))):
            for inner in combinations(range(1, layers), len(shape) - 1):
                for m in (m for m in range(1, batch + 1) if batch % m == 0):
                    spans, names = list(pairwise((0, *inner, layers))), iter(order)
                    stages = [
                        list(every_stage(span, list(islice(names, r * k)), (r, k), m, units, pool))
                        for span, (r, k) in zip(spans, shape, strict=True)
                    ]
                    depths = list(combinations_with_replacement(range(batch // m, 0, -1), len(shape)))
                    depths = depths if len(shape) > 1 else [(1,)]
                    for chosen, depth in product(product(*stages), depths):
                        for flags in product((False, True), repeat=len(shape)):
                            yield Plan.model_construct(
                                schema_tag="colledge/plan/1",
                                num_layers=layers,
                                global_batch_size=batch,
                                microbatch_size=m,
                                schedule=PlanSchedule.model_construct(name="1f1b", warmup=depth),
                                stages=chosen,
                                recompute=flags,
                                prediction=None,
                            )


def random_case(numbers: random.Random, count: int) -> Case:
    kinds = [numbers.choice("pqr") for _ in range(count)]
    blocks = numbers.randint(1, 4)
    model = make_model(
        {kind: numbers.uniform(0.02, 0.2) for kind in "pqr"},
        num_blocks=blocks,
        units=numbers.choice((1, 2, 3)),
        tied=numbers.random() < 0.3,
        saved_bytes_per_sample=numbers.choice((5, 30)) * MB,
        output_bytes_per_sample=numbers.choice((MB // 10, MB)),
        workspace_bytes_per_sample=numbers.choice((0, 10)) * MB,
        largest_gradient_bytes=numbers.choice((0, 15)) * MB,
    )
    watts = {kind: (numbers.uniform(0, 9), numbers.uniform(9, 60), numbers.uniform(5, 12)) for kind in "pqr"}
    memory = numbers.choice(([10_000], [90, 130, 170, 250], [45, 60, 90, 400]))
    pool = make_pool(
        kinds,
        watts=[watts[kind] for kind in kinds],
        bandwidth=numbers.choice((5, 20, 100, 1000)) * MB,
        memory_bytes=[numbers.choice(memory) * MB for _ in kinds],
        segment=numbers.random() < 0.3,
    )
    overhead = numbers.choice((0.0, 0.3))
    devices = tuple(device.model_copy(update={"allocator_overhead": overhead}) for device in pool.devices)
    pool = pool.model_copy(update={"devices": devices})
    if count > 1 and not pool.segments and numbers.random() < 0.4:
        links = tuple(
            link.model_copy(
                update={"bandwidth_bytes_per_s": numbers.uniform(5, 500) * MB, "source": a, "target": b}
            )
            for link in pool.links
            for a, b in ((link.source, link.target), (link.target, link.source))
        )
        pool = pool.model_copy(update={"links": links})
    if numbers.random() < 0.5:
        pool, model = with_modes(pool, model, numbers)
    return pool, model, numbers.choice((1, 2, 2, 3, 4, 6) if count < 4 else (1, 2))


def with_modes(
    pool: PoolProfile, model: ModelProfile, numbers: random.Random
) -> tuple[PoolProfile, ModelProfile]:
    """Give one kind a second, slower mode."""
    kind = pool.devices[0].kind
    slower, draw = numbers.uniform(1.2, 3), numbers.uniform(0.2, 0.9)
    devices = []
    for device in pool.devices:
        if device.kind == kind:
            first = device.modes[0]
            low = first.model_copy(
                update={"name": "low", "idle_w": first.idle_w * draw, "compute_w": first.compute_w * draw}
            )
            device = device.model_copy(update={"modes": (first, low)})
        devices.append(device)
    rows = [
        row.model_copy(
            update={"mode": "low", "forward_s": slower * row.forward_s, "backward_s": slower * row.backward_s}
        )
        for row in model.timings
        if row.device_kind == kind
    ]
    return (
        PoolProfile.model_validate(
            pool.model_copy(update={"devices": tuple(devices)}).model_dump(by_alias=True)
        ),
        model.model_copy(update={"timings": (*model.timings, *rows)}),
    )


def random_cases(seed: int, number: int, most_plans: int) -> Iterator[Case]:
    """Yield cases whose plans are few enough to enumerate.

    Every fifteenth has four devices, and more plans; every fourth a model with a frozen prefix, or all frozen.
    """
    numbers, four = random.Random(seed), 4 * most_plans
    while number:
        most = four if number % 15 == 0 else most_plans
        case = random_case(numbers, 4 if most == four else numbers.choice((1, 2, 2, 3, 3, 3)))
        if sum(1 for _ in islice(every_plan(*case), most + 1)) <= most:
            number -= 1
            pool, model, batch = case
            prefix = number // FROZEN % len(model.layers) + 1 if number % FROZEN == 0 else 0
            yield pool, frozen_below(model, prefix), batch


def divided(plan: Plan, pool: PoolProfile, model: ModelProfile) -> Plan:
    """Return a plan whose replicas divide optimizer state in proportion to the memory that they have left for it."""
    without = plan_memory(plan, pool, model, 0.0)
    stages = []
    for stage in plan.stages:
        shares: dict[str, float] = {}
        for k in range(stage.num_shards if len(stage.replicas) > 1 else 0):
            holders = [replica.shards[k].device for replica in stage.replicas]
            free = [max(0, pool.device(d).memory_bytes - without[d].total_bytes) for d in holders]
            equal = [1 / len(holders)] * len(holders)
            shares |= zip(holders, [f / sum(free) for f in free] if sum(free) else equal, strict=True)
        replicas = tuple(
            replica.model_copy(
                update={
                    "shards": tuple(
                        s.model_copy(update={"state_share": shares.get(s.device)}) for s in replica.shards
                    )
                }
            )
            for replica in stage.replicas
        )
        stages.append(stage.model_copy(update={"replicas": replicas}))
    return plan.model_copy(update={"zero": 1, "stages": tuple(stages)})


def enumerate_best(
    pool: PoolProfile, model: ModelProfile, batch: int, zero: bool = False
) -> dict[tuple[str, str], float]:
    """Return the least of every objective under both accountings; nothing where no plan fits."""
    costs = PoolCosts(pool, model)
    best: dict[tuple[str, str], float] = {}
    room = {device.id: device.memory_bytes for device in pool.devices}
    for plan in every_plan(pool, model, batch):
        plan = divided(plan, pool, model) if zero else plan
        memory = plan_memory(plan, pool, model, 2.0)
        if any(parts.total_bytes > room[device] for device, parts in memory.items()):
            continue
        timeline = simulate(plan, costs)
        for accounting, joules in zip(ACCOUNTINGS, plan_joules(plan, pool, timeline), strict=True):
            for objective, value in zip(
                OBJECTIVES, (joules, timeline.step_s, joules * timeline.step_s), strict=True
            ):
                key = objective, accounting
                best[key] = min(best.get(key, value), value)
    return best


def check(case: Case, zero: bool = False) -> None:
    """Assert that the planner's answer is the least, for every objective and accounting."""
    pool, model, batch = case
    best = enumerate_best(pool, model, batch, zero)
    for objective, accounting in product(OBJECTIVES, ACCOUNTINGS):
        request = PlanningRequest(
            global_batch_size=batch, objective=objective, accounting=accounting, zero=1 if zero else None
        )
        if not best:
            with pytest.raises(OutOfMemoryError):
                plan_training(pool, model, request)
            continue
        result = plan_training(pool, model, request)
        found = result.best.prediction
        assert found is not None
        joules = found.energy_joules_per_step
        if accounting == "marginal":
            joules = found.marginal_energy_joules_per_step
        value = {"energy": joules, "time": found.step_s, "energy-delay": joules * found.step_s}[objective]
        assert value == pytest.approx(best[objective, accounting], rel=1e-9), (objective, accounting)
        assert any(
            "prove that no other plan of the search space is better" in reason for reason in result.reasons
        )


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    return tuple(random_cases(seed=11, number=POOLS, most_plans=MOST_PLANS))


@pytest.mark.parametrize("case", range(POOLS))
def test_no_enumerated_plan_beats_the_planner(case: int) -> None:
    check(cases()[case])


@pytest.mark.parametrize("case", range(0, POOLS, 4))
def test_no_enumerated_plan_that_divides_optimizer_state_beats_the_planner(case: int) -> None:
    check(cases()[case], zero=True)


def test_which_shard_talks_to_the_next_stage_is_a_choice() -> None:
    """The best plan's shards stand in the other order than its devices."""
    check(random_case(random.Random(1461), 3))


def test_the_cases_cover_what_they_should() -> None:
    pools = cases()
    assert POOLS * len(OBJECTIVES) * len(ACCOUNTINGS) >= 300
    assert {len(pool.devices) for pool, _, _ in pools} == {1, 2, 3, 4}
    assert {len(model.layers) for _, model, _ in pools} == {3, 4, 5, 6}
    assert any(not enumerate_best(*case) for case in pools if len(case[0].devices) < 3)
    assert any(len(device.modes) > 1 for pool, _, _ in pools for device in pool.devices)
    assert any(pool.segments for pool, _, _ in pools)
    assert {model.first_trained for _, model, _ in pools} >= {0, 1, 2, 3, 4}
    assert any(model.first_trained == len(model.layers) for _, model, _ in pools)
