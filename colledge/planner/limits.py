"""What keeps a plan's step from being shorter: computing, a link, the pipeline's bubble, or memory.

    step_s = slowest device computes │ bubble: filling, draining,      │ links: step_s less the step
             (its compute_s)         │ waiting for each other          │ that free links would give

The three parts are found by simulating the plan twice, with its links and with links that cost nothing, and add
up to the step. Memory is a limit where the same stages with another micro-batch, or without recomputation, would
be faster and do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from colledge.plan import Plan
from colledge.planner.cost import PoolCosts, shared_bytes
from colledge.planner.memory import plan_memory
from colledge.profiles import PoolProfile
from colledge.schedule import Timeline, simulate

LimitKind = Literal["computing", "link", "bubble", "memory"]

_LEAST_GAIN = 0.02  # below it a wish is not worth a word
_DECIDING_GAIN = 0.1
_FREE_BYTES_PER_S = 1e18
_MOST_MICROBATCHES_TRIED = 6
_MOST_ACTIONS = 20_000


@dataclass(frozen=True)
class Wish:
    """What would be faster if memory allowed it: `gain` of the step, were `device` not to lack `lacks_bytes`."""

    change: str
    gain: float
    device: str
    lacks_bytes: int


@dataclass(frozen=True)
class Limits:
    """Where the time of a step goes, as shares of it, and how full memory is.

    `slowest_device` computes longest; `busiest_medium` is the link or segment that is in use longest, for
    `busiest_share` of the step. `memory_share` is what `fullest_device` uses of its memory.
    """

    kind: LimitKind
    slowest_device: str
    compute_share: float
    bubble_share: float
    link_share: float
    busiest_medium: str | None
    busiest_share: float
    fullest_device: str
    memory_share: float
    wish: Wish | None


def find_limits(
    plan: Plan, costs: PoolCosts, optimizer_state_factor: float, *, wishes: bool = True
) -> Limits:
    """Return what limits a plan.

    Args:
        plan: A plan that fits.
        costs: What computing and sending take.
        optimizer_state_factor: Bytes of optimizer state a byte of trainable parameter.
        wishes: Whether to look for what more memory would allow; costs a few simulations.
    """
    pool, model = costs.pool, costs.model
    timeline = simulate(plan, costs, record=True)
    step_s = timeline.step_s or 1.0
    slowest = max(timeline.devices, key=lambda device: timeline.devices[device].compute_s)
    compute_s = timeline.devices[slowest].compute_s
    free_s = simulate(plan, PoolCosts(_with_free_links(pool), model, costs.wire_precision)).step_s
    free_s = min(max(free_s, compute_s), timeline.step_s)
    bubble_share, link_share = (free_s - compute_s) / step_s, (timeline.step_s - free_s) / step_s
    used_s = media_s(plan, costs, timeline)
    busiest = max(used_s, key=lambda medium: used_s[medium], default=None)
    full = {
        device: parts.total_bytes / pool.device(device).memory_bytes
        for device, parts in plan_memory(plan, pool, model, optimizer_state_factor).items()
    }
    fullest = max(full, key=lambda device: full[device])
    wish = _best_wish(plan, costs, timeline.step_s, optimizer_state_factor) if wishes else None
    return Limits(
        kind=_kind(compute_s / step_s, bubble_share, link_share, wish),
        slowest_device=slowest,
        compute_share=compute_s / step_s,
        bubble_share=bubble_share,
        link_share=link_share,
        busiest_medium=busiest,
        busiest_share=min(1.0, used_s[busiest] / step_s) if busiest is not None else 0.0,
        fullest_device=fullest,
        memory_share=full[fullest],
        wish=wish,
    )


def _kind(compute: float, bubble: float, link: float, wish: Wish | None) -> LimitKind:
    if wish is not None and wish.gain >= max(_DECIDING_GAIN, bubble, link):
        return "memory"
    shares: dict[LimitKind, float] = {"computing": compute, "link": link, "bubble": bubble}
    return max(shares, key=lambda kind: shares[kind])


def _with_free_links(pool: PoolProfile) -> PoolProfile:
    free = {"latency_s": 0.0, "bandwidth_bytes_per_s": _FREE_BYTES_PER_S}
    return PoolProfile(
        schema_tag=pool.schema_tag,
        devices=pool.devices,
        links=tuple(link.model_copy(update=free) for link in pool.links),
        segments=tuple(segment.model_copy(update=free) for segment in pool.segments),
    )


def media_s(plan: Plan, costs: PoolCosts, timeline: Timeline) -> dict[str, float]:
    """Return the seconds of a step for which each medium is in use; an all-reduce counts for its slowest hop.

    Args:
        plan: The plan.
        costs: What its all-reduces take.
        timeline: Its simulation, recorded.
    """
    used_s: dict[str, float] = {}
    until_s: dict[str, float] = {}
    for transfer in sorted(timeline.transfers, key=lambda transfer: transfer.start_s):
        start_s = max(transfer.start_s, until_s.get(transfer.medium, 0.0))
        if transfer.end_s > start_s:
            used_s[transfer.medium] = used_s.get(transfer.medium, 0.0) + transfer.end_s - start_s
            until_s[transfer.medium] = transfer.end_s
    for devices, num_bytes, seconds in _allreduces(plan, costs):
        if seconds > 0:
            medium = _slowest_hop(costs, devices, num_bytes)
            used_s[medium] = used_s.get(medium, 0.0) + seconds
    return used_s


def _allreduces(plan: Plan, costs: PoolCosts) -> Iterator[tuple[tuple[str, ...], float, float]]:
    """Yield (devices, bytes of one message, seconds in a step) of tensor, gradient and tied-weight all-reduces."""
    layers = costs.model.layers
    for index, stage in enumerate(plan.stages):
        for replica in stage.replicas:
            devices = tuple(shard.device for shard in replica.shards)
            if len(devices) > 1:
                forward_s, backward_s = costs.inner_allreduce_s(stage.layers, devices, replica.samples)
                rounds = 2 if plan.recomputes(index, costs.first_trained) else 1
                tensors = [layers[i].tensor for i in range(*stage.layers)]
                largest = max((t.allreduce_bytes_per_sample for t in tensors if t is not None), default=0)
                seconds = plan.num_microbatches * (rounds * forward_s + backward_s)
                yield devices, largest * replica.samples, seconds
        if len(stage.replicas) > 1:
            for k, fraction in enumerate(stage.replicas[0].fractions):
                devices = tuple(replica.shards[k].device for replica in stage.replicas)
                num_bytes = costs.sync_bytes(stage.layers, fraction)
                yield devices, num_bytes, costs.sync_s(stage.layers, devices, fraction)
    for tie in costs.ties:
        owners = [s for s in plan.stages if any(s.layers[0] <= layer < s.layers[1] for layer in tie)]
        if len(owners) > 1:
            replicas = [replica for stage in owners for replica in stage.replicas]
            devices = tuple(shard.device for replica in replicas for shard in replica.shards)
            yield devices, shared_bytes(layers, tie)[1], costs.tie_s(tie, devices)


def _slowest_hop(costs: PoolCosts, devices: tuple[str, ...], num_bytes: float) -> str:
    routes = [costs.route(a, b) for a, b in zip(devices, (*devices[1:], devices[0]), strict=True)]
    media = [route.medium for route in routes]
    slowest = max(
        routes,
        key=lambda route: (
            route.latency_s
            + media.count(route.medium) * num_bytes / len(devices) / route.bandwidth_bytes_per_s
        ),
    )
    return slowest.medium


def _best_wish(plan: Plan, costs: PoolCosts, step_s: float, optimizer_state_factor: float) -> Wish | None:
    """Return the change that saves most time among those that memory alone forbids; not looked for in huge plans."""
    wishes: list[Wish] = []
    if 2 * plan.num_microbatches * len(plan.devices) > _MOST_ACTIONS:
        return None
    for change, changed in _changes(plan):
        parts = plan_memory(changed, costs.pool, costs.model, optimizer_state_factor)
        lacks = {
            device: p.total_bytes - costs.pool.device(device).memory_bytes for device, p in parts.items()
        }
        device = max(lacks, key=lambda device: lacks[device])
        if lacks[device] > 0 and step_s > 0:
            gain = 1 - simulate(changed, costs).step_s / step_s
            wishes.append(Wish(change, gain, device, lacks[device]))
    best = max(wishes, key=lambda wish: wish.gain, default=None)
    return best if best is not None and best.gain >= _LEAST_GAIN else None


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield the same stages without recomputation, and with larger micro-batches of the same proportions."""
    if plan.recompute is not None and any(plan.recompute):
        yield "no recomputation", plan.model_copy(update={"recompute": None})
    factors = [k for k in range(2, plan.num_microbatches + 1) if plan.num_microbatches % k == 0]
    for factor in factors[:_MOST_MICROBATCHES_TRIED]:
        size = plan.microbatch_size * factor
        yield f"a micro-batch of {size} rows", _with_larger_microbatches(plan, factor)


def _with_larger_microbatches(plan: Plan, factor: int) -> Plan:
    stages = tuple(
        stage.model_copy(
            update={
                "replicas": tuple(
                    replica.model_copy(
                        update={
                            "samples": replica.samples * factor,
                            "shards": tuple(s.model_copy(update={"paced": {}}) for s in replica.shards),
                        }
                    )
                    for replica in stage.replicas
                )
            }
        )
        for stage in plan.stages
    )
    return plan.model_copy(update={"microbatch_size": plan.microbatch_size * factor, "stages": stages})
