"""The training loop: schedules, checkpoints, validation and their resumption, on the session's workers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colledge.errors import ColledgeError, ConfigError
from colledge.launch.job import Outcome, OutputFolder
from colledge.models import HuggingFaceCausalLM
from colledge.parallel import Engine, EngineSettings, OptimizerSettings
from colledge.parallel.checkpoint import find_whole_checkpoint, read_state, save_checkpoint
from colledge.plan import Plan
from colledge.records import read_json
from colledge.report import StepMetrics, read_metrics
from tests.multiproc.commands import HYBRID, ONE, PIPELINE, Runs, assert_one_line, run_here
from tests.multiproc.test_exactness import Case, _config, _start_weights, make_batch
from tests.multiproc.workers import Workers

VALIDATION = ("data.validation_split=0.02", "data.sequence_length=64")
SCHEDULE = ("optimizer.schedule=cosine", "optimizer.warmup_steps=2")


def steps_of(lines: list[StepMetrics]) -> list[int]:
    return [line.step for line in lines]


def checkpoints(out: OutputFolder) -> set[int]:
    return {int(path.name.partition("-")[2]) for path in out.path.glob("checkpoint-*")}


def corrupt(checkpoint: Path) -> Path:
    path = checkpoint / "block.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def assert_same(lines: list[StepMetrics], wanted: list[StepMetrics]) -> None:
    assert steps_of(lines) == steps_of(wanted)
    assert [line.loss for line in lines] == pytest.approx([line.loss for line in wanted], rel=1e-9)
    assert [line.learning_rate for line in lines] == [line.learning_rate for line in wanted]
    theirs = {line.step: line.validation_loss for line in wanted if line.validation_loss is not None}
    ours = {line.step: line.validation_loss for line in lines if line.validation_loss is not None}
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_resumed_run_is_the_undisturbed_one_under_another_plan_and_after_a_fallback(
    runs: Runs, tmp_path: Path
) -> None:
    settings = (*VALIDATION, *SCHEDULE, "steps=9", "checkpoint_every=2", "evaluate_every=3")
    wanted = read_metrics(runs(tmp_path / "whole", ONE, *settings).metrics)
    rates = [line.learning_rate for line in wanted]
    assert rates[:3] == [0.0, 0.005, 0.01]
    assert rates[-1] is not None
    assert 0 < rates[-1] < 0.001

    out = runs(tmp_path / "out", HYBRID, *settings, stop_after=7)
    assert checkpoints(out) == {6, 7}
    assert not out.outcome.exists()
    damaged = corrupt(out.path / "checkpoint-7")
    found, faults = find_whole_checkpoint(out.path)
    assert found == out.path / "checkpoint-6"
    assert len(faults) == 1
    assert str(damaged) in faults[0]
    assert "SHA-256" in faults[0]

    runs(out.path, PIPELINE, *settings, resume=True, stop_after=0)
    assert steps_of(read_metrics(out.metrics)) == [1, 2, 3, 4, 5, 6]
    assert checkpoints(out) == {6}
    runs(out.path, PIPELINE, *settings, resume=True)
    assert_same(read_metrics(out.metrics), wanted)
    assert read_json(Outcome, out.outcome) == Outcome(steps=9, step=9)


def test_the_last_checkpoints_are_kept(runs: Runs, tmp_path: Path) -> None:
    out = runs(tmp_path / "out", ONE, "steps=6", "checkpoint_every=1", "keep_checkpoints=3")
    assert checkpoints(out) == {3, 4, 5}
    state = read_state(out.path / "checkpoint-5")
    assert set(state.files) == {path.name for path in (out.path / "checkpoint-5").iterdir()} - {"state.json"}


OVERFITTING = (  # the validation loss soon rises
    "data.train=little.txt",
    "data.validation=held.txt",
    "evaluate_every=1",
    "optimizer.learning_rate=0.05",
    "keep_checkpoints=1",
)


@pytest.fixture
def overfitting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines())
    (folder / "little.txt").write_text(text[:400])
    (folder / "held.txt").write_text(text[20_000:22_000])
    monkeypatch.chdir(folder)


def weights(out: OutputFolder) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(out.model / "model.safetensors").items()}


def close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(
        torch.allclose(torch.tensor(one[name]), torch.tensor(other[name]), rtol=1e-9, atol=1e-9)
        for name in one
    )


@pytest.mark.usefixtures("overfitting")
def test_the_best_model_is_saved_also_by_a_run_that_was_resumed(runs: Runs, tmp_path: Path) -> None:
    settings = (*OVERFITTING, "steps=8", "keep_best=true")
    out = runs(tmp_path / "whole", ONE, *settings)
    losses = {line.step: line.validation_loss for line in read_metrics(out.metrics)}
    assert len(losses) == 8
    best = min(losses, key=lambda step: losses[step] or 0.0)
    assert 1 < best < 6, losses
    outcome = read_json(Outcome, out.outcome)
    assert (outcome.steps, outcome.step, outcome.best_loss) == (8, best, losses[best])
    assert f"step {best}" in outcome.sentences()[0]
    assert best in checkpoints(out)
    alone = runs(tmp_path / "alone", ONE, *OVERFITTING, f"steps={best}")
    assert close(weights(out), weights(alone))
    last = runs(tmp_path / "last", ONE, *OVERFITTING, "steps=8")
    assert not close(weights(out), weights(last))

    resumed = runs(tmp_path / "out", PIPELINE, *settings, stop_after=best + 2)
    assert checkpoints(resumed) == {best, best + 2}
    runs(resumed.path, ONE, *settings, resume=True)
    assert read_json(Outcome, resumed.outcome).step == best
    assert close(weights(resumed), weights(alone))

    stopped = runs(tmp_path / "stopped", ONE, *settings, "early_stopping={patience: 2}")
    outcome = read_json(Outcome, stopped.outcome)
    assert (outcome.steps, outcome.step) == (best + 2, best)
    assert f"Stopped early after step {best + 2}" in outcome.sentences()[0]
    assert close(weights(stopped), weights(alone))


@pytest.mark.usefixtures("overfitting")
def test_a_lost_best_checkpoint_is_said_and_looked_for_anew(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*OVERFITTING, "steps=8", "keep_best=true")
    out = runs(tmp_path / "out", ONE, *settings, stop_after=7)
    best = min(checkpoints(out))
    assert best < 7
    path = corrupt(out.path / f"checkpoint-{best}")
    runs(out.path, ONE, *settings, resume=True)
    assert f"the best is looked for anew: {path}" in capsys.readouterr().out
    assert read_json(Outcome, out.outcome).step in (7, 8)


def test_a_damaged_checkpoint_is_passed_over_in_words(
    runs: Runs,
    folder: Path,
) -> None:
    out = runs(folder / "out", ONE, "steps=5", "checkpoint_every=2")
    assert checkpoints(out) == {2, 4}
    (out.path / "checkpoint-4" / "head.safetensors").write_bytes(b"")
    resume = ("train", "run.yaml", "--plan", "one.json", "--resume", "auto", "steps=6", "--dry-run")
    result = run_here(folder, *resume)
    assert result.returncode == 0, result.stderr
    assert "checkpoint-4/head.safetensors: its SHA-256 is" in result.stdout
    assert "going on from" in result.stdout
    assert "checkpoint-2" in result.stdout
    (out.path / "checkpoint-2" / "state.json").unlink()
    assert_one_line(
        run_here(folder, *resume), "no checkpoint is whole", "head.safetensors", "state.json: no such"
    )
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        find_whole_checkpoint(out.path)


def test_tensorboard_has_the_figures_of_metrics_also_after_a_resume(runs: Runs, tmp_path: Path) -> None:
    settings = (
        *VALIDATION,
        *SCHEDULE,
        "steps=5",
        "checkpoint_every=2",
        "evaluate_every=3",
        "report_to=tensorboard",
    )
    out = runs(tmp_path / "out", ONE, *settings, stop_after=3)
    corrupt(out.path / "checkpoint-3")  # so that step 3 is trained twice
    runs(out.path, ONE, *settings, resume=True)
    events = EventAccumulator(str(out.tensorboard))
    events.Reload()
    lines = read_metrics(out.metrics)
    tags = {
        "train/loss": "loss",
        "train/learning_rate": "learning_rate",
        "train/tokens": "tokens",
        "train/step_s": "step_s",
        "train/energy_joules": "energy_joules",
        "validation/loss": "validation_loss",
    }
    assert set(events.Tags()["scalars"]) == set(tags)
    for tag, name in tags.items():
        wanted = {line.step: getattr(line, name) for line in lines if getattr(line, name) is not None}
        seen = events.Scalars(tag)
        assert [event.step for event in seen] == list(wanted)
        assert [event.value for event in seen] == pytest.approx(list(wanted.values()), rel=1e-6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_it(small_disk: Path, workers: Workers) -> None:
    case = Case(model="llama-untied")
    _, weights = _start_weights(case)
    model = HuggingFaceCausalLM(_config(case.model).to_dict())
    alone = Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": len(model.layer_names),
            "global_batch_size": case.global_batch_size,
            "microbatch_size": case.global_batch_size,
            "stages": [
                {
                    "layers": [0, len(model.layer_names)],
                    "replicas": [
                        {"samples": case.global_batch_size, "shards": [{"device": "d0", "fraction": 1.0}]}
                    ],
                }
            ],
        }
    )
    settings = EngineSettings(OptimizerSettings(), precision="float64")
    engine = Engine(alone, model, weights, settings, workers.ranks, workers.wire)
    engine.train_step(make_batch(case, 0))
    save_checkpoint(engine, small_disk, 0, {})
    engine.train_step(make_batch(case, 1))
    with pytest.raises(ColledgeError, match=r"checkpoint-2 could not be saved .*No space left") as full:
        save_checkpoint(engine, small_disk, 0, {})
    assert "make room" in full.value.fix
    engine.close()
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-1"]
    assert read_state(small_disk / "checkpoint-1").step == 1
