"""`zero: 1`: replicas that share the optimizer state out train as one process does, and hold their share of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colledge.errors import PlanError
from colledge.launch.planning import request_of
from colledge.launch.run import divided
from colledge.launch.run_config import load_run
from colledge.parallel import Engine, EngineSettings, Message
from colledge.parallel.backends import check_backend_plan
from colledge.parallel.engine import command
from colledge.plan import Plan
from tests.multiproc import test_lora
from tests.multiproc.test_backends import _run_file
from tests.multiproc.test_exactness import (
    OPTIMIZERS,
    PLANS,
    TOLERANCE,
    Case,
    _model,
    _plan,
    _stage,
    _start_weights,
    make_batch,
    reference,
    train,
)
from tests.multiproc.workers import Workers


def _divided(plan: Plan, shares: dict[str, float] | None = None) -> Plan:
    """Return a plan with `zero: 1`, and with shares of the optimizer state by device."""
    values = plan.model_dump(by_alias=True)
    for stage in values["stages"]:
        for replica in stage["replicas"]:
            for shard in replica["shards"]:
                shard["state_share"] = (shares or {}).get(shard["device"])
    return Plan.model_validate({**values, "zero": 1})


DIVIDED = {
    "data": _divided(PLANS["data"], {"d0": 0.23, "d1": 0.77}),
    "data, equal": _divided(_plan(_stage((0, 5), (2, {"d2": 1}), (1, {"d0": 1}), (1, {"d1": 1})))),
    "data, all on one that computes nothing": _divided(
        _plan(_stage((0, 5), (0, {"d2": 1}), (4, {"d1": 1}))), {"d2": 1.0, "d1": 0.0}
    ),
    "hybrid": _divided(
        _plan(_stage((0, 2), (3, {"d3": 1}), (1, {"d0": 1})), _stage((2, 5), (1, {"d1": 1}), (3, {"d2": 1}))),
        {"d3": 0.9, "d0": 0.1, "d1": 0.35, "d2": 0.65},
    ),
    "tensor and data": _divided(
        _plan(_stage((0, 5), (1, {"d0": 0.75, "d1": 0.25}), (3, {"d3": 0.75, "d2": 0.25}))),
        {"d0": 0.6, "d3": 0.4, "d1": 0.12, "d2": 0.88},
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        Case("llama-tied", "adamw-clipped", num_steps=8),
        Case("gpt2-untied", "adamw", num_steps=8),
        Case("gpt2-tied", "sgd-clipped", num_steps=8),
    ],
    ids=lambda case: f"{case.model}-{case.optimizer}",
)
@pytest.mark.parametrize("name", DIVIDED)
def test_replicas_that_divide_the_optimizer_state_train_as_one_process_does(
    name: str, case: Case, workers: Workers
) -> None:
    assert train([DIVIDED[name]], case, workers).difference(reference(case)) < TOLERANCE["float64"]


@pytest.mark.parametrize("name", ["hybrid", "tensor and data"])
def test_the_state_of_adapters_is_divided_too(name: str, workers: Workers) -> None:
    trained = test_lora.train(DIVIDED[name], "gpt2-tied", test_lora.SETTINGS["gpt2-tied"], workers)
    assert test_lora._difference(trained, test_lora.reference("gpt2-tied")) <= test_lora.TOLERANCE


@pytest.mark.parametrize(
    ("before", "after", "case"),
    [
        (DIVIDED["tensor and data"], PLANS["hybrid"], Case("llama-tied", "adamw-clipped", num_steps=8)),
        (PLANS["pipeline"], DIVIDED["data"], Case("llama-untied", "sgd-clipped", num_steps=8)),
        (DIVIDED["data, equal"], DIVIDED["hybrid"], Case("gpt2-tied", "adamw", num_steps=8)),
    ],
    ids=["without", "from without", "divided otherwise"],
)
def test_training_goes_on_exactly_with_another_division_or_none(
    before: Plan, after: Plan, case: Case, workers: Workers
) -> None:
    assert train([before, after], case, workers).difference(reference(case)) < TOLERANCE["float64"]


def _state_bytes(plan: Plan, workers: Workers) -> dict[str, int]:
    """Return the bytes of optimizer state that each device itself says it holds after a step, without counters."""
    case = replace(Case(), model="llama-untied")
    _, weights = _start_weights(case)
    settings = EngineSettings(OPTIMIZERS["adamw"], precision="float64")
    engine = Engine(plan, _model(case.model), weights, settings, workers.ranks, workers.wire)
    engine.train_step(make_batch(case, 0))
    held = dict.fromkeys(plan.devices, 0)
    for stage in plan.stages:
        holders = {
            workers.ranks[shard.device]: Message(
                {
                    "command": "read_layer",
                    "layer": "",
                    "values": False,
                    "optimizer": True,
                    "trained_only": True,
                    "sliced_only": False,
                }
            )
            for replica in stage.replicas
            for shard in replica.shards
        }
        for name in engine.model.layer_names[slice(*stage.layers)]:
            for message in holders.values():
                message.fields["layer"] = name
            for device, answer in command(workers.wire, holders, "reading", workers.ranks).items():
                held[device] += sum(tensor.nbytes for tensor in answer.tensors.values())
    engine.close()
    return held


@pytest.mark.parametrize("name", ["data", "hybrid", "tensor and data"])
def test_each_device_holds_its_share_of_the_optimizer_state(name: str, workers: Workers) -> None:
    divided, whole = (
        _state_bytes(plan, workers)
        for plan in (DIVIDED[name], DIVIDED[name].model_copy(update={"zero": None}))
    )
    for place in DIVIDED[name].places():
        device, share = place.shard.device, place.shard.state_share
        assert divided[device] == pytest.approx(share * whole[device], abs=2 * 8)  # two moments of an entry


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"zero": 2}, "optimizer state alone"),
        ({"zero": 1, "backend": "fairscale"}, "for backend fairscale, the run has backend native"),
    ],
)
def test_what_the_native_engine_does_not_divide_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        check_backend_plan("native", PLANS["data"].model_copy(update=changed))


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted parts that sum to 1"):
        _divided(PLANS["data"], {"d0": 0.5, "d1": 0.4})
    with pytest.raises(ValueError, match="or none"):
        _divided(PLANS["data"], {"d0": 1.0})


@pytest.mark.parametrize(
    ("run", "given", "said"),
    [
        ({"zero": 1}, {}, None),
        ({"backend": "deepspeed", "deepspeed": {"zero_stage": 3}}, {}, None),
        ({"backend": "fairscale"}, {"zero": 1, "backend": "fairscale"}, None),
        ({}, {"zero": 1}, "the run has no zero for backend native"),
        (
            {"backend": "fairscale"},
            {"zero": 1},
            "zero: 1 for backend native, the run has zero: 1 for backend f",
        ),
    ],
)
def test_a_given_plan_divides_what_the_run_says(
    run: dict[str, Any], given: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    asked = load_run(_run_file(tmp_path, **run))
    plan = PLANS["data"].model_copy(update=given)
    if said is not None:
        with pytest.raises(PlanError, match=said):
            divided(plan, asked)
        return
    request = request_of(asked)
    found = divided(plan, asked)
    assert (found.zero, found.backend) == (request.zero, request.backend) != (None, None)
