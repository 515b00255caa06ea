"""With cached activations training is the same as without: under other plans, after crashes, with damaged rows."""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from colledge.data import Rows, Tokens, rows_for_step, rows_of
from colledge.data.batch import ROW, Batch
from colledge.data.text.rows import joined
from colledge.errors import DeviceError
from colledge.launch.caching import fill_caches
from colledge.launch.inputs import RunData
from colledge.launch.stop import StopRequest
from colledge.models import HuggingFaceCausalLM
from colledge.models.lora import StartingValues
from colledge.parallel import Engine, EngineSettings, OptimizerSettings
from colledge.parallel.activation_cache import ActivationCache, cache_folder
from colledge.parallel.caching import ActivationCaches, rows_read
from colledge.parallel.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from colledge.plan import Plan
from colledge.settings import LoraSettings
from tests.multiproc.test_exactness import VOCABULARY, Case, _config, _start_weights
from tests.multiproc.test_lora import _stage
from tests.multiproc.workers import Workers

RUN = uuid.uuid4().hex  # tests of two checkouts may run side by side
NUM_ROWS, LENGTH, GLOBAL, NUM_STEPS = 11, 9, 8, 6  # more than four epochs, and no epoch ends with a batch
SETTINGS = EngineSettings(
    optimizer=OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, gradient_clipping=0.5),
    precision="float64",
    seed=7,
)
BLOCKS = {"llama-untied": (2,), "gpt2-tied": (1, 2)}
Trained = tuple[list[float], float, dict[str, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def home(workers: Workers) -> Iterator[Path]:
    """Where the workers keep their caches: they were started with this process's environment."""
    folder = cache_folder("key", "device").parent.parent
    yield folder
    for left in folder.glob(f"{RUN}-*"):  # of a test that failed
        shutil.rmtree(left)


def _model(name: str) -> HuggingFaceCausalLM:
    lora = LoraSettings(rank=3, targets="all-linear", blocks=BLOCKS[name], dropout=0.2)
    return HuggingFaceCausalLM(_config(name).to_dict(), lora)


def _rows() -> Rows:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (NUM_ROWS, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (NUM_ROWS,), generator=generator)
    tokens = (Tokens("a row", row[:length].numpy()) for row, length in zip(ids, lengths, strict=True))
    return rows_of(joined(tokens), LENGTH, 0, packing=False)


def _batch(rows: Tensor) -> Batch:
    batch = _rows().batch(rows)
    return dataclasses.replace(batch, inputs={**batch.inputs, ROW: rows})


def _steps() -> list[Tensor]:
    return [rows_for_step(NUM_ROWS, GLOBAL, 5, step) for step in range(NUM_STEPS)]


def _plan(num_layers: int, layers: tuple[int, int], *stages: dict[str, Any]) -> Plan:
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": num_layers,
            "layers": layers,
            "global_batch_size": GLOBAL,
            "microbatch_size": 4,
            "stages": stages,
        }
    )


def _pairs(last: int, cut: int) -> dict[str, tuple[Plan, Plan]]:
    """Return plans of the prefix and of the rest."""
    one, rest = _stage((0, cut), (4, {"d0": 1.0})), (cut, last)
    pipeline = (_stage((0, 1), (4, {"d1": 1.0})), _stage((1, cut), (4, {"d0": 1.0})))
    shared = _stage((0, cut), (3, {"d0": 1.0}), (1, {"d1": 1.0}))
    sharded = _stage((0, cut), (3, {"d0": 0.75, "d1": 0.25}), (1, {"d2": 0.75, "d3": 0.25}))
    prefixes: dict[str, tuple[dict[str, Any], ...]] = {
        "one device": (one,),
        "another device": (one,),
        "a pipeline, then replicas": pipeline,
        "replicas, then a pipeline": (shared,),
        "shards, then shards": (sharded,),
    }
    rests: dict[str, tuple[dict[str, Any], ...]] = {
        "one device": (_stage(rest, (4, {"d0": 1.0})),),
        "another device": (_stage(rest, (4, {"d3": 1.0})),),
        "a pipeline, then replicas": (_stage(rest, (3, {"d0": 1.0}), (0, {"d1": 1.0}), (1, {"d2": 1.0})),),
        "replicas, then a pipeline": (
            _stage((cut, last - 1), (2, {"d2": 1.0}), (2, {"d1": 1.0})),
            _stage((last - 1, last), (4, {"d0": 1.0})),
        ),
        "shards, then shards": (_stage(rest, (4, {"d3": 0.25, "d1": 0.75})),),
    }
    return {
        name: (_plan(last, (0, cut), *prefixes[name]), _plan(last, rest, *rests[name])) for name in prefixes
    }


def _train(engine: Engine) -> Trained:
    losses = [engine.train_step(_batch(rows)).loss for rows in _steps()]
    validation = engine.evaluate(_batch(torch.tensor([3, 9, 10])))
    layers = engine.state_dict(trained_only=True).values()
    engine.close()
    return (
        losses,
        validation.loss / validation.num_targets,
        {name: tensor for layer in layers for name, tensor in layer.items()},
    )


def _engine(plan: Plan, name: str, workers: Workers, settings: EngineSettings = SETTINGS) -> Engine:
    model, (_, weights) = _model(name), _start_weights(Case(model=name))
    values = StartingValues(weights, model.adapter_shapes, seed=3)
    return Engine(plan, model, values, settings, workers.ranks, workers.wire)


def _readers(plan: Plan) -> dict[str, Tensor]:
    validation = torch.tensor([3, 9, *[10] * (GLOBAL - 2)])  # filled up as the engine does
    return rows_read(plan, [*_steps(), validation])


def _caches(
    plan: Plan, workers: Workers, key: str, settings: EngineSettings = SETTINGS, limit: int = 10**9
) -> ActivationCaches:
    return ActivationCaches(
        workers.wire, workers.ranks, _readers(plan), key, (LENGTH, 32), settings.precision, limit, {}
    )


def _train_cached(
    pair: tuple[Plan, Plan], name: str, workers: Workers, key: str, settings: EngineSettings = SETTINGS
) -> Trained:
    prefix, rest = pair
    caches = _caches(rest, workers, key, settings)
    missing = caches.open()
    assert missing.tolist() == list(range(NUM_ROWS))
    engine = _engine(prefix, name, workers, settings)
    assert sum(step.num_rows for step in caches.fill(engine, missing, _batch)) == NUM_ROWS
    engine.close()
    trained = _train(_engine(rest, name, workers, settings))
    caches.close(remove=True)
    return trained


def _difference(one: Trained, other: Trained) -> float:
    assert set(one[2]) == set(other[2])
    losses = [abs(a - b) / abs(b) for a, b in zip([*one[0], one[1]], [*other[0], other[1]], strict=True)]
    tensors = [float((t - other[2][n]).abs().max() / other[2][n].abs().max()) for n, t in one[2].items()]
    return max(*losses, *tensors)


def _uncached(name: str, workers: Workers, settings: EngineSettings = SETTINGS) -> Trained:
    last = len(_model(name).layer_names)
    plan = _plan(last, (0, last), _stage((0, last), (4, {"d0": 1.0})))
    return _train(_engine(plan, name, workers, settings))


@pytest.mark.parametrize("name", BLOCKS)
def test_training_from_cached_activations_is_training(name: str, workers: Workers, home: Path) -> None:
    last, cut = len(_model(name).layer_names), min(BLOCKS[name]) + 1
    wanted = _uncached(name, workers)
    for case, pair in _pairs(last, cut).items():
        trained = _train_cached(
            pair, name, workers, f"{RUN}-{name}-{case.replace(', ', '-').replace(' ', '-')}"
        )
        assert _difference(trained, wanted) <= 1e-10, case
    assert not list(home.glob(f"{RUN}-{name}*"))  # nothing stays on the disks


def test_in_float32_losses_agree_to_rounding(workers: Workers) -> None:
    settings = dataclasses.replace(SETTINGS, precision="float32")
    name = "llama-untied"
    pair = _pairs(5, 3)["a pipeline, then replicas"]
    trained, wanted = (
        _train_cached(pair, name, workers, f"{RUN}-float32", settings),
        _uncached(name, workers, settings),
    )
    losses = zip(trained[0], wanted[0], strict=True)
    assert max(abs(a - b) / b for a, b in losses) < 1e-6


def test_every_device_keeps_what_it_reads_and_nothing_else(workers: Workers, home: Path) -> None:
    prefix, rest = _pairs(5, 3)["a pipeline, then replicas"]
    caches = _caches(rest, workers, f"{RUN}-bytes")
    missing = caches.open()
    engine = _engine(prefix, "llama-untied", workers)
    list(caches.fill(engine, missing, _batch))
    engine.close()
    sizes = {d: (home / f"{RUN}-bytes" / d / "activations").stat().st_size for d in ("d0", "d1", "d2")}
    rows = {d: len(torch.unique(torch.cat([r[_taken(rest, d)] for r in _steps()]))) for d in sizes}
    read = {device: len(rows) for device, rows in _readers(rest).items()}
    assert sizes == {device: read[device] * LENGTH * 32 * 8 for device in sizes}
    assert rows["d1"] == read["d1"] == 0
    assert rows["d2"] < NUM_ROWS
    caches.close(remove=True)


def _taken(plan: Plan, device: str) -> list[int]:
    return plan.row_indices(next(place for place in plan.places() if place.shard.device == device))


def test_a_later_run_computes_only_what_is_missing_or_damaged(workers: Workers, home: Path) -> None:
    prefix, rest = _pairs(5, 3)["one device"]
    name, key = "llama-untied", f"{RUN}-damaged"
    caches = _caches(rest, workers, key)
    engine = _engine(prefix, name, workers)
    list(caches.fill(engine, caches.open(), _batch))
    caches.close(remove=False)
    folder = home / key / "d0"
    with (folder / "activations").open("r+b") as file:
        file.seek(2 * LENGTH * 32 * 8 + 100)  # in the row of slot 2
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with (folder / "index").open("r+b") as file:
        file.truncate((NUM_ROWS - 1) * 12 + 5)  # the last entry is torn
    again = _caches(rest, workers, key)
    missing = again.open()
    assert missing.tolist() == [2, NUM_ROWS - 1]
    list(again.fill(engine, missing, _batch))
    engine.close()
    trained = _train(_engine(rest, name, workers))
    again.close(remove=True)
    assert _difference(trained, _uncached(name, workers)) <= 1e-10


def test_a_cache_stays_within_its_limit_and_goes_with_the_run(workers: Workers, home: Path) -> None:
    prefix, rest = _pairs(5, 3)["one device"]
    key, row_bytes = f"{RUN}-limit", LENGTH * 32 * 8
    path = home / key / "d0" / "activations"
    engine = _engine(prefix, "llama-untied", workers)
    first = _caches(rest, workers, key)
    list(first.fill(engine, first.open(), _batch))
    first.close(remove=False)
    path.write_bytes(b"x" + path.read_bytes()[1:])  # the first row is damaged, and its place is lost
    for limit, num_missing in ((NUM_ROWS + 1, 1), (NUM_ROWS, NUM_ROWS)):
        again = _caches(rest, workers, key, limit=limit * row_bytes)
        missing = again.open()
        assert len(missing) == num_missing
        if num_missing == NUM_ROWS:
            list(again.fill(engine, missing, _batch))
            assert path.stat().st_size == NUM_ROWS * row_bytes
        again.close(remove=False)
    engine.close()
    elsewhere = _caches(_pairs(5, 3)["another device"][1], workers, key)
    elsewhere.open()
    elsewhere.close(remove=True)
    assert not (home / key).exists()  # what d0 kept under another plan goes too


def test_a_checkpoint_goes_on_with_cached_activations_and_without(workers: Workers, tmp_path: Path) -> None:
    name = "llama-untied"
    prefix, rest = _pairs(5, 3)["one device"]
    whole = _plan(5, (0, 5), _stage((0, 5), (4, {"d1": 1.0})))
    caches = _caches(rest, workers, f"{RUN}-checkpoint")
    filling = _engine(prefix, name, workers)
    list(caches.fill(filling, caches.open(), _batch))
    filling.close()
    losses = []
    for plan, steps, before in (
        (rest, range(2), None),
        (whole, range(2, 4), 2),
        (rest, range(4, NUM_STEPS), 4),
    ):
        engine = _engine(plan, name, workers)
        if before is not None:
            load_checkpoint(engine, checkpoint_path(tmp_path, before), 5)
        losses += [engine.train_step(_batch(_steps()[step])).loss for step in steps]
        save_checkpoint(engine, tmp_path, 5, {})
        engine.close()
    caches.close(remove=True)
    assert losses == pytest.approx(_uncached(name, workers)[0], rel=1e-10)


def test_filling_stops_when_asked_and_goes_on_later(workers: Workers) -> None:
    prefix, rest = _pairs(5, 3)["one device"]
    asked, data, numbers = SimpleNamespace(asked=True), RunData(_rows()), []
    for remove in (False, True):
        caches = _caches(rest, workers, f"{RUN}-stopped")
        fill = fill_caches(
            caches, lambda: _engine(prefix, "llama-untied", workers), data, {}, cast(StopRequest, asked)
        )
        numbers.append(fill.num_rows)
        caches.close(remove)
    assert numbers == [GLOBAL, NUM_ROWS - GLOBAL]


def test_a_damaged_row_is_never_read(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", (3, 2), torch.float32)
    values = torch.arange(12.0).view(2, 3, 2)
    cache.write([4, 7], values)
    assert torch.equal(cache.read([7, 4, 7]), values[[1, 0, 1]])
    assert cache.missing([4, 5, 7]) == [5]
    path = tmp_path / "cache" / "activations"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match=r"row 7 of the activation cache .* is missing or damaged"):
        cache.read([7])
    with pytest.raises(DeviceError, match="cannot name a folder"):
        cache_folder("../../etc", "desk")
    with pytest.raises(Exception, match="in use by another run"):
        ActivationCache(tmp_path / "cache", (3, 2), torch.float32)
