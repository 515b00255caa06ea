from __future__ import annotations

import json
from pathlib import Path

import pytest

from colledge.errors import ConfigError
from colledge.launch.planning import request_of
from colledge.launch.run_config import PoolConfig, RunConfig, load_pool, load_run
from colledge.launch.schemas import SCHEMAS, schema_text

FULL_RUN = """
schema: colledge/run/1
model: ./my-llama
data: {train: corpus.jsonl, sequence_length: 128}
method: lora
lora: {rank: 4, alpha: 8, dropout: 0.1, targets: all-linear, modules_to_save: [lm_head], blocks: [2, 3]}
activation_cache: {limit: 20 GB}
mixed_precision: bfloat16
frozen_precision: bfloat16
batch: {global_size: 16}
optimizer: {name: adamw, learning_rate: 1e-3, weight_decay: 0.1, betas: [0.9, 0.95], eps: 1e-8,
            schedule: cosine, warmup_steps: 20,
            momentum: 0.0, gradient_clipping: 1.0}
steps: 200
precision: float32
wire_precision: bfloat16
seed: 0
pool: pool.yaml
objective: energy
accounting: marginal
must_use: [desk]
must_not_use: [pi-1]
deadline: 8h
deadline_step: 500 ms
output: out/
checkpoint_every: 50
keep_checkpoints: 3
"""
SHORT_RUN = "model: org/hub-model\ndata: {train: corpus.txt}\npool: pool.yaml\n"
FULL_POOL = """
schema: colledge/pool/1
coordinator: {address: 192.168.1.2, port: 29500}
devices:
  - {id: desk, host: local, accelerator: "cuda:0", threads: 4, memory: 4 GB,
     power: {idle_w: 30, compute_w: 200, communicate_w: 45}}
  - {id: pi-1, host: 192.168.1.3, emulate: {slowdown: 2.5, bandwidth: 100 Mbit/s, latency: 2 ms}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_key_loads(folder: Path) -> None:
    run = load_run(write(folder, FULL_RUN))
    assert run.optimizer.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as a text
    assert run.optimizer.gradient_clipping == 1.0
    assert run.batch.global_size == 16
    assert run.step_limit_s == 0.5
    assert run.checkpoint_every == 50
    assert request_of(run).wire_precision == "bfloat16"
    assert (run.accounting, run.must_use, run.must_not_use) == ("marginal", ("desk",), ("pi-1",))


def test_only_model_data_and_pool_are_needed(folder: Path) -> None:
    run = load_run(write(folder, SHORT_RUN))
    assert run.model == "org/hub-model"
    assert run.step_limit_s is None
    assert request_of(run).wire_precision is None
    for key in ("model", "data", "pool"):
        lines = [line for line in SHORT_RUN.splitlines() if not line.startswith(key)]
        with pytest.raises(ConfigError, match=f"'{key}' is missing"):
            load_run(write(folder, "\n".join(lines)))


def test_paths_count_from_the_run_file_and_overrides_from_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(folder, FULL_RUN)
    run = load_run(path.relative_to(tmp_path), ["pool=other.yaml", "data.train=here.txt"])
    assert run.model == str(folder / "my-llama")
    assert run.output == folder / "out"
    assert run.pool == tmp_path / "other.yaml"
    assert run.data.train == (tmp_path / "here.txt",)
    assert load_run(write(folder, SHORT_RUN)).output == folder / "out"


def test_a_model_that_is_a_folder_beside_the_run_file_is_not_a_hub_id(folder: Path) -> None:
    (folder / "org" / "hub-model").mkdir(parents=True)
    assert load_run(write(folder, SHORT_RUN)).model == str(folder / "org" / "hub-model")


def test_overrides_are_yaml_and_reach_into_records(folder: Path) -> None:
    run = load_run(
        write(folder, SHORT_RUN),
        [
            "batch.global_size=8",
            "optimizer.betas=[0.8, 0.9]",
            "optimizer.learning_rate=1e-4",
            "deadline=2h",
            "wire_precision=bfloat16",
        ],
    )
    assert run.wire_precision == "bfloat16"
    assert run.batch.global_size == 8
    assert run.optimizer.betas == (0.8, 0.9)
    assert run.optimizer.learning_rate == 1e-4
    assert run.deadline_s == 7200
    assert run.step_limit_s == 72


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", ["'steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("batch..global_size=3", ["key=value"]),
        ("seed=[1", ["'seed=[1'", "YAML"]),
        ("batch.size=3", ["'batch.size'", "known keys are global_size"]),
        ("optimizer.learningrate=3", ["'optimizer.learningrate'", "did you mean 'learning_rate'"]),
        ("stepz=3", ["'stepz'", "did you mean 'steps'", "checkpoint_every"]),
        ("precision=float16", ["precision", "float64", "'float16'"]),
        ("wire_precision=float32", ["wire_precision", "'bfloat16'", "'float32'"]),
        ("steps=0", ["steps", "greater than or equal to 1", "0"]),
        ("steps=true", ["steps", "wanted a number"]),
        ("deadline=0s", ["deadline", "greater than 0"]),
        ("deadline=8 hours", ["deadline", "8 hours", "h"]),
        ("optimizer.betas=[0.9, 1.0]", ["betas", "[0.9, 1.0]"]),
        ("optimizer.learning_rate=-1", ["learning_rate", "greater than 0", "-1"]),
        ("optimizer.learning_rate=.inf", ["learning_rate", "finite"]),
        ("optimizer.schedule=polynomial", ["schedule", "'cosine'", "polynomial"]),
        ("optimizer.warmup_steps=101", ["warmup_steps is 101", "100 steps"]),
        ("method=qlora", ["method", "'full'", "'qlora'"]),
        ("lora.rank=4", ["method", "lora"]),
        ("keep_checkpoints=0", ["keep_checkpoints", "greater than or equal to 1"]),
        ("keep_best=true", ["keep_best needs validation data and evaluate_every"]),
        ("early_stopping={patience: 2}", ["early_stopping needs validation data and evaluate_every"]),
        ("early_stopping.patienc=2", ["'early_stopping.patienc'", "'patience'"]),
        ("schema=colledge/run/2", ["schema", "colledge/run/1", "colledge/run/2"]),
    ],
)
def test_a_bad_override_is_refused_in_words(folder: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(write(folder, SHORT_RUN), [override])
    for word in words:
        assert word in str(error.value)
    assert error.value.exit_code == 2


def test_the_pool_loads_with_units(folder: Path) -> None:
    pool = load_pool(write(folder, FULL_POOL))
    desk, pi = pool.devices
    assert (desk.memory_bytes, desk.threads, desk.accelerator) == (4_000_000_000, 4, "cuda:0")
    assert (pi.emulate.slowdown, pi.emulate.bandwidth_bytes_per_s, pi.emulate.latency_s) == (
        2.5,
        12.5e6,
        2e-3,
    )
    assert (pool.coordinator.address, pool.coordinator.port) == ("192.168.1.2", 29500)
    assert load_pool(write(folder, "devices: [{id: a}]")).coordinator.address == "127.0.0.1"


def test_watts_say_where_they_come_from(folder: Path) -> None:
    desk, pi = load_pool(write(folder, FULL_POOL)).devices
    assert (desk.power_mode().compute_w, desk.power_mode().source) == (200, "declared")
    assert pi.power_mode().source == "modelled"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("devices: []", ["devices", "at least 1"]),
        ("devices: [{id: a}, {id: a}]", ["'a'", "2 times"]),
        ("devices: [{id: a, speed: 3}]", ["'devices[0].speed'", "known keys are id, host"]),
        ("devices: [{id: a, power: {idle: 3}}]", ["'devices[0].power.idle'", "idle_w"]),
        ("devices: [{id: a, emulate: {slowdown: 0.5}}]", ["slowdown", "greater than or equal to 1", "0.5"]),
        ("devices: [{id: a, emulate: {bandwidth: 100 Mb}}]", ["bandwidth", "100 Mb", "Mbit/s"]),
        ("devices: [{id: a, memory: 4 G}]", ["devices[0].memory", "4 G", "GB"]),
        ("devices: [{id: a, accelerator: gpu}]", ["accelerator", "cuda", "gpu"]),
        ("devices: [{id: a b}]", ["devices[0].id", "a b"]),
        ("devices: [{host: local}]", ["devices[0].id", "missing"]),
        ("coordinator: {port: 70000}\ndevices: [{id: a}]", ["coordinator.port", "65535", "70000"]),
        ("- a", ["list", "mapping"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_a_bad_pool_is_refused_in_words(folder: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_pool(write(folder, text, "pool.yaml"))
    for word in ["pool.yaml", *words]:
        assert word in str(error.value)


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_run(folder / "none.yaml")


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_schema_is_json_that_refuses_unknown_keys(name: str) -> None:
    schema = json.loads(schema_text(name))
    assert schema["additionalProperties"] is False
    assert ("schema" in schema["properties"]) == (name != "metrics")


def test_schemas_use_the_keys_of_the_files() -> None:
    assert "deadline" in json.loads(schema_text("run"))["properties"]
    assert "memory" in json.loads(schema_text("pool"))["$defs"]["DeviceConfig"]["properties"]
    with pytest.raises(ConfigError, match=r"'pol'.*pool-profile"):
        schema_text("pol")


def test_what_is_written_loads_again(folder: Path) -> None:
    run = load_run(write(folder, FULL_RUN))
    assert RunConfig.model_validate_json(run.to_json()) == run
    pool = load_pool(write(folder, FULL_POOL))
    assert PoolConfig.model_validate_json(pool.to_json()) == pool
