"""Find the best plan: enumerate skeletons, bound them all, simulate in order of the bound, stop when none can win.

    layout     which devices, grouped into ordered stages, each group cut into replicas x shards
    skeleton   a layout, a micro-batch size and the layers at which the model is cut
    candidate  a skeleton, the samples of each replica and the fraction of each shard

Exact on small pools: a candidate goes unsimulated only if a lower bound shows that it cannot win. A replica
without samples is never proposed: leaving its device out costs no more. Large pools are first reduced to their
fastest few devices, and the answer says so. Devices that are alike (kind, modes, memory, links) are
interchangeable, and only one of each set of mirrored layouts is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise, permutations, product

import numpy as np

from colledge.errors import ConfigError
from colledge.plan import Plan, PlanSchedule, Replica, Shard, Stage
from colledge.planner.bounds import Array, HopArrays, StageArrays, step_lower_bound
from colledge.planner.cost import PoolCosts, find_ties, shared_bytes
from colledge.planner.energy import plan_joules
from colledge.planner.layouts import (
    Edges,
    Group,
    Layout,
    divisors,
    family_of,
    layer_cuts,
    layouts,
    schedules,
    shares,
)
from colledge.planner.memory import Load, MemoryModel, MemoryParts
from colledge.planner.request import FAMILIES, Family, Objective, PlanningRequest
from colledge.profiles import PoolProfile, Route
from colledge.schedule import simulate

Score = tuple[int, float]  # (0 meets the deadline or 1 does not, what to minimise); smaller is better

_MOST_DEVICES = 4
_EQUAL = 1e-9


def device_classes(pool: PoolProfile, costs: PoolCosts, marked: Sequence[str] = ()) -> dict[str, int]:
    """Return a class for each device; devices of one class can be exchanged without changing any plan's figures.

    Args:
        pool: The pool.
        costs: Answers routes.
        marked: Devices that the request names; they are alike only among themselves.
    """

    def look(a: str, b: str) -> tuple[float, float, str] | None:
        route = find_route(costs, a, b)
        if route is None:
            return None
        private = route.medium == f"{a}->{b}"
        return (route.latency_s, route.bandwidth_bytes_per_s, "" if private else route.medium)

    def alike(a: str, b: str) -> bool:
        one, two = pool.device(a), pool.device(b)
        if one.model_copy(update={"id": b}) != two or (a in marked) != (b in marked):
            return False
        others = [d.id for d in pool.devices if d.id not in (a, b)]
        return look(a, b) == look(b, a) and all(
            look(a, c) == look(b, c) and look(c, a) == look(c, b) for c in others
        )

    classes: dict[str, int] = {}
    for device in pool.devices:
        for other, number in classes.items():
            if alike(device.id, other):
                classes[device.id] = number
                break
        else:
            classes[device.id] = len(set(classes.values()))
    return classes


def find_route(costs: PoolCosts, a: str, b: str) -> Route | None:
    """Return the route between two devices, or None where nothing joins them."""
    try:
        return costs.route(a, b)
    except ConfigError:
        return None


@dataclass(frozen=True)
class Found:
    """A simulated plan and its figures; energy is that of the accounting asked for."""

    plan: Plan
    score: Score
    step_s: float
    energy_joules: float


@dataclass(frozen=True)
class _Skeletons:
    """All cuts of one layout and micro-batch size, with the bounds of each."""

    layout: Layout
    microbatch_size: int
    edges: Edges
    step_s: Array
    energy_joules: Array


@dataclass(frozen=True)
class _Options:
    """What the samples of a group's replicas and the fractions of its shards can be, and their durations.

    Arrays are [option, replica, shard, layers before], in seconds; the all-reduces are [option, replica, layers
    before].
    """

    choices: list[tuple[tuple[int, ...], tuple[float, ...]]]
    forward_s: Array
    backward_s: Array
    update_s: Array
    reduce_forward_s: Array
    reduce_backward_s: Array


class Search:
    """The search for one pool, model and request."""

    def __init__(self, costs: PoolCosts, request: PlanningRequest, devices: Sequence[str]) -> None:
        self.costs, self.request, self.devices = costs, request, tuple(devices)
        self.pool, self.model = costs.pool, costs.model
        self.memory = MemoryModel(self.model, request.optimizer_state_factor)
        self.frontier: list[Found] = []
        self.num_simulated = 0
        self.num_skeletons = 0
        self.exhaustive = True
        self._fits: dict[tuple[Group, int, int, int, int, int], bool | None] = {}
        self._options = lru_cache(maxsize=None)(self._make_options)
        self._stage = lru_cache(maxsize=None)(self._make_stage)
        self._prepare_bytes()
        self.skeletons = self._bound_skeletons()

    # -- what does not depend on the candidate ---------------------------------------------------------------

    def _prepare_bytes(self) -> None:
        """Sum bytes of layers [0, i); rows: layers that split over shards, layers that every shard holds whole."""
        layers = self.model.layers
        never_synced, held_twice = [0] * len(layers), [(0, 0)] * len(layers)
        for a, b in self.costs.ties:
            trained = shared_bytes(layers, (a, b))[1]
            never_synced[a] += trained
            never_synced[b] += trained
        for tie in find_ties(layers):
            shared, trained = shared_bytes(layers, tie)
            held_twice[tie[1]] = (held_twice[tie[1]][0] + shared, held_twice[tie[1]][1] + trained)
        optimizer = 1 + self.request.optimizer_state_factor
        synced, static, saved = [], [], []
        for i, layer in enumerate(layers):
            trains = layer.trainable_parameter_bytes
            synced.append(max(0, trains - never_synced[i]))
            shared, trained = held_twice[i]
            static.append(layer.parameter_bytes - shared + optimizer * (trains - trained))
            saved.append(layer.saved_bytes_per_sample)
        split = [layer.tensor is not None for layer in layers]
        self._synced, self._static, self._saved = (
            np.array(
                [
                    list(accumulate((x if s else 0 for x, s in zip(sizes, split, strict=True)), initial=0)),
                    list(accumulate((0 if s else x for x, s in zip(sizes, split, strict=True)), initial=0)),
                ],
                dtype=float,
            )
            for sizes in (synced, static, saved)
        )
        self._out_bytes = np.array([layer.output_bytes_per_sample for layer in layers], dtype=float)
        self._floor_w, self._compute_w, self._talk_w = {}, {}, {}
        for device in self.pool.devices:
            mode = device.modes[0]
            floor = min(mode.idle_w, mode.compute_w, mode.communicate_w)
            self._floor_w[device.id] = floor
            self._compute_w[device.id] = mode.compute_w - floor
            self._talk_w[device.id] = mode.communicate_w - floor if floor == mode.idle_w else 0.0
        self._pool_idle_w = {device.id: device.modes[0].idle_w for device in self.pool.devices}

    def _make_options(self, group: Group, size: int) -> _Options | None:
        layers = len(self.model.layers)
        speeds = [sum(self.speed(d, size) for d in replica) for replica in group]
        samples = shares(size, speeds)
        units = self.model.shard_units
        if len(group[0]) == 1:
            fractions: list[tuple[float, ...]] = [(1.0,)]
        else:
            columns = [min(self.speed(r[k], size) for r in group) for k in range(len(group[0]))]
            fractions = [tuple(u / units for u in parts) for parts in shares(units, columns)]
        choices = [(s, f) for s in samples for f in fractions]
        if not choices:
            return None
        shape = (len(choices), len(group), len(group[0]), layers + 1)
        forward, backward, update = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        reduce_forward = np.zeros((shape[0], shape[1], layers + 1))
        reduce_backward = np.zeros_like(reduce_forward)
        for o, (rows, parts) in enumerate(choices):
            for r, replica in enumerate(group):
                for k, device in enumerate(replica):
                    key = self.costs.key(Shard(device=device, fraction=parts[k]))
                    forward[o, r, k], backward[o, r, k] = self.costs.prefix_s(*key, rows[r], parts[k])
                    update[o, r, k] = self.costs.update_prefix_s(*key, parts[k])
                if len(replica) > 1:
                    reduce_forward[o, r], reduce_backward[o, r] = self.costs.allreduce_prefix_s(
                        replica, rows[r]
                    )
        return _Options(choices, forward, backward, update, reduce_forward, reduce_backward)

    def speed(self, device: str, size: int) -> float:
        """Return how often a second a device could compute the whole model for `size` samples, memory aside."""
        forward, backward = self.costs.prefix_s(*self.costs.key(Shard(device=device)), size, 1.0)
        return 1.0 / max(forward[-1] + backward[-1], 1e-12)

    # -- bounds ----------------------------------------------------------------------------------------------

    def _bound_skeletons(self) -> dict[Family, list[_Skeletons]]:
        found: dict[Family, list[_Skeletons]] = {family: [] for family in FAMILIES}
        for layout in self._layouts():
            used = {device for group in layout for replica in group for device in replica}
            if not used.issuperset(self.request.must_use) or len(layout) > len(self.model.layers):
                continue
            if not self._joined(layout):
                continue
            speeds = [sum(self.speed(d, 1) for replica in group for d in replica) for group in layout]
            edges = layer_cuts(len(self.model.layers), speeds)
            for size in divisors(self.request.global_batch_size):
                bounds = self.bound(layout, size, edges)
                if bounds is not None:
                    found[family_of(layout)].append(_Skeletons(layout, size, edges, *bounds))
                    self.num_skeletons += len(edges)
        return found

    def _layouts(self) -> Iterator[Layout]:
        """Yield every layout of the fastest few devices, and the plain ones of all larger sets, fastest first."""
        named = self.request.must_use
        units = self.model.shard_units
        ranked = sorted(self.devices, key=lambda d: (d not in named, -self.speed(d, 1)))
        few = [device for device in self.devices if device in ranked[:_MOST_DEVICES]]
        self.exhaustive = len(few) == len(self.devices)
        yield from layouts(few, units, device_classes(self.pool, self.costs, named))
        for size in range(len(few) + 1, len(ranked) + 1):
            some = ranked[:size]
            yield (tuple((device,) for device in some),)
            if size <= units:
                yield ((tuple(some),),)
            by_memory = sorted(some, key=lambda d: -self.pool.device(d).memory_bytes)
            for order in dict.fromkeys((tuple(some), tuple(reversed(some)), tuple(by_memory))):
                yield tuple(((device,),) for device in order)

    def _joined(self, layout: Layout) -> bool:
        """Return whether every two devices that would have to talk can."""
        pairs: set[tuple[str, str]] = set()
        for group in layout:
            rings = [*group, *zip(*group, strict=True)]
            pairs.update(pair for ring in rings if len(ring) > 1 for pair in _hops_of(ring))
        for left, right in pairwise(layout):
            for a, b in product([d for r in left for d in r], [d for r in right for d in r]):
                pairs.update(((a, b), (b, a)))
        if len(layout) > 1 and self.costs.ties:  # who holds a tied weight depends on the cut; ask for all
            pairs.update(permutations([d for group in layout for replica in group for d in replica], 2))
        return all(find_route(self.costs, a, b) is not None for a, b in pairs)

    def bound(
        self, layout: Layout, size: int, edges: Edges, each_option: bool = False
    ) -> tuple[Array, Array] | None:
        """Return lower bounds of step time and energy, of each cut or (for one cut) of each choice of options."""
        count = self.request.global_batch_size // size
        stages = []
        for s, group in enumerate(layout):
            options = self._options(group, size)
            if options is None:
                return None
            arrays = self._stage_arrays(group, options, count, edges[:, s], edges[:, s + 1])
            if each_option:
                shape = [1] * len(layout)
                shape[s] = len(options.choices)
                stages.append(StageArrays(*(array[:, 0].reshape(shape) for array in arrays)))
            else:
                stages.append(StageArrays(*(array.min(axis=0) for array in arrays)))
        hops, one_medium = self._hops(layout, size, count, edges)
        step_s = step_lower_bound(stages, hops, count, one_medium)
        used = [device for group in layout for replica in group for device in replica]
        watts = sum(self._floor_w[device] for device in used)
        if self.request.accounting == "whole-pool":
            watts += sum(w for device, w in self._pool_idle_w.items() if device not in used)
        dynamic = sum((stage.dynamic_joules for stage in stages), np.zeros(()))
        fits = np.isfinite(step_s)
        return step_s, np.where(fits, watts * np.where(fits, step_s, 0.0) + dynamic, np.inf)

    def _stage_arrays(
        self,
        group: Group,
        options: _Options,
        count: int,
        starts: Edges,
        stops: Edges,
    ) -> tuple[Array, ...]:
        """Return the fields of StageArrays, each [option, cut]; what cannot fit in memory is infinitely slow."""

        def between(prefix: Array) -> Array:
            return np.maximum(prefix[..., stops] - prefix[..., starts], 0.0)

        own_f, own_b, own_u = (between(a) for a in (options.forward_s, options.backward_s, options.update_s))
        reduce_f, reduce_b = between(options.reduce_forward_s), between(options.reduce_backward_s)
        forward, backward = own_f.max(axis=2) + reduce_f, own_b.max(axis=2) + reduce_b
        busy = (forward + backward).max(axis=1)
        rows = np.array([samples for samples, _ in options.choices], dtype=float)[:, :, None, None]
        fractions = np.array([parts for _, parts in options.choices])[:, None, :, None]
        synced, static, saved = (between(a) for a in (self._synced, self._static, self._saved))
        sync = np.zeros((len(options.choices), len(group[0]), len(starts)))
        if len(group) > 1:
            n = len(group)
            num_bytes = fractions[:, 0] * synced[0] + synced[1]
            for k in range(len(group[0])):
                latency_s, bandwidth = self.costs.ring(tuple(replica[k] for replica in group))
                one = 2 * (n - 1) * latency_s + 2 * (n - 1) / n * num_bytes[:, k] / bandwidth
                sync[:, k] = np.where(num_bytes[:, k] > 0, one, 0.0)
        tail = sync.max(axis=1) + own_u.max(axis=(1, 2))
        memory = np.array([[self._memory_bytes(d) for d in replica] for replica in group])[None, :, :, None]
        needed = fractions * static[0] + static[1] + (fractions * saved[0] + saved[1]) * rows
        busy = np.where((needed > memory + 1).any(axis=(1, 2)), np.inf, busy)
        compute_w = np.array([[self._compute_w[d] for d in replica] for replica in group])[None, :, :, None]
        talk_w = np.array([[self._talk_w[d] for d in replica] for replica in group])[None, :, :, None]
        dynamic = compute_w * (count * (own_f + own_b) + own_u)
        dynamic = dynamic + talk_w * ((count * (reduce_f + reduce_b))[:, :, None] + sync[:, None])
        return (
            forward.min(axis=1),
            forward.max(axis=1),
            backward.min(axis=1),
            busy,
            tail,
            dynamic.sum(axis=(1, 2)),
        )

    def _memory_bytes(self, device: str) -> int:
        profile = self.pool.device(device)
        return profile.memory_bytes - profile.runtime_bytes

    def _hops(self, layout: Layout, size: int, count: int, edges: Edges) -> tuple[list[HopArrays], bool]:
        hops, media = [], set()
        for s, (left, right) in enumerate(pairwise(layout)):
            out_bytes = self._out_bytes[edges[:, s + 1] - 1]
            first, total = [], []
            alone = len(left) == len(right) == 1
            for sender, receiver in ((left, right), (right, left)):
                routes = {
                    route.medium: route
                    for source, target in product(sender, receiver)
                    for k, device in enumerate(target)
                    for route in [self.costs.route(source[k % len(source)], device)]
                }
                media |= set(routes)
                rates = [route.bandwidth_bytes_per_s for route in routes.values()]
                copies = size * len(receiver[0])
                total.append(count * copies * out_bytes / sum(rates))
                one = copies * out_bytes / sum(rates) if alone else out_bytes / max(rates)
                first.append(min(route.latency_s for route in routes.values()) + one)
            hops.append(HopArrays(first[0], total[0], first[1], total[1], len(right) == 1))
        return hops, len(media) == 1

    # -- candidates ------------------------------------------------------------------------------------------

    def best(
        self, families: Sequence[Family], objective: Objective, start: Found | None = None
    ) -> Found | None:
        """Return the best plan of some families, or None if none of theirs fits in memory.

        Args:
            families: Where to look.
            objective: What to minimise, under the request's deadline.
            start: A plan already simulated; only a better one is returned in its place.
        """
        chosen = [chunk for family in families for chunk in self.skeletons[family]]
        keys = [self._scores(chunk.step_s, chunk.energy_joules, objective) for chunk in chosen]
        if not keys:
            return start
        late = np.concatenate(
            [np.broadcast_to(k[0], len(c.edges)) for k, c in zip(keys, chosen, strict=True)]
        )
        value = np.concatenate(
            [np.broadcast_to(k[1], len(c.edges)) for k, c in zip(keys, chosen, strict=True)]
        )
        owner = np.repeat(np.arange(len(chosen)), [len(c.edges) for c in chosen])
        cut = np.concatenate([np.arange(len(c.edges)) for c in chosen])
        best = start
        for i in np.lexsort((value, late)):
            if not np.isfinite(value[i]) or not _can_beat((int(late[i]), float(value[i])), best):
                break
            best = self._try_skeleton(chosen[owner[i]], int(cut[i]), objective, best)
        return best

    def _scores(self, step_s: Array, energy: Array, objective: Objective) -> tuple[Array, Array]:
        """Return scores as two arrays: whether the deadline is missed, and what to minimise."""
        deadline = self.request.deadline_step_s
        late = step_s > (np.inf if deadline is None else deadline)
        match objective:
            case "time":
                wanted = step_s
            case "energy":
                wanted = energy
            case "energy-delay":
                wanted = energy * step_s
        wanted = np.where(np.isfinite(step_s), wanted, np.inf)
        return late.astype(float), np.where(late, step_s, wanted)

    def _try_skeleton(
        self, chunk: _Skeletons, cut: int, objective: Objective, best: Found | None
    ) -> Found | None:
        """Simulate the candidates of one skeleton, in order of their bound, as long as one can win."""
        layout, size = chunk.layout, chunk.microbatch_size
        edges = chunk.edges[cut : cut + 1]
        bounds = self.bound(layout, size, edges, each_option=True)
        assert bounds is not None
        late, value = self._scores(*bounds, objective)
        shape = late.shape or (1,)
        late, value = late.ravel(), value.ravel()
        for i in np.lexsort((value, late)):
            if not np.isfinite(value[i]) or not _can_beat((int(late[i]), float(value[i])), best):
                break
            choices = [int(c) for c in np.unravel_index(i, shape)]
            for schedule in self.schedules(chunk):
                plan = self.make_plan(layout, size, edges[0], choices, schedule)
                if plan is not None:
                    found = self.score(plan, objective)
                    if best is None or found.score < _slightly_below(best.score):
                        best = found
        return best

    def schedules(self, chunk: _Skeletons) -> list[PlanSchedule]:
        """Return the schedules that differ for these skeletons."""
        return schedules(len(chunk.layout), self.request.global_batch_size // chunk.microbatch_size)

    def make_plan(
        self,
        layout: Layout,
        size: int,
        edges: Edges,
        choices: Sequence[int],
        schedule: PlanSchedule,
    ) -> Plan | None:
        """Return the candidate with recomputation where memory needs it, or None if it does not fit."""
        count, num_stages = self.request.global_batch_size // size, len(layout)
        stages, recompute = [], []
        for s, (group, choice) in enumerate(zip(layout, choices, strict=True)):
            if schedule.name == "gpipe":
                depth = count
            else:
                depth = min(schedule.warmup[s] if schedule.warmup else num_stages - s, count)
            start, stop = int(edges[s]), int(edges[s + 1])
            flag = self._recompute(group, size, choice, start, stop, depth)
            if flag is None:
                return None
            recompute.append(flag)
            stages.append(self._stage(group, size, choice, start, stop))
        return Plan.model_construct(
            schema_tag="colledge/plan/1",
            num_layers=len(self.model.layers),
            global_batch_size=self.request.global_batch_size,
            microbatch_size=size,
            schedule=schedule,
            stages=tuple(stages),
            recompute=tuple(recompute) if any(recompute) else None,
            prediction=None,
        )

    def _make_stage(self, group: Group, size: int, choice: int, start: int, stop: int) -> Stage:
        options = self._options(group, size)
        assert options is not None
        samples, fractions = options.choices[choice]
        return Stage(
            layers=(start, stop),
            replicas=tuple(
                Replica(
                    samples=rows,
                    shards=tuple(
                        Shard(device=d, fraction=f) for d, f in zip(replica, fractions, strict=True)
                    ),
                )
                for rows, replica in zip(samples, group, strict=True)
            ),
        )

    def _recompute(
        self, group: Group, size: int, choice: int, start: int, stop: int, depth: int
    ) -> bool | None:
        """Return whether a stage must recompute to fit in memory; None if it does not fit even so."""
        key = (group, size, choice, start, stop, depth)
        if key not in self._fits:
            stage = self._stage(group, size, choice, start, stop)
            self._fits[key] = None
            for flag in (False, True):
                if all(lack <= 0 for lack, _, _ in self._lacks(stage, depth, flag)):
                    self._fits[key] = flag
                    break
        return self._fits[key]

    def _lacks(self, stage: Stage, depth: int, recompute: bool) -> Iterator[tuple[int, str, MemoryParts]]:
        """Yield, for each device of a stage, the bytes it lacks and what it would hold."""
        for replica in stage.replicas:
            for shard in replica.shards:
                device = self.pool.device(shard.device)
                load = Load(stage.layers, shard.fraction, replica.samples, depth, recompute)
                parts = self.memory.parts(load, device.runtime_bytes)
                yield parts.total_bytes - device.memory_bytes, device.id, parts

    def score(self, plan: Plan, objective: Objective) -> Found:
        """Simulate a plan and return it with its score; it also enters the frontier."""
        timeline = simulate(plan, self.costs)
        self.num_simulated += 1
        whole, marginal = plan_joules(plan, self.pool, timeline)
        energy = whole if self.request.accounting == "whole-pool" else marginal
        late, value = self._scores(np.asarray(timeline.step_s), np.asarray(energy), objective)
        found = Found(plan, (int(late), float(value)), timeline.step_s, energy)
        if not any(f.step_s <= found.step_s and f.energy_joules <= energy for f in self.frontier):
            self.frontier = [
                f for f in self.frontier if f.step_s < found.step_s or f.energy_joules < energy
            ] + [found]
        return found

    def improve_modes(self, found: Found, objective: Objective) -> Found:
        """Return the plan after trying each device's other power modes, one device at a time, while that helps."""
        improved = True
        while improved:
            improved = False
            for place in found.plan.places():
                device = self.pool.device(place.shard.device)
                for mode in device.modes:
                    now = place.shard.mode or device.modes[0].name
                    if mode.name == now or not self.costs.has_mode(device.id, mode.name):
                        continue
                    other = self.score(_with_mode(found.plan, device.id, mode.name), objective)
                    if other.score < _slightly_below(found.score):
                        found, improved = other, True
        return found

    def find_ends(self) -> None:
        """Extend the frontier to both its ends: the fastest plan and the one of least energy."""
        for objective in ("time", "energy"):
            met = [found for found in self.frontier if self._meets_deadline(found)]
            ends = [self._rescored(found, objective) for found in met or self.frontier]
            self.best(FAMILIES, objective, min(ends, key=lambda found: found.score))

    def _meets_deadline(self, found: Found) -> bool:
        deadline = self.request.deadline_step_s
        return deadline is None or found.step_s <= deadline

    def _rescored(self, found: Found, objective: Objective) -> Found:
        late, value = self._scores(np.asarray(found.step_s), np.asarray(found.energy_joules), objective)
        return replace(found, score=(int(late), float(value)))

    def coverage(self) -> str:
        """Return in words how much was searched."""
        text = (
            f"{self.num_skeletons} layouts and cuts were bounded, {self.num_simulated} plans were simulated"
        )
        if self.exhaustive:
            return f"{text}; none of the others can be better."
        return (
            f"{text}. The pool is large: all layouts of its fastest {_MOST_DEVICES} devices were tried, and of "
            "larger sets only plain data, tensor and pipeline plans, so a better plan may exist."
        )

    def least_lack(self) -> tuple[str, MemoryParts] | None:
        """Return, over all layouts at their smallest micro-batch and with recomputation, who lacks least."""
        least: tuple[int, str, MemoryParts] | None = None
        for chunks in self.skeletons.values():
            for chunk in chunks:
                depths = [
                    min(len(chunk.layout) - s, self.request.global_batch_size // chunk.microbatch_size)
                    for s in range(len(chunk.layout))
                ]
                for edges in chunk.edges:
                    worst: tuple[int, str, MemoryParts] | None = None
                    for s, group in enumerate(chunk.layout):
                        bounds = int(edges[s]), int(edges[s + 1])
                        lack = self._stage_lack(group, chunk.microbatch_size, bounds, depths[s])
                        if worst is None or lack[0] > worst[0]:
                            worst = lack
                    if worst is not None and worst[0] > 0 and (least is None or worst[0] < least[0]):
                        least = worst
        return None if least is None else least[1:]

    def _stage_lack(
        self, group: Group, size: int, layers: tuple[int, int], depth: int
    ) -> tuple[int, str, MemoryParts]:
        """Return the worst lack of the option of a stage that lacks least."""
        options = self._options(group, size)
        assert options is not None
        found = []
        for choice in range(len(options.choices)):
            stage = self._stage(group, size, choice, *layers)
            for flag in (False, True):
                found.append(max(self._lacks(stage, depth, flag), key=lambda lack: lack[0]))
        return min(found, key=lambda lack: lack[0])


def _hops_of(ring: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(ring, (*ring[1:], ring[0]), strict=True)


def _with_mode(plan: Plan, device: str, mode: str) -> Plan:
    stages = tuple(
        stage.model_copy(
            update={
                "replicas": tuple(
                    replica.model_copy(
                        update={
                            "shards": tuple(
                                shard.model_copy(update={"mode": mode}) if shard.device == device else shard
                                for shard in replica.shards
                            )
                        }
                    )
                    for replica in stage.replicas
                )
            }
        )
        for stage in plan.stages
    )
    return plan.model_copy(update={"stages": stages})


def _slightly_below(score: Score) -> Score:
    """Return the score that a plan must be under to count as better: rounding is no gain."""
    return score[0], score[1] * (1 - _EQUAL)


def _can_beat(bound: Score, best: Found | None) -> bool:
    return best is None or bound < _slightly_below(best.score)
