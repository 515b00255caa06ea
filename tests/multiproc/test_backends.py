"""DeepSpeed and FairScale train as the native engine does under the same plan; what they cannot run they refuse."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from colledge.errors import ConfigError, PlanError
from colledge.launch.run import check_backend
from colledge.launch.run_config import PoolConfig, load_run
from colledge.parallel import Engine, EngineSettings
from colledge.parallel.backends import check_backend_plan, check_installed
from colledge.parallel.backends.zero_config import complete_config
from colledge.parallel.wire import Wire
from colledge.plan import Plan
from colledge.settings import OptimizerSettings
from tests import forked
from tests.multiproc.test_exactness import OPTIMIZERS, Case, _model, _plan, _stage, _start_weights, make_batch
from tests.multiproc.workers import Workers

NUM_STEPS = 6
LOSSES, WEIGHTS = 1e-5, 1e-4  # relative
CASE = Case("llama-tied", "adamw-clipped", precision="float32")
SETTINGS = OPTIMIZERS[CASE.optimizer].model_copy(update={"eps": 1e-3})
PLANS = {  # the largest first: stage 3 of ZeRO wants processes that had the same setups before
    "3 unequal": _plan(_stage((0, 5), (2, {"d2": 1}), (1, {"d0": 1}), (1, {"d1": 1}))),
    "2 equal": _plan(_stage((0, 5), (2, {"d0": 1}), (2, {"d1": 1}))),
    "2 equal, recomputed": _plan(_stage((0, 5), (2, {"d0": 1}), (2, {"d1": 1}))).model_copy(
        update={"recompute": (True,)}
    ),
}
BACKENDS: dict[str, dict[str, Any]] = {
    **{
        f"zero-{stage}": {"backend": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
        for stage in (1, 2, 3)
    },
    "fairscale": {"backend": "fairscale"},
}


def _package(backend: str) -> str:
    return str(BACKENDS[backend]["backend"])


# -- exactness -----------------------------------------------------------------------------------------------------


def _engine(plan: Plan, workers: Workers, backend: dict[str, Any]) -> Engine:
    _, weights = _start_weights(CASE)
    settings = EngineSettings(SETTINGS, **backend)
    return Engine(plan, _model(CASE.model), weights, settings, workers.ranks, workers.wire)


def _train(plans: list[Plan], workers: Workers, backend: dict[str, Any]) -> dict[str, Any]:
    """Train under the plans, each for an equal share of the steps; the state moves through checkpoints."""
    engine, numbers = _engine(plans[0], workers, backend), []
    for index in range(NUM_STEPS):
        plan = plans[index * len(plans) // NUM_STEPS]
        if plan is not engine.plan:
            layers = {name: engine.checkpoint_layer(name) for name in engine.model.layer_names}
            engine.close()
            engine = _engine(plan, workers, backend)
            for name, values in layers.items():
                engine.restore_layer(name, values, index)
        record = engine.train_step(make_batch(CASE, index), 0.01 / (1 + index))
        numbers += [record.loss, record.gradient_norm]
    numbers.append(engine.evaluate(make_batch(CASE, NUM_STEPS, extra_rows=3)).loss)
    values = {name: tensor for layer in engine.layers() for name, tensor in layer.items()}
    engine.close()
    return {"numbers": numbers, "weights": values}


def _distance(seen: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, float]:
    """Return the largest relative difference of losses and norms, and of weights by their largest entry."""
    assert set(seen["weights"]) == set(wanted["weights"])
    numbers = zip(seen["numbers"], wanted["numbers"], strict=True)
    pairs = [(seen["weights"][name], wanted["weights"][name]) for name in wanted["weights"]]
    return (
        max(abs(a - b) / abs(b) for a, b in numbers),
        max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
    )


def _run_all(names: list[str]) -> None:
    world, distances = Workers(3), {}
    for plan_name, plan in PLANS.items():
        native = _train([plan], world, {})
        for name in names:
            distances[f"{name}, {plan_name}"] = _distance(_train([plan], world, BACKENDS[name]), native)
    if "fairscale" in names:
        plans = [PLANS["2 equal"], PLANS["3 unequal"]]
        native = _train(plans, world, {})
        distances["fairscale, resumed"] = _distance(_train(plans, world, BACKENDS["fairscale"]), native)
    world.close()
    print(json.dumps(distances))


@pytest.fixture(scope="module")
def distances() -> dict[str, tuple[float, float]]:
    """The differences from the native engine, in a world whose libraries leave nothing behind in other tests."""
    installed = [backend for backend in BACKENDS if find_spec(_package(backend))]
    finished = forked.run(_run_all, installed, timeout_s=150)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return {name: tuple(pair) for name, pair in json.loads(finished.stdout.splitlines()[-1]).items()}


CASES = [*[f"{backend}, {plan}" for backend in BACKENDS for plan in PLANS], "fairscale, resumed"]


@pytest.mark.parametrize("case", CASES)
def test_a_backend_trains_as_the_native_engine_does(
    case: str, distances: dict[str, tuple[float, float]]
) -> None:
    package = _package(case.partition(",")[0])
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'colledge[{package}]'")
    numbers, weights = distances[case]
    assert numbers < LOSSES
    assert weights < WEIGHTS


# -- refusals ------------------------------------------------------------------------------------------------------

REFUSED_PLANS = {
    "2 stages": _plan(_stage((0, 2), (4, {"d0": 1})), _stage((2, 5), (4, {"d1": 1}))),
    "2 shards": _plan(_stage((0, 5), (4, {"d0": 0.5, "d1": 0.5}))),
    "'d1' computes no rows": _plan(_stage((0, 5), (4, {"d0": 1}), (0, {"d1": 1}))),
    "several forwards": PLANS["2 equal"].model_copy(
        update={"schedule": PLANS["2 equal"].schedule.model_copy(update={"name": "gpipe"})}
    ),
}


@pytest.mark.parametrize("backend", ["deepspeed", "fairscale"])
@pytest.mark.parametrize("why", REFUSED_PLANS)
def test_a_plan_that_it_cannot_run_is_refused_with_why(why: str, backend: Any) -> None:
    check_backend_plan("native", REFUSED_PLANS[why])
    with pytest.raises(PlanError, match=why) as fault:
        Engine(
            REFUSED_PLANS[why],
            _model(CASE.model),
            {},
            EngineSettings(SETTINGS, backend=backend),
            {},
            cast(Wire, None),  # no device hears of it
        )
    assert "backend: native" in fault.value.fix


@pytest.mark.parametrize("backend", ["deepspeed", "fairscale"])
def test_a_missing_package_gives_the_line_that_installs_it(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(ConfigError) as fault:
        check_installed(backend)
    assert f"pip install 'colledge[{backend}]'" in str(fault.value)
    assert "\n" not in str(fault.value)


def _complete(**given: Any) -> dict[str, Any]:
    return complete_config({"zero_optimization": {"stage": 2}, **given}, SETTINGS, PLANS["2 equal"])


def test_a_given_configuration_is_completed() -> None:
    config = _complete(train_batch_size=8, gradient_accumulation_steps="auto", fp16={"enabled": False})
    assert config["gradient_clipping"] == SETTINGS.gradient_clipping
    assert config["gradient_accumulation_steps"] == 2
    assert config["zero_optimization"] == {"stage": 2}
    without = complete_config({"zero_optimization": {"stage": 1}}, OptimizerSettings(), PLANS["2 equal"])
    assert without["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0


def test_auto_never_contradicts_and_deepspeed_never_sees_it() -> None:
    config = _complete(
        optimizer={
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
        fp16={"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        bf16={"enabled": "auto"},
        train_batch_size="auto",
        train_micro_batch_size_per_gpu="auto",
        zero_optimization={"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}},
    )
    assert "auto" not in str(config)
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "none"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, wanted 8"),
        ({"train_micro_batch_size_per_gpu": 4}, "wanted 2 of a replica"),
        ({"gradient_accumulation_steps": 1}, "wanted 2 of the plan"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, wanted 0.5"),
        ({"torch_autocast": {"enabled": True}}, "'torch_autocast', which run.yaml says by precision"),
        ({"bf16": {"enabled": True}}, "'bf16', which run.yaml says by precision"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type is 'Adam', wanted adamw"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, r"optimizer.params.lr is 3e-05, wanted"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.type is 'WarmupDecayLR', wanted .* constant"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0, wanted 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
    ],
)
def test_a_configuration_that_contradicts_the_run_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _complete(**given)


def _run_file(folder: Path, **keys: Any) -> Path:
    run = {"schema": "colledge/run/1", "model": "m", "data": {"train": "a.jsonl"}, "pool": "pool.yaml"}
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0}')
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, **keys}))
    return path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"backend": "deepspeed"}, "go together"),
        ({"deepspeed": {"zero_stage": 1}}, "go together"),
        ({"backend": "deepspeed", "deepspeed": {}}, "zero_stage"),
        ({"backend": "deepspeed", "deepspeed": {"zero_stage": 2, "config": "ds.json"}}, "zero_stage"),
        ({"backend": "fairscale", "precision": "bfloat16"}, "float32"),
        ({"backend": "fairscale", "method": "lora"}, "whole models"),
        ({"backend": "fairscale", "zero": 1}, "zero is for backend: native"),
        ({"zero": 2}, "zero"),
        ({"zero": True}, "zero"),
        ({"zero": 1, "optimizer": {"name": "sgd"}}, "sgd without momentum has none"),
        (
            {"backend": "deepspeed", "deepspeed": {"zero_stage": 2}, "checkpoint_every": 5},
            "keeps no checkpoints",
        ),
    ],
)
def test_keys_that_a_backend_cannot_serve_are_refused(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_run(_run_file(tmp_path, **keys))


@pytest.mark.parametrize(
    ("backend", "device", "said"),
    [
        ({"backend": "deepspeed", "deepspeed": {"config": "ds.json"}}, {}, "gradient_clipping is 2.0"),
        ({"backend": "fairscale"}, {"accelerator": "cuda:0"}, "is cuda:0"),
        ({"backend": "fairscale"}, {"emulate": {"slowdown": 2}}, "emulates a slower one"),
    ],
)
def test_a_run_and_its_pool_are_checked_before_any_device_starts(
    backend: dict[str, Any], device: dict[str, Any], said: str, tmp_path: Path
) -> None:
    pytest.importorskip(str(backend["backend"]))
    pool = PoolConfig.model_validate({"schema": "colledge/pool/1", "devices": [{"id": "d0", **device}]})
    with pytest.raises(ConfigError, match=said):
        check_backend(load_run(_run_file(tmp_path, **backend)), pool)
