"""Training from cached activations: what computes them, and what that saves.

cached     │ prefix, once for every row │ step of the rest │ step of the rest │ ...
not cached │ step of all layers │ step of all layers │ ...
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

from pydantic import Field

from colledge.errors import ColledgeError, ConfigError
from colledge.plan import Plan
from colledge.planner import plan_training
from colledge.planner.request import PlanningRequest
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import Record
from colledge.units import format_bytes, format_joules, format_seconds

# Bytes of rows in a batch of the prefix: about three times that are in memory where rows are made and where they go.
_FILLED_AT_ONCE = 16 * 1024**2


class CachePlan(Record):
    """How the activations that a plan trains from are made, and what the run would be without them.

    `prefix` computes a batch of rows, forwards only; `row_bytes` is what a row takes on disk. `uncached` is the best
    plan of all layers, None where there is none: `why_not` says why. Plans carry their predictions.
    """

    schema_tag: Literal["colledge/activation-cache/1"] = Field(
        default="colledge/activation-cache/1", alias="schema"
    )
    prefix: Plan
    row_bytes: int = Field(ge=0)
    uncached: Plan | None = None
    why_not: str = ""

    def fill_figures(self, num_rows: int) -> tuple[float, float]:
        """Return the predicted seconds and joules of filling the cache with so many rows."""
        figures, batches = self.prefix.prediction, ceil(num_rows / self.prefix.global_batch_size)
        assert figures is not None
        return batches * figures.step_s, batches * figures.energy_joules_per_step

    def sentences(self, model: ModelProfile) -> tuple[str, ...]:
        """Return in words what is cached, how it is made, and what a step would be without."""
        last = model.layers[self.prefix.layer_range[1] - 1].name
        fill = self.prefix.prediction
        assert fill is not None
        rows = self.prefix.global_batch_size
        said = [
            f"Nothing up to {last} trains, so its outputs are computed once and cached: this plan is for the layers "
            f"after it. {rows} rows of the cache take {format_bytes(rows * self.row_bytes)} of disk, and are made in "
            f"{format_seconds(fill.step_s)} with {format_joules(fill.energy_joules_per_step)}, their way to the disks "
            f"not counted ({self.prefix.describe()})."
        ]
        if self.uncached is None:
            return (*said, f"Without the cache there is no plan: {self.why_not}")
        without = self.uncached.prediction
        assert without is not None
        said.append(
            f"Without the cache a step would take {format_seconds(without.step_s)} and "
            f"{format_joules(without.energy_joules_per_step)} ({self.uncached.describe()})."
        )
        return tuple(said)


def prefix_layers(first_trained: int, names: Sequence[str]) -> tuple[int, int]:
    """Return the half-open range of layers whose outputs can be cached: all below the first that trains.

    Args:
        first_trained: The first layer that trains.
        names: Of the model's layers.

    Raises:
        ConfigError: No more than looking tokens up is below it.
    """
    if first_trained < 2:
        raise ConfigError(
            f"activation_cache: {names[first_trained]} trains already, so there is nothing worth caching below it.",
            fix="give adapters to the last blocks only (lora.blocks), or take activation_cache out.",
        )
    return 0, first_trained


def plan_cache(pool: PoolProfile, model: ModelProfile, request: PlanningRequest) -> CachePlan:
    """Return how to compute the activations that a request's plan trains from, and the best plan without them.

    Args:
        pool: The devices and links.
        model: The whole model.
        request: For the layers above the prefix.

    Raises:
        ConfigError: No plan computes the prefix, or nothing is worth caching.
    """
    layers = prefix_layers(model.first_trained, [layer.name for layer in model.layers])
    row_bytes = model.layers[layers[1] - 1].output_bytes_per_sample
    changes = {
        "layers": layers,
        "global_batch_size": max(1, min(request.global_batch_size, _FILLED_AT_ONCE // max(1, row_bytes))),
        "must_use": (),
        "deadline_step_s": None,
        "switch_modes": False,
        "wire_precision": None,
    }
    prefix = plan_training(pool, model, request.model_copy(update=changes)).best
    uncached, why_not = None, ""
    try:
        uncached = plan_training(pool, model, request.model_copy(update={"layers": None})).best
    except ColledgeError as fault:
        why_not = fault.message
    return CachePlan(
        prefix=prefix,
        row_bytes=row_bytes,
        uncached=uncached,
        why_not=why_not,
    )
