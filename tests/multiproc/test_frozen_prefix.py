"""Adapters on the last blocks only: PEFT's training, and no gradient below the first layer that trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from colledge.parallel import Message
from colledge.parallel.engine import command
from colledge.plan import Plan
from colledge.schedule import plan_schedule, simulate
from colledge.settings import LoraSettings
from tests.multiproc.faulty_worker import FaultyWorkers
from tests.multiproc.test_lora import NUM_STEPS, TOLERANCE, _difference, _stage, _structure, reference, train
from tests.unit.test_simulate import TableCosts

SETTINGS = {
    "llama-untied": LoraSettings(
        rank=4, alpha=8, targets=("q_proj", "o_proj", "up_proj", "down_proj"), blocks=(2,)
    ),
    "gpt2-tied": LoraSettings(rank=2, targets=("c_attn", "c_proj", "c_fc"), blocks=(1, 2)),
}


def _plans(first: int, last: int) -> dict[str, Plan]:
    """Return plans with boundaries below, at and above the first layer that trains."""

    def plan(size: int, recompute: bool, schedule: dict[str, Any], *stages: dict[str, Any]) -> Plan:
        return Plan.model_validate(
            {
                "schema": "colledge/plan/1",
                "num_layers": last,
                "global_batch_size": 8,
                "microbatch_size": size,
                "schedule": schedule,
                "stages": stages,
                "recompute": [recompute] * len(stages),
            }
        )

    def pipeline(size: int, recompute: bool, schedule: dict[str, Any], *edges: int) -> Plan:
        spans = zip((0, *edges), (*edges, last), strict=True)
        stages = [_stage(span, (size, {f"d{s}": 1.0})) for s, span in enumerate(spans)]
        return plan(size, recompute, schedule, *stages)

    gpipe, one_f_one_b = {"name": "gpipe"}, {"name": "1f1b"}
    three_to_one = (3, {"d0": 1.0}), (1, {"d1": 1.0})
    in_shards = (4, {"d2": 0.75, "d3": 0.25})
    return {
        "cut below": pipeline(2, False, one_f_one_b, first - 1),
        "cut at": pipeline(2, False, gpipe, first),
        "cut above": pipeline(2, False, one_f_one_b, first + 1),
        "cut below, at and above": pipeline(1, False, gpipe, first - 1, first, first + 1),
        "cut twice above, recomputed": pipeline(1, True, one_f_one_b, first, first + 1),
        "replicas": plan(4, False, one_f_one_b, _stage((0, last), *three_to_one, (0, {"d2": 1.0}))),
        "frozen replicas before shards": plan(
            4, True, one_f_one_b, _stage((0, first), *three_to_one), _stage((first, last), in_shards)
        ),
        "frozen shards before replicas": plan(
            4,
            False,
            {"name": "1f1b", "warmup": [2, 2]},
            _stage((0, first - 1), (4, {"d0": 0.75, "d1": 0.25})),
            _stage((first - 1, last), (1, {"d2": 1.0}), (3, {"d3": 1.0})),
        ),
    }


PLANS = tuple(_plans(2, 5))


@pytest.fixture(scope="module")
def watched() -> Iterator[FaultyWorkers]:
    """Four workers that note what they do."""
    world = FaultyWorkers(4)
    _ask(world, "watch")
    yield world
    world.close()


def _ask(world: FaultyWorkers, what: str) -> dict[str, dict[str, Any]]:
    messages = {rank: Message({"command": what}) for rank in world.ranks.values()}
    return {
        device: answer.fields for device, answer in command(world.wire, messages, what, world.ranks).items()
    }


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("model", SETTINGS)
def test_adapters_on_the_last_blocks_train_as_peft_trains_them_without_gradients_below(
    model: str, plan_name: str, watched: FaultyWorkers
) -> None:
    settings = SETTINGS[model]
    structure = _structure(model, settings)
    first = structure.first_trained
    assert structure.layer_names[first] == f"block.{settings.blocks[0]}"  # type: ignore[index]
    plan = _plans(first, len(structure.layer_names))[plan_name]
    _ask(watched, "seen")
    assert (
        _difference(train(plan, model, settings, watched), reference(model, settings=settings)) <= TOLERANCE
    )
    seen = _ask(watched, "seen")

    costs = TableCosts(
        dict.fromkeys(plan.devices, 1.0), dict.fromkeys(plan.devices, 1.0), first_trained=first
    )
    timeline = simulate(plan, costs, record=True)
    working = [
        place
        for place in plan.places()
        if plan.stages[place.stage_index].replicas[place.replica_index].samples
    ]
    for place in working:
        spans = [
            str(span.action)
            for span in timeline.spans
            if (span.action.stage, span.replica_index) == (place.stage_index, place.replica_index)
        ]
        schedule, stage, notes = plan_schedule(plan, first), place.stage_index, seen[place.shard.device]
        assert spans == [str(action) for action in schedule.stages[stage]]
        assert notes["actions"] == NUM_STEPS * spans
        in_flight = schedule.in_flight(stage)
        assert notes["most_in_flight"] == in_flight
        returns = plan.stages[stage].layers[0] > first or plan.recomputes(stage)
        assert notes["most_inputs"] == (in_flight if returns else 0)

    names = {rank: device for device, rank in watched.ranks.items()}
    travelled = Counter(
        (device, names[peer]) for device, notes in seen.items() for peer, _ in notes["sent"] if peer in names
    )
    predicted = Counter((transfer.source, transfer.target) for transfer in timeline.transfers)
    assert travelled == {pair: NUM_STEPS * number for pair, number in predicted.items()}
    stage_of = {place.shard.device: place.stage_index for place in plan.places()}
    back = {stage_of[b] for a, b in travelled if stage_of[b] < stage_of[a]}
    assert back == set(range(plan.first_backward(first), plan.num_stages - 1))
    if plan.stages[0].layers[1] <= first:
        assert all(seen[device]["received"] == [] for device, stage in stage_of.items() if stage == 0)


def test_a_frozen_stage_waits_for_its_sends_rather_than_pile_them_up(watched: FaultyWorkers) -> None:
    model = "llama-untied"
    structure = _structure(model, SETTINGS[model])
    plan = _plans(structure.first_trained, len(structure.layer_names))["cut below, at and above"]
    assert plan.num_microbatches == 8
    _ask(watched, "seen")
    train(plan, model, SETTINGS[model], watched)
    unsettled = {device: notes["most_unsettled"] for device, notes in _ask(watched, "seen").items()}
    assert unsettled["d0"] <= 3  # the one just begun, and two before it
    assert unsettled["d1"] <= 3
    assert unsettled["d2"] == 8  # GPipe: all wait for their gradients
