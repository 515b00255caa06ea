"""Even pipelines over all devices, in the pool's order, a stage each: GPipe and PipeDream.

Re-implementations. GPipe (Huang et al., arXiv 1811.06965): equal layer counts and the gpipe schedule.
PipeDream's flush variant (Narayanan et al., arXiv 1806.03377 and 2006.09503): the cut whose slowest stage takes
least as if all devices were equal (here: the pool's mean times), and 1F1B; its stage replication, made for equal
devices, is left out. Neither looks at links. Both recompute only where nothing fits without.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from colledge.plan import PlanSchedule
from colledge.planner.baselines.candidates import Setting, even_parts, pipeline_stages
from colledge.planner.baselines.spans import between, compute_prefixes, least_slowest_cut, no_layers
from colledge.planner.request import Baseline

GPIPE = "GPipe"
PIPEDREAM = "PipeDream"


def why_no_pipeline(setting: Setting) -> str:
    """Return why there can be no pipeline over all devices; empty where there can."""
    if len(setting.devices) == 1:
        return "there is one device only"
    if len(setting.devices) > setting.num_layers:
        return f"{setting.num_layers} layers are fewer than the {len(setting.devices)} devices, a stage each"
    return ""


def gpipe(setting: Setting) -> Baseline:
    """Return a pipeline of equal layer counts under the gpipe schedule."""
    why = why_no_pipeline(setting)
    if why:
        return Baseline(name=GPIPE, why_not=why)
    count = len(setting.devices)
    edges = [0, *accumulate(even_parts(setting.num_layers, count))]
    plans = [
        setting.make_plan(pipeline_stages(setting.devices, edges, size), size, PlanSchedule(name="gpipe"))
        for size in setting.sizes(count)
    ]
    return setting.choose(GPIPE, plans, "no micro-batch size gives few enough micro-batches")


def pipedream(setting: Setting) -> Baseline:
    """Return a 1F1B pipeline balanced as if the devices were equal."""
    why = why_no_pipeline(setting)
    if why:
        return Baseline(name=PIPEDREAM, why_not=why)
    count, empty = len(setting.devices), no_layers(setting.num_layers)
    plans = []
    for size in setting.sizes(count):
        times = [np.add(*compute_prefixes(setting, device, size)) for device in setting.devices]
        mean_s = np.where(empty, np.inf, between(np.mean(times, axis=0)))
        edges = least_slowest_cut([mean_s] * count, [np.zeros(setting.num_layers + 1)] * (count - 1))
        assert edges is not None
        plans.append(setting.make_plan(pipeline_stages(setting.devices, edges, size), size))
    return setting.choose(PIPEDREAM, plans, "no micro-batch size gives few enough micro-batches")
