"""A plan while it is being searched for: cheap to change, to compare and to look up."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from colledge.plan import Plan, PlanSchedule, Replica, Shard, Stage
from colledge.planner.layouts import Group, default_depths


class StageDraft(NamedTuple):
    """A stage: layers [start, stop), its devices, their rows, shard units and power modes (None: the first one)."""

    layers: tuple[int, int]
    group: Group
    samples: tuple[int, ...]
    units: tuple[int, ...]
    modes: tuple[tuple[str | None, ...], ...]
    recompute: bool = False


class Draft(NamedTuple):
    """A plan. `depths` are the forwards each stage runs before its first backward, at most the micro-batches."""

    microbatch_size: int
    stages: tuple[StageDraft, ...]
    depths: tuple[int, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices in plan order."""
        return tuple(d for stage in self.stages for replica in stage.group for d in replica)

    def first_backward(self, first_trained: int) -> int:
        """Return the first stage that runs backwards, as `Plan.first_backward` does."""
        return sum(stage.layers[1] <= first_trained for stage in self.stages)


def make_draft(microbatch_size: int, stages: tuple[StageDraft, ...], num_microbatches: int) -> Draft:
    """Return a draft with the depths of plain 1F1B."""
    return Draft(microbatch_size, stages, default_depths(len(stages), num_microbatches))


def draft_of(plan: Plan, shard_units: int) -> Draft:
    """Return the draft that makes the same plan."""
    stages = []
    for s, stage in enumerate(plan.stages):
        ranges = stage.replicas[0].unit_ranges(shard_units) if stage.num_shards > 1 else ((0, shard_units),)
        stages.append(
            StageDraft(
                stage.layers,
                tuple(tuple(shard.device for shard in replica.shards) for replica in stage.replicas),
                tuple(replica.samples for replica in stage.replicas),
                tuple(stop - start for start, stop in ranges),
                tuple(tuple(shard.mode for shard in replica.shards) for replica in stage.replicas),
                plan.recomputes(s),
            )
        )
    return Draft(plan.microbatch_size, tuple(stages), plan.warmup_depths())


@lru_cache(maxsize=20_000)
def make_stage(draft: StageDraft) -> Stage:
    """Return the stage of a plan, unchecked."""
    total = sum(draft.units)
    return Stage.model_construct(
        layers=draft.layers,
        replicas=tuple(
            Replica.model_construct(
                samples=rows,
                shards=tuple(
                    Shard.model_construct(device=device, fraction=units / total, mode=mode)
                    for device, units, mode in zip(replica, draft.units, modes, strict=True)
                ),
            )
            for rows, replica, modes in zip(draft.samples, draft.group, draft.modes, strict=True)
        ),
    )


def make_plan(draft: Draft, num_layers: int, global_batch_size: int) -> Plan:
    """Return the plan of a draft, unchecked; `Plan.model_validate` of its dump checks it."""
    count, num_stages = global_batch_size // draft.microbatch_size, len(draft.stages)
    if draft.depths == default_depths(num_stages, count):
        schedule = PlanSchedule()
    elif draft.depths == (count,) * num_stages:
        schedule = PlanSchedule(name="gpipe")
    else:
        schedule = PlanSchedule(warmup=draft.depths)
    recompute = tuple(stage.recompute for stage in draft.stages)
    return Plan.model_construct(
        schema_tag="colledge/plan/1",
        num_layers=num_layers,
        global_batch_size=global_batch_size,
        microbatch_size=draft.microbatch_size,
        schedule=schedule,
        stages=tuple(make_stage(stage) for stage in draft.stages),
        recompute=recompute if any(recompute) else None,
        prediction=None,
    )
