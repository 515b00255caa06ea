from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from colledge.errors import ConfigError, PlanError
from colledge.plan import Plan, Replica, Shard, read_plan
from colledge.profiles import PoolProfile

HAND_WRITTEN = """
{"schema": "colledge/plan/1",
 "num_layers": 8,                     // embedding + decoder blocks + head, in model order
 "global_batch_size": 16, "microbatch_size": 4,     // samples; 16/4 = 4 micro-batches
 "schedule": {"name": "1f1b", "warmup": [3, 1]},     // forwards a stage runs before its first backward
 "stages": [
   {"layers": [0, 5], "replicas": [
      {"samples": 3, "shards": [{"device": "desk", "fraction": 1.0}]},
      {"samples": 1, "shards": [{"device": "pi-1", "fraction": 1.0}]}]},
   {"layers": [5, 8], "replicas": [
      {"samples": 4, "shards": [{"device": "orin-0", "fraction": 0.625},
                                {"device": "orin-1", "fraction": 0.375, "mode": "15W"}]}]}],
 "recompute": [false, false]}
"""


@pytest.fixture
def values() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(re.sub(r"//.*", "", HAND_WRITTEN))
    return parsed


def load(folder: Path, values: object) -> Plan:
    path = folder / "plan.json"
    path.write_text(json.dumps(values))
    return read_plan(path)


def changed(values: dict[str, Any], keys: str, value: Any) -> dict[str, Any]:
    """Return a copy with the entry at a dotted path replaced."""
    result = copy.deepcopy(values)
    *parents, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    holder: Any = result
    for parent in parents:
        holder = holder[parent]
    holder[last] = value
    return result


def test_a_plan_written_by_hand_loads(tmp_path: Path, values: dict[str, Any]) -> None:
    plan = load(tmp_path, values)
    assert plan.devices == ("desk", "pi-1", "orin-0", "orin-1")
    assert (plan.num_stages, plan.num_microbatches, plan.family) == (2, 4, "hybrid")
    assert plan.warmup_depths() == (3, 1)
    assert plan.stages[0].row_ranges == ((0, 3), (3, 4))
    assert plan.stages[1].replicas[0].unit_ranges(8) == ((0, 5), (5, 8))
    assert plan.describe() == "desk[0:5)x3 + pi-1[0:5)x1 -> orin-0|orin-1[5:8)"
    assert not plan.recomputes(1)


def test_a_plan_survives_the_disk(tmp_path: Path, values: dict[str, Any]) -> None:
    plan = load(tmp_path, values)
    assert load(tmp_path, json.loads(plan.to_json())) == plan


def test_optional_keys_may_be_left_out(tmp_path: Path, values: dict[str, Any]) -> None:
    for key in ("schedule", "recompute"):
        del values[key]
    for replica in values["stages"][0]["replicas"]:
        del replica["shards"][0]["fraction"]
    plan = load(tmp_path, values)
    assert plan.warmup_depths() == (2, 1)
    gpipe = load(tmp_path, values | {"schedule": {"name": "gpipe"}})
    assert gpipe.warmup_depths() == (4, 4)


def test_a_replica_may_compute_nothing(tmp_path: Path, values: dict[str, Any]) -> None:
    values = changed(values, "stages.0.replicas.0.samples", 4)
    values = changed(values, "stages.0.replicas.1.samples", 0)
    assert load(tmp_path, values).stages[0].row_ranges == ((0, 4), (4, 4))


SHARDS = "stages.1.replicas.0.shards"


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        ("stages.1.layers", [6, 8], ["stages[1].layers", "6", "wanted 5"]),
        ("stages.1.layers", [4, 8], ["stages[1].layers", "4", "wanted 5"]),
        ("stages.0.layers", [1, 5], ["stages[0].layers", "1", "wanted 0"]),
        ("stages.1.layers", [5, 7], ["[0, 7)", "wanted [0, 8)", "num_layers"]),
        ("stages.1.layers", [5, 9], ["[0, 9)", "wanted [0, 8)", "num_layers"]),
        ("stages.1.layers", [5, 5], ["stages[1]", "layers [5, 5)"]),
        ("stages.1.layers", [5], ["stages[1].layers[1]", "missing"]),
        ("stages.1.layers", [5, 6, 8], ["stages[1].layers", "3"]),
        ("stages.0.replicas.0.samples", 4, ["samples of stages[0]", "5", "wanted 4", "microbatch_size"]),
        ("stages.1.replicas.0.samples", 3, ["samples of stages[1]", "3", "wanted 4", "microbatch_size"]),
        ("stages.0.replicas.1.samples", -1, ["stages[0].replicas[1].samples", "-1", "equal to 0"]),
        ("microbatch_size", 5, ["microbatch_size 5", "divide", "16"]),
        ("microbatch_size", 0, ["microbatch_size", "0", "equal to 1"]),
        (f"{SHARDS}.1.fraction", 0.25, ["stages[1].replicas[0]", "fractions", "0.875", "wanted 1"]),
        (f"{SHARDS}.1.fraction", 0, ["stages[1].replicas[0].shards[1].fraction", "0", "greater than 0"]),
        (f"{SHARDS}.1.fraction", 1.5, ["shards[1].fraction", "1.5", "equal to 1"]),
        (SHARDS, [], ["stages[1].replicas[0].shards", "at least 1"]),
        ("stages.0.replicas.1.shards", [{"device": "a", "fraction": 0.5}, {"device": "b", "fraction": 0.5}],
         ["stages[0]", "shard alike", "[0.5, 0.5]", "[1.0]"]),
        (f"{SHARDS}.1.device", "desk", ["'desk'", "twice"]),
        (f"{SHARDS}.1.device", "", ["shards[1].device", "at least 1"]),
        ("schedule.warmup", [1, 3], ["schedule.warmup", "[1, 3]", "fall toward the last stage"]),
        ("schedule.warmup", [3], ["schedule.warmup", "1 entries", "wanted 2"]),
        ("schedule.warmup", [3, 0], ["schedule.warmup", "[3, 0]", "at least 1"]),
        ("schedule.name", "zb", ["schedule.name", "'gpipe' or '1f1b'", "'zb'"]),
        ("recompute", [True], ["recompute", "1 entries", "wanted 2"]),
        ("stages", [], ["stages", "at least 1"]),
        ("schema", "colledge/plan/2", ["schema", "colledge/plan/1", "colledge/plan/2"]),
        ("stages.0.replica", [], ["unknown key 'stages[0].replica'"]),
        ("num_layers", "eight", ["num_layers", "integer", "eight"]),
    ],
)  # fmt: skip
def test_every_rule_names_the_field_the_value_and_what_is_wanted(
    tmp_path: Path, values: dict[str, Any], keys: str, value: Any, words: list[str]
) -> None:
    with pytest.raises(PlanError) as error:
        load(tmp_path, changed(values, keys, value))
    for word in ["plan.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("key", ["schema", "num_layers", "global_batch_size", "microbatch_size", "stages"])
def test_missing_keys_are_named(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    del values[key]
    with pytest.raises(PlanError, match=f"key '{key}' is missing"):
        load(tmp_path, values)


def test_families(values: dict[str, Any]) -> None:
    def one(stages: list[dict[str, Any]]) -> str:
        return Plan.model_validate(
            {"schema": "colledge/plan/1", "num_layers": 2, "global_batch_size": 4, "microbatch_size": 2}
            | {"stages": stages}
        ).family

    def replica(samples: int, *devices: str) -> dict[str, Any]:
        shards = [{"device": device, "fraction": 1 / len(devices)} for device in devices]
        return {"samples": samples, "shards": shards}

    assert one([{"layers": [0, 2], "replicas": [replica(2, "a")]}]) == "single"
    assert one([{"layers": [0, 2], "replicas": [replica(1, "a"), replica(1, "b")]}]) == "data"
    assert one([{"layers": [0, 2], "replicas": [replica(2, "a", "b", "c")]}]) == "tensor"
    pipeline = [{"layers": [n, n + 1], "replicas": [replica(2, "ab"[n])]} for n in range(2)]
    assert one(pipeline) == "pipeline"
    pipeline[1]["replicas"] = [replica(2, "b", "c")]
    assert one(pipeline) == "hybrid"


# Against a model and a pool


def test_a_plan_must_cover_the_model(tmp_path: Path, values: dict[str, Any]) -> None:
    plan = load(tmp_path, values)
    plan.check_model(num_layers=8, shard_units=8)
    plan.check_model(num_layers=8, shard_units=16)
    with pytest.raises(PlanError, match="covers 8 layers, the model has 9"):
        plan.check_model(num_layers=9, shard_units=8)
    with pytest.raises(PlanError) as error:
        plan.check_model(num_layers=8, shard_units=4)
    for words in ("0.625", "'orin-0'", "saw 2.5 of 4 units", "multiples of 1/4"):
        assert words in str(error.value)


def test_thirds_fall_on_units() -> None:
    replica = Replica(samples=1, shards=tuple(Shard(device=d, fraction=1 / 3) for d in "abc"))
    assert replica.unit_ranges(6) == ((0, 2), (2, 4), (4, 6))
    assert replica.unit_ranges(96) == ((0, 32), (32, 64), (64, 96))
    written = Replica(samples=1, shards=tuple(Shard(device=d, fraction=0.3333333) for d in "abc"))
    assert written.unit_ranges(6) == ((0, 2), (2, 4), (4, 6))


def test_a_plan_must_fit_the_pool(tmp_path: Path, values: dict[str, Any]) -> None:
    plan = load(tmp_path, values)
    watts = {"idle_w": 1, "compute_w": 2, "communicate_w": 1, "source": "declared"}

    def pool(*ids: str, mode: str = "15W") -> PoolProfile:
        devices = [
            {"id": id, "kind": "k", "memory_bytes": 1, "modes": [{"name": mode} | watts]} for id in ids
        ]
        return PoolProfile.model_validate({"schema": "colledge/pool-profile/1", "devices": devices})

    ids = ("desk", "pi-1", "orin-0", "orin-1")
    plan.check_pool(pool(*ids, "spare"))
    with pytest.raises(ConfigError, match=r"'orin-1' is not in the pool.*use one of desk, pi-1, orin-0"):
        plan.check_pool(pool(*ids[:3]))
    with pytest.raises(PlanError, match=r"'orin-1' has no power mode '15W'.*use one of 25W"):
        plan.check_pool(pool(*ids, mode="25W"))
