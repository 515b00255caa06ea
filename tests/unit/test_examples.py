"""The examples' profiles are those that the commands write today, and what the examples claim is so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from colledge.launch.cli import main
from colledge.launch.job import OutputFolder
from colledge.launch.run_config import load_run
from colledge.planner import PoolCosts
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import read_json

STALE = "run `make examples`"
EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["home", "factory"]


def colledge(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["colledge", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert isinstance(exit.value.code, int)
    return exit.value.code


def profiles(folder: Path) -> tuple[PoolProfile, ModelProfile]:
    files = OutputFolder(folder)
    return read_json(PoolProfile, files.pool_profile), read_json(ModelProfile, files.model_profile)


@pytest.mark.parametrize("name", NAMES)
def test_the_profiles_are_those_that_the_command_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert colledge(monkeypatch, "profile", EXAMPLES / name / "run.yaml", "-o", tmp_path) == 0
    assert "nothing is measured" in capsys.readouterr().out
    assert profiles(tmp_path) == profiles(EXAMPLES / name)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "model-profile.json",
        "pool-profile.json",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_that_which_the_command_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (EXAMPLES / name).glob("*-profile.json"):
        shutil.copy(file, tmp_path)
    assert colledge(monkeypatch, "plan", EXAMPLES / name / "run.yaml", f"output={tmp_path}") == 0
    assert "The plan for least energy" in capsys.readouterr().out
    fresh, kept = OutputFolder(tmp_path), OutputFolder(EXAMPLES / name)
    assert rounded(fresh.plan) == rounded(kept.plan), STALE
    assert fresh.plan_markdown.read_text() == kept.plan_markdown.read_text(), STALE


def rounded(plan: Path) -> object:
    """Return a plan with its figures to nine digits: other machines add up the last ones otherwise."""
    return json.loads(plan.read_text(encoding="utf-8"), parse_float=lambda text: f"{float(text):.9g}")


@pytest.mark.parametrize("name", NAMES)
def test_no_device_alone_holds_the_model_and_every_pair_is_joined(name: str) -> None:
    run = load_run(EXAMPLES / name / "run.yaml")
    pool, model = profiles(EXAMPLES / name)
    trained = sum(layer.trainable_parameter_bytes for layer in model.layers)
    weights = sum(layer.parameter_bytes for layer in model.layers)
    needed = weights + trained * (1 + run.optimizer.state_factor)
    assert all(needed + device.runtime_bytes > device.memory_bytes for device in pool.devices)
    assert needed < sum(device.memory_bytes - device.runtime_bytes for device in pool.devices)
    for a in pool.devices:
        for b in pool.devices:
            assert a is b or pool.route(a.id, b.id).bandwidth_bytes_per_s > 0


def test_training_on_the_catalog_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ([], ["--dry-run"], ["--print-commands"]):
        assert colledge(monkeypatch, "train", EXAMPLES / "home" / "run.yaml", *option) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "from the catalog" in line
        assert "Fix:" in line


@pytest.mark.parametrize("name", NAMES)
def test_every_device_is_timed_from_the_catalog(name: str) -> None:
    costs = PoolCosts(*profiles(EXAMPLES / name))
    for device in costs.pool.devices:
        for mode in device.modes:
            assert costs.time_source(device.kind, mode.name) == "catalog"
            assert costs.layer_s(device.id, mode.name, 1, 1, 1.0) > 0
