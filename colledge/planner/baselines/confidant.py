"""A pipeline over all devices whose layer cut minimises the slowest stage: Confidant's partition.

A re-implementation (Chen et al., "Confidant", arXiv 2311.13381; the partition is FTPipeHD's, arXiv 2110.02781):
devices keep the pool's order, the cut is found exactly by dynamic programming over each device's own times and
memory and the hops between neighbours, micro-batches run 1F1B with flushes (the original lets weights age).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from colledge.arrays import Array
from colledge.plan import Plan
from colledge.planner.baselines.candidates import Setting, pipeline_stages
from colledge.planner.baselines.pipeline import why_no_pipeline
from colledge.planner.baselines.spans import (
    between,
    compute_prefixes,
    least_slowest_cut,
    no_layers,
)
from colledge.planner.request import Baseline

CONFIDANT = "Confidant"


def confidant(setting: Setting) -> Baseline:
    """Return the pipeline over all devices whose slowest stage takes least."""
    why = why_no_pipeline(setting)
    if why:
        return Baseline(name=CONFIDANT, why_not=why)
    plans = _plans(setting, recompute=False) or _plans(setting, recompute=True)
    return setting.choose(
        CONFIDANT,
        plans,
        "no cut fits in memory at any micro-batch size, even when activations are recomputed",
    )


def _plans(setting: Setting, recompute: bool) -> list[Plan]:
    count = len(setting.devices)
    empty = no_layers(setting.num_layers)
    plans = []
    for size in setting.sizes(count):
        num_microbatches = setting.request.global_batch_size // size
        stages = []
        for s, device in enumerate(setting.devices):
            forward, backward = (between(p) for p in compute_prefixes(setting, device, size))
            seconds = forward * (1 + recompute * setting.has_backward) + backward
            most = setting.most_samples(device, min(count - s, num_microbatches), recompute)
            stages.append(np.where(empty | (most < size), np.inf, seconds))
        edges = least_slowest_cut(stages, [_hop_s(setting, a, b, size) for a, b in pairwise(setting.devices)])
        if edges is not None:
            plan = setting.make_plan(pipeline_stages(setting.devices, edges, size), size)
            plans.append(plan.model_copy(update={"recompute": (True,) * count}) if recompute else plan)
    return plans


def _hop_s(setting: Setting, a: str, b: str, size: int) -> Array:
    """Return the seconds of the slower way of a boundary between two devices, at each layer."""
    rows = size * setting.boundary_bytes
    ways = [setting.costs.route(a, b), setting.costs.route(b, a)]
    there, back = (way.latency_s + rows / way.bandwidth_bytes_per_s for way in ways)
    return np.asarray(np.maximum(there, np.where(setting.has_backward, back, 0.0)))
