"""Measuring devices, links and memory for real: what profiles are made of."""

from colledge.measure.compute import (
    Effort,
    LayerTime,
    Stopwatch,
    UpdateFactory,
    Workload,
    time_layer,
    time_stage,
)
from colledge.measure.count import count_layer, count_model
from colledge.measure.links import LinkFit, fit_link
from colledge.measure.memory import allocator_overhead, resident_bytes, runtime_bytes, usable_bytes
from colledge.measure.spread import NOISY_SPREAD, spread_of

__all__ = [
    "NOISY_SPREAD",
    "Effort",
    "LayerTime",
    "LinkFit",
    "Stopwatch",
    "UpdateFactory",
    "Workload",
    "allocator_overhead",
    "count_layer",
    "count_model",
    "fit_link",
    "resident_bytes",
    "runtime_bytes",
    "spread_of",
    "time_layer",
    "time_stage",
    "usable_bytes",
]
