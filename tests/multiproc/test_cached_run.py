"""A run on cached activations from run.yaml to its report: the same losses, also after an interruption."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from colledge.launch.job import OutputFolder
from colledge.plan import read_plan
from colledge.planner.caching import CachePlan
from colledge.records import read_json
from colledge.report import Report, read_metrics
from colledge.report.caching import CacheFill
from tests.multiproc.commands import ONE, Runs, forked_colledge, run_here, start_forked, wait_for_steps

POOL = """\
devices:
  - {id: desk, threads: 1, memory: 2 GB, power: {idle_w: 10, compute_w: 40, communicate_w: 15}}
  - {id: pi, threads: 1, memory: 2 GB, power: {idle_w: 2, compute_w: 6, communicate_w: 3}}
"""
RUN = """\
model: model
data: {train: corpus.jsonl, sequence_length: 32, validation_split: 0.02}
method: lora
lora: {rank: 4, blocks: [2], dropout: 0.1}
batch: {global_size: 4}
optimizer: {name: adamw, learning_rate: 1.0e-2, gradient_clipping: 1.0}
steps: 120
evaluate_every: 40
objective: time
pool: small.yaml
output: out
"""
CACHE = "activation_cache={limit: 40 MB}"


def _losses(output: Path) -> list[float]:
    lines = read_metrics(output / "metrics.jsonl")
    return [line.loss for line in lines] + [x for line in lines if (x := line.validation_loss) is not None]


def test_a_run_on_cached_activations_is_the_same_run(
    folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = folder / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    (folder / "small.yaml").write_text(POOL)
    (folder / "cached.yaml").write_text(RUN)
    profiled = forked_colledge(folder, "profile", "cached.yaml")
    assert profiled.returncode == 0, profiled.stderr
    too_much = run_here(folder, "train", "cached.yaml", "activation_cache={limit: 100 kB}")
    assert too_much.returncode == 2
    assert "activation_cache.limit is 100 kB" in too_much.stderr

    process = start_forked(folder, "train", "cached.yaml", CACHE)
    wait_for_steps(folder, 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    out = OutputFolder(folder / "out")
    filled = read_json(CacheFill, out.filled)
    assert list(home.rglob("activations"))  # kept for the run to go on
    resumed = forked_colledge(folder, "train", "cached.yaml", CACHE, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert not list(home.rglob("index"))  # no longer needed
    assert read_json(CacheFill, out.filled) == filled  # nothing was computed twice

    plan, cache = read_plan(out.plan), read_json(CachePlan, out.cache)
    assert plan.layers == (3, 5)
    assert cache.prefix.layers == (0, 3)
    report = read_json(Report, out.report_json)
    saving = report.activation_cache
    assert saving is not None
    assert saving.fill == filled
    assert saving.with_s == pytest.approx(
        filled.seconds + sum(line.step_s for line in read_metrics(out.metrics))
    )
    assert saving.without_joules is not None
    assert any("without" in note for note in report.notes)
    assert "activation cache" in resumed.stdout

    runs(folder / "whole", ONE, file="cached.yaml")
    assert _losses(folder / "out") == pytest.approx(_losses(folder / "whole"), rel=1e-5)
    refused = run_here(folder, "train", "cached.yaml", CACHE, "--plan", "one.json", "output=other")
    assert refused.returncode == 2
    assert "needs the profiles" in refused.stderr
    (folder / "other").mkdir(exist_ok=True)
    for path in (out.pool_profile, out.model_profile):
        (folder / "other" / path.name).write_bytes(path.read_bytes())
    refused = run_here(folder, "train", "cached.yaml", CACHE, "--plan", "one.json", "output=other")
    assert "the plan runs layers [0, 5), the run trains layers [3, 5)" in refused.stderr
    assert json.loads(out.report_json.read_text())["plan"]["layers"] == [3, 5]
