"""Equal tensor parallelism over all devices, alone or within the stages of a pipeline: Megatron-LM.

A re-implementation (Shoeybi et al., arXiv 1909.08053; with pipelines: Narayanan et al., arXiv 2104.04473): every
shard of a replica holds the same number of units (remainder units go to the first), stages hold equal layer
counts, micro-batches run 1F1B. Devices are taken in the pool's order, neighbours sharing a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from colledge.plan import Plan, Replica, Shard, Stage
from colledge.planner.baselines.candidates import Setting, even_parts
from colledge.planner.request import Baseline

TENSOR = "Megatron-LM, tensor"
WITH_PIPELINE = "Megatron-LM, pipeline x tensor"


def megatron(setting: Setting) -> tuple[Baseline, Baseline]:
    """Return tensor parallelism over all devices, and the best equal grid of pipeline x tensor."""
    count, units = len(setting.devices), setting.model.shard_units
    if count == 1:
        why = "there is one device only"
        return Baseline(name=TENSOR, why_not=why), Baseline(name=WITH_PIPELINE, why_not=why)
    too_few = f"the model's layers cut into {units} units, fewer than the {count} devices"
    tensor = setting.choose(TENSOR, _plans(setting, count) if count <= units else [], too_few)
    degrees = [
        degree
        for degree in range(2, min(units, count - 1) + 1)
        if count % degree == 0 and count // degree <= setting.num_layers
    ]
    no_grid = (
        f"{count} devices make no grid of at least 2 stages ({setting.num_layers} layers) "
        f"and 2 shards ({units} units)"
    )
    grids = [setting.choose(WITH_PIPELINE, _plans(setting, degree), no_grid) for degree in _few(degrees)]
    return tensor, _fastest(grids) or Baseline(name=WITH_PIPELINE, why_not=no_grid)


def _few(degrees: Sequence[int]) -> list[int]:
    """Return the smallest, the middle and the largest degree."""
    return sorted({degrees[0], degrees[len(degrees) // 2], degrees[-1]}) if degrees else []


def _plans(setting: Setting, degree: int) -> list[Plan]:
    """Return a plan a micro-batch size whose stages are of `degree` neighbouring devices each."""
    fractions = [n / setting.model.shard_units for n in even_parts(setting.model.shard_units, degree)]
    groups = [setting.devices[i : i + degree] for i in range(0, len(setting.devices), degree)]
    spans = pairwise([0, *accumulate(even_parts(setting.num_layers, len(groups)))])
    shards = [tuple(Shard(device=d, fraction=f) for d, f in zip(g, fractions, strict=True)) for g in groups]
    stages = list(zip(spans, shards, strict=True))
    return [
        setting.make_plan(
            [Stage(layers=span, replicas=(Replica(samples=size, shards=some),)) for span, some in stages],
            size,
        )
        for size in setting.sizes(len(setting.devices))
    ]


def _fastest(baselines: Sequence[Baseline]) -> Baseline | None:
    """Return the baseline of the shortest step; one without a plan only where none has one."""

    def step_s(baseline: Baseline) -> float:
        if baseline.plan is None or baseline.plan.prediction is None:
            return float("inf")
        return baseline.plan.prediction.step_s

    return min(baselines, key=step_s, default=None)
