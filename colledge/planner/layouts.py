"""What plans there are, as pure enumerations: groupings of devices, shapes of groups, shares, cuts, schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise, permutations, product
from math import comb

import numpy as np
import numpy.typing as npt

from colledge.plan import PlanSchedule
from colledge.planner.request import Family

Group = tuple[tuple[str, ...], ...]  # replicas of shards
Layout = tuple[Group, ...]  # stages
Edges = npt.NDArray[np.int64]

_MOST_OPTIONS = 1000
_MOST_CUTS = 20000


def ordered_groups(devices: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Yield every way to put some of the devices, at least one, into an ordered list of groups."""
    for size in range(1, len(devices) + 1):
        for first in combinations(devices, size):
            yield (first,)
            rest = [device for device in devices if device not in first]
            for others in ordered_groups(rest):
                yield (first, *others)


def group_shapes(devices: tuple[str, ...], shard_units: int) -> Iterator[Group]:
    """Yield every way to cut a group into equal-shaped replicas, replicas in order of their first device."""
    for num_shards in range(1, min(len(devices), shard_units) + 1):
        if len(devices) % num_shards == 0:
            yield from _cut_group(devices, num_shards)


def _cut_group(devices: tuple[str, ...], num_shards: int) -> Iterator[Group]:
    if not devices:
        yield ()
        return
    head, rest = devices[0], devices[1:]
    for others in combinations(rest, num_shards - 1):
        members = (head, *others)
        left = tuple(device for device in rest if device not in others)
        for remainder in _cut_group(left, num_shards):
            if not remainder:
                yield (members,)
            else:  # shard k of every replica holds the same fraction, so who stands where matters
                for orders in product(*(permutations(replica) for replica in remainder)):
                    yield (members, *orders)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `total` as an ordered sum of `parts` whole numbers of at least 1."""
    for cuts in combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in pairwise((0, *cuts, total)))


def shares(total: int, speeds: Sequence[float], most: int = _MOST_OPTIONS) -> list[tuple[int, ...]]:
    """Return ways to share `total` units among holders of unequal speed, each at least 1.

    All of them while they are at most `most`; else the proportional one and its neighbours.
    """
    parts = len(speeds)
    if parts > total:
        return []
    if comb(total - 1, parts - 1) <= most:
        return list(compositions(total, parts))
    centre = proportional(total, speeds)
    found = {centre}
    for size in sorted({1, 2, 4, max(1, total // 16)}):
        for current in list(found) if size < 4 else [centre]:
            for a, b in permutations(range(parts), 2):
                if current[a] > size and len(found) < _MOST_OPTIONS:
                    moved = list(current)
                    moved[a], moved[b] = moved[a] - size, moved[b] + size
                    found.add(tuple(moved))
    return sorted(found)


def proportional(total: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Return `total` units shared in proportion to speed by largest remainder, each share at least 1."""
    spare, all_speed = total - len(speeds), sum(speeds)
    ideal = [spare * speed / all_speed for speed in speeds]
    whole = [int(share) for share in ideal]
    by_remainder = sorted(range(len(speeds)), key=lambda i: whole[i] - ideal[i])
    for i in by_remainder[: spare - sum(whole)]:
        whole[i] += 1
    return tuple(1 + share for share in whole)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]


def layer_cuts(num_layers: int, speeds: Sequence[float]) -> Edges:
    """Return uneven cuts of the layers as edges [cut, stage]: stage s owns layers [edges[s], edges[s + 1])."""
    rows = [(0, *accumulate(sizes)) for sizes in shares(num_layers, speeds, most=_MOST_CUTS)]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(speeds) + 1)


def schedules(num_stages: int, num_microbatches: int) -> list[PlanSchedule]:
    """Return the schedules that differ: 1F1B, 1F1B with the depth that hides transfers, and GPipe."""
    if num_stages == 1:
        return [PlanSchedule()]
    deep = tuple(2 * (num_stages - s) - 1 for s in range(num_stages))
    depths = {
        tuple(min(num_stages - s, num_microbatches) for s in range(num_stages)): PlanSchedule(),
    }
    depths.setdefault(tuple(min(d, num_microbatches) for d in deep), PlanSchedule(warmup=deep))
    depths.setdefault((num_microbatches,) * num_stages, PlanSchedule(name="gpipe"))
    return list(depths.values())


def family_of(layout: Layout) -> Family:
    """Return the kind of parallelism of every plan with this layout."""
    kinds: list[Family] = []
    if any(len(group) > 1 for group in layout):
        kinds.append("data")
    if len(layout) > 1:
        kinds.append("pipeline")
    if any(len(group[0]) > 1 for group in layout):
        kinds.append("tensor")
    if not kinds:
        return "single"
    return kinds[0] if len(kinds) == 1 else "hybrid"


def layouts(devices: Sequence[str], shard_units: int, classes: dict[str, int]) -> Iterator[Layout]:
    """Yield every layout of some of the devices, one of each set that differs only by devices that are alike."""
    seen: set[tuple[tuple[tuple[int, ...], ...], ...]] = set()
    for groups in ordered_groups(devices):
        for shapes in product(*(list(group_shapes(group, shard_units)) for group in groups)):
            for layout in _replica_orders(shapes):
                name = tuple(
                    tuple(tuple(classes[d] for d in replica) for replica in group) for group in layout
                )
                if name not in seen:
                    seen.add(name)
                    yield layout


def _replica_orders(shapes: tuple[Group, ...]) -> Iterator[Layout]:
    """Yield a layout in each order of replicas that matters: rows meet only where two such stages touch."""
    orders = [
        list(permutations(group)) if s > 0 and len(group) > 1 and len(shapes[s - 1]) > 1 else [group]
        for s, group in enumerate(shapes)
    ]
    yield from product(*orders)
