"""Data parallelism over all devices: every device holds the whole model and computes a share of the rows.

Re-implementations. Equal shares are what torch's DistributedDataParallel does (Li et al., VLDB 2020, arXiv
2006.15704), equal here up to one row. Shares in proportion to speed, by largest remainder and at least one row
each, are what heterogeneity-aware data parallelism does (such as LB-BSP, Chen et al., SoCC 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

from colledge.plan import Shard, Stage
from colledge.planner.baselines.candidates import Setting, even_parts, one_shard
from colledge.planner.request import Baseline

EQUAL = "data parallel, equal shares"
BY_SPEED = "data parallel, shares by speed"


def data_parallel(setting: Setting) -> tuple[Baseline, Baseline]:
    """Return data parallelism with equal shares, and with shares in proportion to speed."""
    devices, batch = setting.devices, setting.request.global_batch_size
    count = len(devices)
    if count == 1:
        why = "there is one device only"
        return Baseline(name=EQUAL, why_not=why), Baseline(name=BY_SPEED, why_not=why)
    why = f"a batch of {batch} has fewer samples than there are devices ({count})"
    sizes = setting.sizes(count, smallest=count)
    equal = [_plan_stage(setting, even_parts(size, count)) for size in sizes]
    by_speed = [_plan_stage(setting, _shares_by_speed(setting, size)) for size in sizes]
    return (
        setting.choose(EQUAL, [setting.make_plan([s], n) for s, n in zip(equal, sizes, strict=True)], why),
        setting.choose(
            BY_SPEED, [setting.make_plan([s], n) for s, n in zip(by_speed, sizes, strict=True)], why
        ),
    )


def _plan_stage(setting: Setting, samples: Sequence[int]) -> Stage:
    replicas = tuple(one_shard(d, n) for d, n in zip(setting.devices, samples, strict=True))
    return Stage(layers=(0, setting.num_layers), replicas=replicas)


def _shares_by_speed(setting: Setting, size: int) -> list[int]:
    """Return at least one row a device, the others in proportion to the speed at an equal share."""
    even = max(1, size // len(setting.devices))
    layers = (0, setting.num_layers)
    speeds = []
    for device in setting.devices:
        seconds = sum(setting.costs.compute_s(layers, Shard(device=device), even))
        speeds.append(1 / max(seconds, 1e-12))
    spare = size - len(speeds)
    ideal = [spare * speed / sum(speeds) for speed in speeds]
    whole = [int(share) for share in ideal]
    by_remainder = sorted(range(len(speeds)), key=lambda i: whole[i] - ideal[i])
    for i in by_remainder[: spare - sum(whole)]:
        whole[i] += 1
    return [1 + share for share in whole]
