"""A hybrid pipeline whose stages are groups of devices with uneven shares: Asteroid's planner.

A re-implementation (Ye et al., MobiCom 2024, arXiv 2408.08015), whose code is not public:

- devices stand in order of memory, largest first, since early stages keep most activations;
- a device's capacity over a span of layers is v_d = 1 / sum_l (t_f + t_b); a group's samples are proportional
  to it, clipped by memory, and then moved from the straggler to the fastest while the maximum falls;
- Q(l, n, p) is the best pipeline of the last l layers on the last n devices in p stages, and communication
  between groups counts as a step of its own;
- the stage that is p-th from the end runs K = 2p - 1 forwards before its first backward;
- the latency is fill and drain, M - 1 rounds of the dominant step, and the largest all-reduce.

    Q(i, a, p) = min over b, j:   stage [i, j) on devices a..b  ->  hop at j  ->  Q(j, b, p - 1)

The hop is that between the neighbouring devices of two groups, samples move in at most 64 blocks. The programme
works on arrays [first device, next device, start, stop] and gives up where these would not fit in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from colledge.arrays import Array
from colledge.errors import ConfigError
from colledge.plan import Plan, PlanSchedule, Stage
from colledge.planner.baselines.candidates import Setting, one_shard
from colledge.planner.baselines.spans import (
    Indices,
    between,
    compute_prefixes,
    no_layers,
)
from colledge.planner.request import Baseline

ASTEROID = "Asteroid"

_MOST_BLOCKS = 64
_MOST_CELLS = 400  # devices x layers
_SPAN_BUDGET = 350_000  # (devices x layers)^2 over all micro-batch sizes
_MOST_MOVES = 16


def asteroid(setting: Setting) -> Baseline:
    """Return the plan of least closed-form latency over all devices."""
    cells = len(setting.devices) * setting.num_layers
    if len(setting.devices) == 1:
        return Baseline(name=ASTEROID, why_not="there is one device only")
    if cells > _MOST_CELLS:
        return Baseline(
            name=ASTEROID,
            why_not=f"its dynamic programme grows with the square of devices x layers, and is not run beyond "
            f"{_MOST_CELLS} (here {cells})",
        )
    sizes = _few_sizes(setting.sizes(len(setting.devices)), max(1, _SPAN_BUDGET // cells**2))
    for recompute in (False, True):
        found = [_Programme(setting, size, recompute).best() for size in sizes]
        plans = [plan for _, plan in sorted((f for f in found if f is not None), key=lambda f: f[0])]
        if plans:
            return setting.choose(ASTEROID, plans, "")
    return Baseline(
        name=ASTEROID,
        why_not="no pipeline over all devices fits in memory, even when activations are recomputed, "
        "or no links join them",
    )


def _few_sizes(sizes: list[int], most: int) -> list[int]:
    """Return at most `most` sizes, from the smaller two thirds: large micro-batches leave a pipeline idle."""
    if len(sizes) <= most:
        return sizes
    small = sizes[: max(most, 2 * len(sizes) // 3)]
    return [small[(2 * i + 1) * len(small) // (2 * most)] for i in range(most)]


@dataclass(frozen=True)
class _GroupTimes:
    """What a group does with a micro-batch, a span: blocks [device, span], seconds [span]."""

    blocks: Indices
    forward_s: Array
    backward_s: Array


class _Programme:
    """The dynamic programme for one micro-batch size."""

    def __init__(self, setting: Setting, size: int, recompute: bool) -> None:
        self.setting, self.size, self.recompute = setting, size, recompute
        self.num_microbatches = setting.request.global_batch_size // size
        pool, layers = setting.pool, setting.num_layers
        self.order = sorted(setting.devices, key=lambda d: -pool.device(d).memory_bytes)
        self.starts, self.stops = np.nonzero(~no_layers(layers))
        self.block = next(d for d in range(1, size + 1) if size % d == 0 and size // d <= _MOST_BLOCKS)
        self.num_blocks = size // self.block
        self.most_stages = min(len(self.order), layers)
        keys = {device: setting.costs.key(one_shard(device, 1).shards[0]) for device in self.order}
        self.kinds = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
        self.kind_of = [self.kinds[keys[device]] for device in self.order]
        self._read_times({self.kinds[keys[device]]: device for device in self.order})
        self._groups: dict[tuple[object, ...], _GroupTimes] = {}
        self._caps: dict[tuple[str, int], Indices] = {}

    def _read_times(self, device_of_kind: dict[int, str]) -> None:
        """Fill forward and backward seconds [kind, blocks, span]."""
        forward, backward = [], []
        for kind in range(len(self.kinds)):
            rows = [
                compute_prefixes(self.setting, device_of_kind[kind], blocks * self.block)
                for blocks in range(self.num_blocks + 1)
            ]
            f, b = np.array([f for f, _ in rows]), np.array([b for _, b in rows])
            spans_f, spans_b = (np.maximum(p[:, self.stops] - p[:, self.starts], 0.0) for p in (f, b))
            forward.append(spans_f)
            again = spans_f * self.setting.has_backward[self.stops]
            backward.append(spans_b + again if self.recompute else spans_b)
        self.forward_s, self.backward_s = np.array(forward), np.array(backward)
        self.both_s = self.forward_s + self.backward_s

    def best(self) -> tuple[float, Plan] | None:
        """Return the least latency and its plan, or None if nothing fits."""
        devices, layers = len(self.order), self.setting.num_layers
        shape = (devices + 1, layers + 1)  # first device, first layer of what remains
        latency, fill, dominant, reduce = (np.full(shape, np.inf) for _ in range(4))
        levels: list[tuple[Array, Indices]] = []
        reduce_s, hop_s = self._reduce_s(), self._hop_s()
        answer: tuple[float, int] | None = None
        caps: Indices | None = None
        for stages in range(1, self.most_stages + 1):
            in_flight = min(2 * stages - 1, self.num_microbatches)
            before, caps = caps, np.array([self._cap(device, in_flight) for device in self.order])
            if before is None or (before != caps).any():
                stage_s = self._stage_s(in_flight)
            if stages == 1:
                fill = dominant = stage_s[:, devices, :, layers]
                reduce = reduce_s[:, devices, :, layers]
                latency = fill + self._rounds_s(dominant) + reduce
                choice: Indices = np.zeros(shape, dtype=np.int64)
            else:
                # [first, next, start, stop]
                all_fill = stage_s + (hop_s + fill)[None, :, None, :]
                all_dominant = np.maximum(stage_s, np.maximum(hop_s, dominant)[None, :, None, :])
                all_reduce = np.maximum(reduce_s, reduce[None, :, None, :])
                total = all_fill + self._rounds_s(all_dominant) + all_reduce
                flat = np.moveaxis(total, 2, 1).reshape(*shape, -1)
                choice = np.argmin(flat, axis=2)

                def pick(values: Array, choice: Indices = choice) -> Array:
                    moved = np.moveaxis(values, 2, 1).reshape(*shape, -1)
                    return np.asarray(np.take_along_axis(moved, choice[:, :, None], axis=2)[:, :, 0])

                latency, fill, dominant, reduce = map(pick, (total, all_fill, all_dominant, all_reduce))
            levels.append((latency, choice))
            if np.isfinite(latency[0, 0]) and (answer is None or latency[0, 0] < answer[0]):
                answer = float(latency[0, 0]), stages
        return None if answer is None else (answer[0], self._plan(levels[: answer[1]]))

    def _plan(self, levels: list[tuple[Array, Indices]]) -> Plan:
        """Follow the choices from the first stage to the last."""
        devices, layers = len(self.order), self.setting.num_layers
        num_stages, first, start, stages = len(levels), 0, 0, []
        for remaining in range(num_stages, 0, -1):
            if remaining == 1:
                following, stop = devices, layers
            else:
                following, stop = divmod(int(levels[remaining - 1][1][first, start]), layers + 1)
            times = self._group(first, following, min(2 * remaining - 1, self.num_microbatches))
            span = int(np.nonzero((self.starts == start) & (self.stops == stop))[0][0])
            replicas = tuple(
                one_shard(device, int(blocks) * self.block)
                for device, blocks in zip(self.order[first:following], times.blocks[:, span], strict=True)
            )
            stages.append(Stage(layers=(start, stop), replicas=replicas))
            first, start = following, stop
        warmup = tuple(2 * (num_stages - s) - 1 for s in range(num_stages))
        plan = self.setting.make_plan(stages, self.size, PlanSchedule(warmup=warmup))
        return plan.model_copy(update={"recompute": (True,) * num_stages}) if self.recompute else plan

    def _rounds_s(self, dominant_s: Array) -> Array | float:
        """Return the seconds of the rounds after the first; infinity times no round is none."""
        return (self.num_microbatches - 1) * dominant_s if self.num_microbatches > 1 else 0.0

    # -- what steps take ---------------------------------------------------------------------------------------

    def _stage_s(self, in_flight: int) -> Array:
        """Return a stage's seconds a micro-batch: [first device, next device, start, stop]."""
        devices, layers = len(self.order), self.setting.num_layers
        seconds = np.full((devices + 1, devices + 1, layers + 1, layers + 1), np.inf)
        for first in range(devices):
            for following in range(first + 1, devices + 1):
                times = self._group(first, following, in_flight)
                seconds[first, following, self.starts, self.stops] = times.forward_s + times.backward_s
        return seconds

    def _reduce_s(self) -> Array:
        """Return the seconds of a group's gradient all-reduce: [first device, next device, start, stop]."""
        devices, layers = len(self.order), self.setting.num_layers
        sizes = [layer.trainable_parameter_bytes for layer in self.setting.model.layers]
        num_bytes = between(np.concatenate(([0.0], np.cumsum(sizes))))
        seconds = np.zeros((devices + 1, devices + 1, layers + 1, layers + 1))
        for first in range(devices):
            for following in range(first + 2, devices + 1):
                try:
                    latency_s, bandwidth = self.setting.costs.ring(tuple(self.order[first:following]))
                except ConfigError:  # not joined
                    seconds[first, following] = np.inf
                    continue
                n = following - first
                seconds[first, following] = 2 * (n - 1) * (latency_s + num_bytes / n / bandwidth)
        return seconds

    def _hop_s(self) -> Array:
        """Return the seconds there and, for gradients, back of a micro-batch's boundary: [next device, layer]."""
        rows = self.size * self.setting.boundary_bytes
        seconds = np.full((len(self.order) + 1, len(rows)), np.inf)
        for following in range(1, len(self.order)):
            a, b = self.order[following - 1], self.order[following]
            try:
                there, back = self.setting.costs.route(a, b), self.setting.costs.route(b, a)
            except ConfigError:  # not joined
                continue
            seconds[following] = there.latency_s + rows / there.bandwidth_bytes_per_s
            back_s = back.latency_s + rows / back.bandwidth_bytes_per_s
            seconds[following] += np.where(self.setting.has_backward, back_s, 0.0)
        return seconds

    # -- shares within a group ---------------------------------------------------------------------------------

    def _cap(self, device: str, in_flight: int) -> Indices:
        """Return the blocks that fit on a device, a span; negative where not even the weights do."""
        key = (device, in_flight)
        if key not in self._caps:
            most = self.setting.most_samples(device, in_flight, self.recompute)
            blocks = np.clip(np.floor(most / self.block), -1, self.num_blocks)
            self._caps[key] = blocks[self.starts, self.stops].astype(np.int64)
        return self._caps[key]

    def _group(self, first: int, following: int, in_flight: int) -> _GroupTimes:
        """Return the shares and times of a group, for every span; infinite where memory does not hold them."""
        members = self.order[first:following]
        kinds = self.kind_of[first:following]
        profiles = [self.setting.pool.device(device) for device in members]
        alike = tuple((k, p.room_bytes, p.allocator_overhead) for k, p in zip(kinds, profiles, strict=True))
        key = (alike, in_flight)
        if key not in self._groups:
            caps = np.array([self._cap(device, in_flight) for device in members])
            self._groups[key] = self._share_out(np.array(kinds), caps, (alike, 0))
        return self._groups[key]

    def _share_out(self, kinds: Indices, caps: Indices, unclipped: tuple[object, ...]) -> _GroupTimes:
        if unclipped not in self._groups:
            roomy = np.full_like(caps, self.num_blocks)
            self._groups[unclipped] = self._share_spans(kinds, roomy, np.arange(caps.shape[1]))
        free = self._groups[unclipped]
        over = np.nonzero((free.blocks > caps).any(axis=0))[0]
        if not len(over):
            return free
        tight = self._share_spans(kinds, caps[:, over], over)
        blocks, forward, backward = free.blocks.copy(), free.forward_s.copy(), free.backward_s.copy()
        blocks[:, over], forward[over], backward[over] = tight.blocks, tight.forward_s, tight.backward_s
        return _GroupTimes(blocks, forward, backward)

    def _share_spans(self, kinds: Indices, caps: Indices, spans: Indices) -> _GroupTimes:
        """Share the blocks of a micro-batch for some spans: proportional, clipped, then straggler to fastest."""
        capacity = 1 / np.maximum(self.both_s[kinds, -1][:, spans], 1e-12)
        blocks = np.zeros_like(caps)
        rest = np.full(len(spans), self.num_blocks, dtype=np.int64)
        holds = (caps >= 0).all(axis=0)  # a device without a sample holds the weights too
        for _ in range(len(kinds) + 1):
            room = np.maximum(caps - blocks, 0)
            open_capacity = np.where(room > 0, capacity, 0.0)
            if not (rest > 0).any() or not open_capacity.any():
                break
            total = np.maximum(open_capacity.sum(axis=0), 1e-300)
            given = np.minimum(_whole(rest * open_capacity / total, rest), room)
            blocks += given
            rest -= given.sum(axis=0)
        self._move_from_stragglers(kinds, caps, spans, blocks)
        forward, backward = (
            self._seconds(table, kinds, blocks, spans).max(axis=0)
            for table in (self.forward_s, self.backward_s)
        )
        possible = holds & (rest == 0)
        return _GroupTimes(blocks, np.where(possible, forward, np.inf), np.where(possible, backward, np.inf))

    def _move_from_stragglers(self, kinds: Indices, caps: Indices, spans: Indices, blocks: Indices) -> None:
        """Move one block at a time from the slowest device to the one that would be fastest, while that helps."""
        if len(kinds) == 1:
            return
        active = np.arange(len(spans))
        for _ in range(_MOST_MOVES):
            some, where = blocks[:, active], spans[active]
            now = self._seconds(self.both_s, kinds, some, where)
            more = self._seconds(self.both_s, kinds, np.minimum(some + 1, self.num_blocks), where)
            more[some >= caps[:, active]] = np.inf
            slowest, fastest = now.argmax(axis=0), more.argmin(axis=0)
            columns = np.arange(len(active))
            gain = more[fastest, columns] < now[slowest, columns] * (1 - 1e-9)
            active = active[gain]
            if not len(active):
                return
            blocks[slowest[gain], active] -= 1
            blocks[fastest[gain], active] += 1

    def _seconds(
        self, table: Array, kinds: Indices, blocks: Indices, spans: Indices
    ) -> npt.NDArray[np.float64]:
        return np.asarray(table[kinds[:, None], blocks, spans[None, :]])


def _whole(ideal: Array, total: Indices) -> Indices:
    """Round each column of shares to whole numbers of that total by largest remainder."""
    whole = np.floor(ideal + 1e-9).astype(np.int64)
    missing = total - whole.sum(axis=0)
    rank = np.argsort(np.argsort(whole - ideal, axis=0, kind="stable"), axis=0, kind="stable")
    return np.asarray(whole + (rank < missing[None, :]))
