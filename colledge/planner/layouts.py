"""What plans there are, as pure enumerations: groupings of devices, shapes of groups, depths, divisors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement, pairwise, permutations, product
from math import comb, isqrt

Group = tuple[tuple[str, ...], ...]  # replicas of shards
Layout = tuple[Group, ...]  # stages

_MOST_DEPTHS = 40


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
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def default_depths(num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """Return the depths of 1F1B: the stages from here to the end."""
    return tuple(min(num_stages - s, num_microbatches) for s in range(num_stages))


def depth_vectors(num_stages: int, num_microbatches: int) -> list[tuple[int, ...]]:
    """Return the warm-up depths to try, plain 1F1B first.

    All that fall toward the last stage while they are few; else those that grow by the same number from stage to
    stage (1: 1F1B; 2: hides a transfer each way), and GPipe's.
    """
    if num_stages == 1:
        return [(1,)]
    count = num_microbatches
    if depths_are_few(num_stages, num_microbatches):
        every = combinations_with_replacement(range(count, 0, -1), num_stages)
        return sorted(every, key=lambda depths: depths != default_depths(num_stages, count))
    regular = [
        tuple(min(count, 1 + slope * (num_stages - 1 - s)) for s in range(num_stages)) for slope in (1, 2, 3)
    ]
    return list(dict.fromkeys([*regular, (count,) * num_stages]))


def depths_are_few(num_stages: int, num_microbatches: int) -> bool:
    """Return whether `depth_vectors` returns all that fall toward the last stage."""
    return num_stages == 1 or comb(num_microbatches + num_stages - 1, num_stages) <= _MOST_DEPTHS


def layouts(
    devices: Sequence[str], shard_units: int, classes: dict[str, int], *, every_order: bool = False
) -> Iterator[Layout]:
    """Yield every layout of some of the devices, one of each set that differs only by devices that are alike.

    Args:
        devices: Those that may be used.
        shard_units: The most shards of a replica.
        classes: Devices of one class are alike.
        every_order: Whether the order of devices within a group matters even where no rows meet: links differ, so
            a ring through them is faster one way than another.
    """
    seen: set[tuple[tuple[tuple[int, ...], ...], ...]] = set()
    every = _ordered_layouts(devices, shard_units) if every_order else _layouts(devices, shard_units)
    for layout in every:
        name = tuple(tuple(tuple(classes[d] for d in replica) for replica in group) for group in layout)
        if name not in seen:
            seen.add(name)
            yield layout


def _layouts(devices: Sequence[str], shard_units: int) -> Iterator[Layout]:
    for groups in ordered_groups(devices):
        for shapes in product(*(list(group_shapes(group, shard_units)) for group in groups)):
            for layout in _replica_orders(shapes):
                yield from _shard_orders(layout)


def _ordered_layouts(devices: Sequence[str], shard_units: int) -> Iterator[Layout]:
    """Yield every arrangement of some of the devices in stages, replicas and shards."""
    for size in range(1, len(devices) + 1):
        shapes = list(_shapes(size, shard_units))
        for order in permutations(devices, size):
            for shape in shapes:
                names, stages = iter(order), []
                for num_replicas, num_shards in shape:
                    stages.append(
                        tuple(tuple(next(names) for _ in range(num_shards)) for _ in range(num_replicas))
                    )
                yield tuple(stages)


def _shapes(size: int, shard_units: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield every list of (replicas, shards) a stage that takes `size` devices."""
    for first in range(1, size + 1):
        for num_shards in range(1, min(first, shard_units) + 1):
            if first % num_shards == 0:
                head = (first // num_shards, num_shards)
                if first == size:
                    yield (head,)
                else:
                    for rest in _shapes(size - first, shard_units):
                        yield (head, *rest)


def _replica_orders(shapes: tuple[Group, ...]) -> Iterator[Layout]:
    """Yield a layout in each order of replicas that matters: rows meet only where two such stages touch."""
    orders = [
        list(permutations(group)) if s > 0 and len(group) > 1 and len(shapes[s - 1]) > 1 else [group]
        for s, group in enumerate(shapes)
    ]
    yield from product(*orders)


def _shard_orders(layout: Layout) -> Iterator[Layout]:
    """Yield a layout in each order of shards that matters.

    Between stages of unequal numbers of shards some shards send more than others.
    """
    widths = [len(group[0]) for group in layout]
    orders = []
    for s, group in enumerate(layout):
        others = {widths[t] for t in (s - 1, s + 1) if 0 <= t < len(layout)}
        uneven = widths[s] > 1 and others - {widths[s]}
        orders.append(list(product(*(permutations(replica) for replica in group))) if uneven else [group])
    yield from product(*orders)


def microbatch_sizes(batch: int, most_microbatches: int) -> list[int]:
    """Return the divisors of a batch that make at most so many micro-batches, largest first."""
    return [d for d in reversed(divisors(batch)) if batch // d <= most_microbatches]
