"""Good drafts for any pool: a dynamic program over (layers done, devices used of each class), swept over a time bound.

With micro-batches of m rows and a bound tau on what any stage takes for one, a step takes about
sum_s fill_s + (M - 1) tau, and its energy is idle watts x time + M sum_s dynamic_s. For fixed (m, tau) both are sums
over stages, so one program from the last stage to the first (the number of stages behind is the number of
micro-batches in flight) finds the best split for every number of devices used; sweeping tau trades time for energy.

    state     (stages behind, devices used of each class, first layer of them)
    stage     a span of layers x a number of devices of each class: rows go to the devices of fewest joules a row first,
              each up to tau and up to its memory

Devices of one class are counted, never listed; on large pools counts and cuts move in steps. The values are estimates:
the simulator decides among the drafts, and local moves finish them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from colledge.arrays import Array
from colledge.planner.draft import Draft, StageDraft, make_draft
from colledge.planner.memory import Shares
from colledge.planner.tables import Tables, find_route

Whole = npt.NDArray[np.int64]

_RECOMPUTING = 4 / 3  # a forward more; a backward takes about two
_MOST_STATES = 64
_MANY_CLASSES, _MOST_STATES_OF_MANY = 4, 256
_MOST_CUTS = 12
_MOST_STAGES, _MOST_STAGES_NEEDED = 6, 16
_MOST_CELLS = 5_000_000
_NUM_BOUNDS = 5


@dataclass(frozen=True)
class Goal:
    """What the program minimises: `watts` x step time + `dynamic` x energy above idling."""

    watts: float
    dynamic: float = 1.0


@dataclass(frozen=True)
class _Link:
    """The best that a device of a class gets to reach another device."""

    latency_s: float
    bandwidth_bytes_per_s: float
    shared: bool


@dataclass(frozen=True)
class _Class:
    """Devices that can be exchanged: members, and one choice of power mode with what follows from it.

    `first_s` and `more_s` are seconds of the first row and of each more, a span; `joules` those of a row.
    """

    mode: str | None
    first_s: Array
    more_s: Array
    joules: Array
    update_s: Array
    order: float


class Sweep:
    """The program for one pool, model and request."""

    def __init__(self, tables: Tables, classes: Sequence[Sequence[str]], marginal: bool) -> None:
        self.tables, self.classes, self.marginal = tables, [list(members) for members in classes], marginal
        needed = min(2 * self._stages_needed(), tables.num_layers, _MOST_STAGES_NEEDED)
        self.most_stages = max(_MOST_STAGES, needed)
        self.positions = _spread(tables.num_layers, max(_MOST_CUTS, 2 * self.most_stages))
        counts, most = [len(members) for members in self.classes], _MOST_STATES_OF_MANY
        while True:
            self.states = _count_vectors(counts, most)
            self.takes, self.moves = _takes(self.states)
            pairs = sum(len(before) for before, _ in self.moves)
            cells = pairs * len(self.positions) ** 2 * _NUM_BOUNDS * self.most_stages
            if cells <= _MOST_CELLS or most <= 4:
                break
            most //= 2
        self.links = [self._link(members) for members in self.classes]
        self._from, self._to = np.triu_indices(len(self.positions), 1)  # a span is a pair of positions
        self._start, self._stop = self.positions[self._from], self.positions[self._to]
        self._whole = len(self.positions) - 2  # the span of all layers

    def _stages_needed(self) -> int:
        """Return the stages at least that the weights need, one device a stage."""
        devices = [self.tables.pool.device(members[0]) for members in self.classes]
        room = max(device.room_bytes for device in devices)
        return int(-(-self.tables.memory.static_bytes((0, self.tables.num_layers), 1.0) // max(room, 1)))

    def _link(self, members: Sequence[str]) -> _Link | None:
        costs, one = self.tables.costs, members[0]
        others = [other for group in self.classes for other in group[:2] if other != one]
        routes = [r for other in others for r in [find_route(costs, one, other)] if r is not None]
        if not routes:
            return None
        best = max(routes, key=lambda route: route.bandwidth_bytes_per_s)
        return _Link(best.latency_s, best.bandwidth_bytes_per_s, "->" not in best.medium)

    def _between(self, prefix: Array) -> Array:
        """Return prefix sums over layers as sums over spans, [.., span]."""
        return np.maximum(prefix[..., self._stop] - prefix[..., self._start], 0.0)

    def drafts(self, microbatch_size: int, goals: Sequence[Goal], keep: int) -> Iterator[Draft]:
        """Yield the best few drafts of one micro-batch size for each goal, over all bounds and numbers of stages."""
        seen: set[tuple[str | None, ...]] = set()
        for policy in range(3):
            classes = [self._class(k, policy, microbatch_size) for k in range(len(self.classes))]
            modes = tuple(entry.mode for entry in classes)
            if modes not in seen:
                seen.add(modes)
                bounds = self._time_bounds(classes, microbatch_size)
                for goal in goals:
                    yield from self._solve(classes, bounds, microbatch_size, goal, keep)

    def _class(self, index: int, policy: int, m: int) -> _Class:
        """Return a class in the power mode that a policy gives it: 0 the first, 1 the thriftiest, 2 the fastest."""
        device = self.classes[index][0]
        found = []
        for name, mode in self.tables.modes(device):
            rows = sorted({1, m})
            seconds = []
            for y in rows:
                kind = self.tables.pool.device(device).kind
                forward, backward = self.tables.costs.prefix_s(kind, mode.name, y, 1.0)
                seconds.append(np.array(forward) + np.array(backward))
            first = self._between(seconds[0])
            more = (self._between(seconds[-1]) - first) / (m - 1) if m > 1 else first
            a_row = (first + (m - 1) * more) / m
            watts = max(0.0, mode.compute_w - mode.idle_w)
            update = np.array(self.tables.costs.update_prefix_s(kind, mode.name, 1.0))
            whole = float(a_row[self._whole])
            found.append(
                (
                    name,
                    whole,
                    watts * whole,
                    _Class(name, first, more, watts * a_row, self._between(update), 0.0),
                )
            )
        if policy == 0:
            chosen = found[0]
        elif policy == 1:
            chosen = min(found, key=lambda entry: (entry[2], entry[1]))
        else:
            chosen = min(found, key=lambda entry: (entry[1], entry[2]))
        mode_class = chosen[3]
        return _Class(
            mode_class.mode,
            mode_class.first_s,
            mode_class.more_s,
            mode_class.joules,
            mode_class.update_s,
            chosen[2],
        )

    def _time_bounds(self, classes: Sequence[_Class], m: int) -> Array:
        """Return bounds on a stage's seconds a micro-batch, from all devices side by side to the slowest alone."""
        whole = [c.first_s[self._whole] + (m - 1) * c.more_s[self._whole] for c in classes]
        rate = sum(len(members) / max(s, 1e-12) for members, s in zip(self.classes, whole, strict=True))
        low, high = 1.0 / rate, max(whole)
        return np.geomspace(low * 1.02, max(high * 1.02, low * 1.1), _NUM_BOUNDS)

    def _memory_rows(self, index: int, depth: int, recompute: bool) -> Array:
        """Return the most rows that a device of a class can hold of each span."""
        return self.tables.span_rows(self.classes[index][0], depth, recompute)[self._start, self._stop]

    def _solve(
        self, classes: Sequence[_Class], bounds: Array, m: int, goal: Goal, keep: int
    ) -> Iterator[Draft]:
        """Run the program for all time bounds at once and yield the best drafts."""
        count = self.tables.request.global_batch_size // m
        num_bounds, num_positions = len(bounds), len(self.positions)
        last = num_positions - 1
        behind = np.full((num_bounds, len(self.states), num_positions), np.inf)
        behind[:, 0, last] = 0.0
        history: list[tuple[Whole, Whole]] = []
        found: list[tuple[float, int, int, int]] = []
        costs, known_rows = None, None
        for depth in range(
            1, min(self.most_stages, num_positions - 1, int(self.states.sum(axis=1).max())) + 1
        ):
            in_flight = min(depth, count)
            rows = [
                [np.minimum(self._memory_rows(k, in_flight, flag), m) for k in range(len(classes))]
                for flag in (False, True)
            ]
            if known_rows is None or not np.array_equal(rows, known_rows):
                costs = self._stage_costs(classes, bounds, m, goal, rows)
                known_rows = rows
            assert costs is not None
            ahead = np.full_like(behind, np.inf)
            from_state = np.zeros(behind.shape, dtype=np.int64)
            to_position = np.zeros(behind.shape, dtype=np.int64)
            for take, (before, after) in enumerate(self.moves):
                live = np.isfinite(behind[:, before]).any(axis=(0, 2))
                if not live.any():
                    continue
                before, after = before[live], after[live]
                total = behind[:, before, None, :] + costs[:, take, None, :, :]
                stop = total.argmin(axis=3)
                value = np.take_along_axis(total, stop[..., None], axis=3)[..., 0]
                wins = value < ahead[:, after]
                ahead[:, after] = np.where(wins, value, ahead[:, after])
                from_state[:, after] = np.where(wins, before[None, :, None], from_state[:, after])
                to_position[:, after] = np.where(wins, stop, to_position[:, after])
            history.append((from_state, to_position))
            final = ahead[:, :, 0] + goal.watts * (count - 1) * bounds[:, None]
            best = np.argsort(final, axis=None)[: 4 * keep]
            picked: set[int] = set()
            for flat in best:
                at, state = divmod(int(flat), final.shape[1])
                if np.isfinite(final[at, state]) and state not in picked and len(picked) < keep:
                    picked.add(state)
                    found.append((float(final[at, state]), depth, at, state))
            behind = ahead
        found.sort()
        for _, depth, at, state in found[: 3 * keep]:
            draft = self._trace(classes, history, depth, at, state, m, float(bounds[at]), count)
            if draft is not None:
                yield draft

    def _stage_costs(
        self,
        classes: Sequence[_Class],
        bounds: Array,
        m: int,
        goal: Goal,
        rows: Sequence[Sequence[Array]],
    ) -> Array:
        """Return what each stage adds, [bound, take, start, stop]: infinite where it cannot keep bound or memory."""
        count = self.tables.request.global_batch_size // m
        tau = bounds[:, None]
        shape = (len(bounds), len(self.takes), len(self._start))
        order = sorted(range(len(classes)), key=lambda k: classes[k].order)
        synced = self._between(self.tables.synced_bytes.sum(axis=0))
        into = np.where(self._start > 0, self.tables.out_bytes[np.maximum(self._start - 1, 0)], 0.0)
        ways = np.where(self._start > self.tables.costs.first_trained, 2, 1)
        best = np.full(shape, np.inf)
        members = self.takes.sum(axis=1)
        for flag in (False, True):
            if flag and np.array_equal(rows[0], rows[1]):
                break  # memory does not bind
            left = np.full(shape, float(m))
            fill, dynamic, sending = np.zeros(shape), np.zeros(shape), np.zeros(shape)
            update = np.zeros(shape[1:])
            latency, bandwidth = np.zeros(len(self.takes)), np.full(len(self.takes), np.inf)
            idle = np.zeros(len(self.takes))
            extra = 4 / 3 if flag else 1.0
            for k in order:
                this, link, uses = classes[k], self.links[k], np.flatnonzero(self.takes[:, k])
                number = self.takes[uses, k][:, None]
                first, more = this.first_s * extra, this.more_s * extra
                within = np.where(
                    first <= tau, 1 + np.floor((tau - first) / np.maximum(more, 1e-15) + 1e-9), 0.0
                )
                each = np.clip(np.minimum(within, rows[flag][k]), 0, m)
                part = np.minimum(left[:, uses], each[:, None] * number)
                left[:, uses] -= part
                share = np.ceil(part / number)
                works = share > 0
                fill[:, uses] = np.maximum(fill[:, uses], np.where(works, first + more * (share - 1), 0.0))
                dynamic[:, uses] += part * (this.joules * extra)
                update[uses] = np.maximum(update[uses], this.update_s)
                idle[uses] += number[:, 0] * self.tables.modes(self.classes[k][0])[0][1].idle_w
                if link is None:
                    left[:, uses[members[uses] > 1]] = np.inf
                    continue
                latency[uses] = np.maximum(latency[uses], link.latency_s)
                ring = link.bandwidth_bytes_per_s / (members[uses] if link.shared else 1)
                bandwidth[uses] = np.minimum(bandwidth[uses], ring)
                sent = float(m) if link.shared else share
                seconds = link.latency_s + sent * into / link.bandwidth_bytes_per_s
                sending[:, uses] = np.maximum(sending[:, uses], np.where(works & (into > 0), seconds, 0.0))
            ring_s = (
                2 * (members - 1)[:, None] * latency[:, None]
                + (2 * (members - 1) / np.maximum(members, 1) / bandwidth)[:, None] * synced
            )
            sync = np.where((members > 1)[:, None] & (synced > 0), ring_s, 0.0)
            weight = np.where(self._start == 0, 1.0, 0.4)
            seconds = fill + ways * sending + weight * (sync + update)
            value = goal.watts * seconds + goal.dynamic * count * dynamic
            if self.marginal:
                value += goal.dynamic * idle[:, None] * (tau[:, None] * (count - 1) + seconds)
            value = np.where((left > 0) | (sending > tau[:, None]), np.inf, value)
            best = np.minimum(best, value)
        square = np.full((*shape[:2], len(self.positions), len(self.positions)), np.inf)
        square[:, :, self._from, self._to] = best
        return square

    def _trace(
        self,
        classes: Sequence[_Class],
        history: Sequence[tuple[Whole, Whole]],
        depth: int,
        b: int,
        state: int,
        m: int,
        bound_s: float,
        count: int,
    ) -> Draft | None:
        """Return the draft behind a final state: stages first to last, real devices, whole rows."""
        position, spans = 0, []
        for level in range(depth, 0, -1):
            before = int(history[level - 1][0][b, state, position])
            stop = int(history[level - 1][1][b, state, position])
            spans.append((position, stop, self.states[state] - self.states[before]))
            state, position = before, stop
        taken = [0] * len(self.classes)
        stages = []
        for s, (start, stop, take) in enumerate(spans):
            layers = (int(self.positions[start]), int(self.positions[stop]))
            devices: list[str] = []
            modes: list[str | None] = []
            for k in sorted(range(len(classes)), key=lambda k: classes[k].order):
                devices += self.classes[k][taken[k] : taken[k] + int(take[k])]
                modes += [classes[k].mode] * int(take[k])
                taken[k] += int(take[k])
            stage = fill_rows(self.tables, layers, devices, modes, m, min(depth - s, count), bound_s)
            if stage is None:
                return None
            stages.append(stage)
        return make_draft(m, tuple(stages), count)


def fill_rows(
    tables: Tables,
    layers: tuple[int, int],
    devices: Sequence[str],
    modes: Sequence[str | None],
    m: int,
    depth: int,
    bound_s: float | None = None,
) -> StageDraft | None:
    """Return a stage of replicas with one device each whose rows go to the first devices first, up to a time bound.

    Without a bound, or where it cannot be kept, the least bound that can be is taken: rows end up balanced. A device
    that gets no rows is left out. Recomputation is used where memory needs it. None if memory cannot hold the rows.
    """
    for recompute in (False, True):
        most = [
            min(m, tables.memory_rows(device, layers, depth, 1.0, recompute, shares))
            for device, shares in zip(devices, tables.rough_shares(devices), strict=True)
        ]
        if sum(max(0, rows) for rows in most) < m:
            continue
        rows = None
        if bound_s is not None:
            rows = _rows_within(tables, layers, devices, modes, most, m, bound_s)
        if rows is None:
            rows = _balanced_rows(tables, layers, devices, modes, most, m)
        used = [i for i, number in enumerate(rows) if number > 0]
        return StageDraft(
            layers,
            tuple((devices[i],) for i in used),
            tuple(rows[i] for i in used),
            (tables.units,),
            tuple((modes[i],) for i in used),
            recompute,
        )
    return None


def fitted_pipeline(tables: Tables, groups: Sequence[Sequence[str]], m: int, count: int) -> Draft | None:
    """Return the pipeline over groups of devices whose slowest stage is fastest among those that fit in memory.

    Args:
        tables: The pool and the model.
        groups: The devices of each stage, each a replica in its first mode.
        m: Rows of a micro-batch.
        count: Micro-batches in a step.
    """
    whole = (0, tables.num_layers)
    best, came = np.where(np.arange(tables.num_layers + 1) == 0, 0.0, np.inf), []
    weight = np.add(*tables.costs.prefix_s(*tables.kind_and_mode(groups[0][0], None), 1, 1.0))
    for s, group in enumerate(groups):
        depth = min(len(groups) - s, count)
        each = {device: tables.busy_s(device, None, whole, 1, 1.0) for device in group}
        rows, rows_again = (np.zeros((tables.num_layers + 1,) * 2) for _ in range(2))
        alike: dict[tuple[int, float, Shares], int] = {}
        for device, shares in zip(group, tables.rough_shares(group), strict=True):
            profile = tables.pool.device(device)
            key = profile.room_bytes, profile.allocator_overhead, shares
            alike[key] = alike.get(key, 0) + 1
        for (room, overhead, shares), number in alike.items():
            rows += number * np.maximum(tables.rows_of_spans(room, overhead, depth, False, shares), 0.0)
            rows_again += number * np.maximum(tables.rows_of_spans(room, overhead, depth, True, shares), 0.0)
        rate = sum(1.0 / max(second, 1e-12) for second in each.values())
        seconds = m * (weight[None, :] - weight[:, None]) / max(weight[-1], 1e-12) / rate
        seconds = np.where(rows >= m, seconds, np.where(rows_again >= m, _RECOMPUTING * seconds, np.inf))
        worst = np.maximum(best[:, None], seconds)
        worst[np.tri(tables.num_layers + 1, dtype=bool)] = np.inf
        came.append(worst.argmin(axis=0))
        best = worst.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    edges = [tables.num_layers]
    for choice in reversed(came):
        edges.insert(0, int(choice[edges[0]]))
    stages = []
    for s, group in enumerate(groups):
        depth = min(len(groups) - s, count)
        stage = fill_rows(tables, (edges[s], edges[s + 1]), group, [None] * len(group), m, depth)
        if stage is None:
            return None
        stages.append(stage)
    return make_draft(m, tuple(stages), count)


def _rows_within(
    tables: Tables,
    layers: tuple[int, int],
    devices: Sequence[str],
    modes: Sequence[str | None],
    most: Sequence[int],
    m: int,
    bound_s: float,
) -> list[int] | None:
    """Return rows that keep a time bound, the first devices filled first, or None."""
    rows, left = [], m
    for device, mode, limit in zip(devices, modes, most, strict=True):
        low, high = 0, max(0, min(limit, left))
        while low < high:
            middle = (low + high + 1) // 2
            if tables.busy_s(device, mode, layers, middle, 1.0) <= bound_s * (1 + 1e-9):
                low = middle
            else:
                high = middle - 1
        rows.append(low)
        left -= low
    return rows if left == 0 else None


def _balanced_rows(
    tables: Tables,
    layers: tuple[int, int],
    devices: Sequence[str],
    modes: Sequence[str | None],
    most: Sequence[int],
    m: int,
) -> list[int]:
    """Return rows that make the slowest device as fast as possible: proportional, then one row at a time."""
    speed = [
        1.0 / max(tables.busy_s(device, mode, layers, max(1, m // len(devices)), 1.0), 1e-12)
        for device, mode in zip(devices, modes, strict=True)
    ]
    rows = [min(max(0, limit), int(m * own / sum(speed))) for own, limit in zip(speed, most, strict=True)]

    def seconds(i: int, number: int) -> float:
        return tables.busy_s(devices[i], modes[i], layers, number, 1.0)

    for _ in range(m - sum(rows)):
        open_ = [i for i in range(len(devices)) if rows[i] < most[i]]
        i = min(open_, key=lambda i: seconds(i, rows[i] + 1))
        rows[i] += 1
    for _ in range(2 * len(devices)):
        slow = max(range(len(devices)), key=lambda i: seconds(i, rows[i]))
        open_ = [i for i in range(len(devices)) if i != slow and rows[i] < most[i]]
        if not open_ or rows[slow] == 0:
            break
        quick = min(open_, key=lambda i: seconds(i, rows[i] + 1))
        if seconds(quick, rows[quick] + 1) >= seconds(slow, rows[slow]):
            break
        rows[slow] -= 1
        rows[quick] += 1
    return rows


def _spread(num_layers: int, most: int) -> Whole:
    """Return the layers at which the model may be cut: all, or evenly spread ones and those next to the ends."""
    if num_layers <= most:
        return np.arange(num_layers + 1)
    inner = np.linspace(1, num_layers - 1, most - 1).round().astype(np.int64)
    return np.unique(np.concatenate([np.array([0]), inner, np.array([num_layers])]))


def _count_vectors(counts: Sequence[int], most: int) -> Whole:
    """Return the numbers of devices of each class that may be used, in steps that keep them few; the first is none."""
    steps = [1] * len(counts)

    def axis(n: int, step: int) -> list[int]:
        return sorted({*range(0, n + 1, step), n})

    most = min(most, _MOST_STATES) if len(counts) < _MANY_CLASSES else most
    while prod(len(axis(n, s)) for n, s in zip(counts, steps, strict=True)) > most:
        widest = max(range(len(counts)), key=lambda k: len(axis(counts[k], steps[k])))
        if steps[widest] >= counts[widest]:
            break
        steps[widest] = min(counts[widest], steps[widest] * 2)
    return np.array(list(product(*(axis(n, s) for n, s in zip(counts, steps, strict=True)))))


def _takes(states: Whole) -> tuple[Whole, list[tuple[Whole, Whole]]]:
    """Return what a stage may take, and for each of those the states before and after it."""
    pairs: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for after, to in enumerate(states):
        for before in np.flatnonzero((states <= to).all(axis=1)):
            if before != after:
                take = tuple(int(n) for n in to - states[before])
                both = pairs.setdefault(take, ([], []))
                both[0].append(int(before))
                both[1].append(after)
    return np.array(list(pairs)), [(np.array(b), np.array(a)) for b, a in pairs.values()]
