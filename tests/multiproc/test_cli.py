"""The commands as a user runs them: real torchrun agents, real workers, real files."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from colledge.launch.demo import make_model, standard_library_source
from colledge.launch.inputs import load_data
from colledge.launch.job import OutputFolder
from colledge.launch.run_config import load_pool, load_run
from colledge.parallel.checkpoint import find_whole_checkpoint
from colledge.records import read_json
from colledge.report import Report, read_metrics
from tests.multiproc.commands import (
    HYBRID,
    ONE,
    PIPELINE,
    POOL,
    Runs,
    assert_one_line,
    colledge,
    forked_colledge,
    processes_of,
    run_here,
    shard,
    start,
    start_by_hand,
    wait_for_steps,
)

# -- the same result under any plan --------------------------------------------------------------------------------


def figures(metrics: Path) -> tuple[list[float], dict[int, float | None]]:
    """Return the losses of a run, and those on its validation data by step."""
    lines = read_metrics(metrics)
    return [line.loss for line in lines], {
        line.step: line.validation_loss for line in lines if line.validation_s
    }


def test_a_hybrid_run_has_the_losses_of_one_device(folder: Path, runs: Runs) -> None:
    validation = ["data.validation_split=0.02", "evaluate_every=4"]
    result = colledge(folder, "train", "run.yaml", "--plan", "hybrid.json", *validation)
    assert result.returncode == 0, result.stderr
    out = OutputFolder(folder / "out")
    one = runs(folder / "one", ONE, *validation)
    for line in (line for o in (out, one) for line in read_metrics(o.metrics) if line.validation_s):
        assert line.validation_joules is not None
        all_idle, all_computing = 10 + 4 + 2, 40 + 14 + 6
        assert all_idle < line.validation_joules / line.validation_s < all_computing
    (losses, validated), (wanted, wanted_validated) = figures(out.metrics), figures(one.metrics)
    assert len(wanted) == 6
    assert losses == pytest.approx(wanted, rel=1e-9)
    assert losses[-1] < losses[0]
    report = read_json(Report, out.report_json)
    assert report.measured.devices["lap"].compute_s > 0
    assert "<html" in out.report_html.read_text()[:500]
    model = AutoModelForCausalLM.from_pretrained(out.model)
    assert model.config.num_hidden_layers == 3
    assert list(wanted_validated) == [4, 6]
    assert validated == pytest.approx(wanted_validated, rel=1e-9)
    assert report.validation[-1].loss == validated[6]
    theirs = loss_by_the_library(model, folder, validation)
    assert theirs == pytest.approx(validated[6], rel=1e-6)  # its norms are of float32
    assert not processes_of(folder)


def loss_by_the_library(model: torch.nn.Module, folder: Path, overrides: list[str]) -> float:
    """Return the loss on the run's validation data of a model that the library loaded."""
    held = load_data(load_run(folder / "run.yaml", overrides), folder / "model").validation
    assert held is not None
    batch = held.batch(torch.arange(held.num_rows))
    with torch.no_grad():
        logits = model.double()(**batch.inputs).logits[:, :-1]
    targets = batch.targets["labels"][:, 1:].flatten()
    return float(cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100))


def test_an_adapter_is_planned_for_trained_and_loaded_by_peft(folder: Path, runs: Runs) -> None:
    settings = [
        "method=lora",
        "lora.rank=4",
        "lora.dropout=0.1",
        "lora.targets=[q_proj, v_proj, down_proj]",
        "lora.modules_to_save=[lm_head, embed_tokens]",
        "data.validation_split=0.02",
        "evaluate_every=6",
        "checkpoint_every=4",
    ]
    result = forked_colledge(folder, "train", "run.yaml", "--plan", "hybrid.json", *settings)
    assert result.returncode == 0, result.stderr
    out = OutputFolder(folder / "out")
    assert f"adapter in {out.adapter}" in result.stdout.replace("\n", "")
    losses, validated = figures(out.metrics)
    one = runs(folder / "one", ONE, *settings)
    wanted, wanted_validated = figures(one.metrics)
    assert losses == pytest.approx(wanted, rel=1e-9)
    assert validated == pytest.approx(wanted_validated, rel=1e-9)
    assert losses[5] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    assert loss_by_the_library(base, folder, settings) > (validated[6] or 0.0) + 0.1
    loaded = PeftModel.from_pretrained(base, out.adapter)
    assert Path(str(loaded.peft_config["default"].base_model_name_or_path)) == (folder / "model").resolve()
    assert loss_by_the_library(loaded, folder, settings) == pytest.approx(validated[6], rel=1e-6)
    assert not out.model.exists()
    assert find_whole_checkpoint(one.path)[0] == one.path / "checkpoint-4"
    runs(one.path, HYBRID, *settings, resume=True)
    resumed, resumed_validated = figures(one.metrics)
    assert resumed == pytest.approx(wanted, rel=1e-9)
    assert resumed_validated == pytest.approx(wanted_validated, rel=1e-9)


def test_printed_lines_started_by_hand_train_the_same(folder: Path) -> None:
    printed = colledge(folder, "train", "run.yaml", "--plan", "pipeline.json", "--print-commands")
    assert printed.returncode == 0, printed.stderr
    start_by_hand(folder, printed.stdout, 3)
    assert len(read_metrics(folder / "out" / "metrics.jsonl")) == 6
    assert (folder / "out" / "model" / "model.safetensors").is_file()


def test_dry_run_starts_nothing(folder: Path) -> None:
    result = run_here(folder, "train", "run.yaml", "--plan", "hybrid.json", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "ready to train 6 steps" in result.stdout
    assert not (folder / "out" / "metrics.jsonl").exists()


# -- interruption --------------------------------------------------------------------------------------------------


def test_interrupt_saves_and_resume_goes_on_under_another_plan(folder: Path, runs: Runs) -> None:
    process = start(folder, "run.yaml", "--plan", "pipeline.json", "steps=5000")
    wait_for_steps(folder, 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "saved" in stderr
    assert not processes_of(folder)
    done = len(read_metrics(folder / "out" / "metrics.jsonl"))
    assert (folder / "out" / f"checkpoint-{done}" / "state.json").is_file()

    total = done + 3
    resumed = forked_colledge(
        folder, "train", "run.yaml", "--plan", "one.json", "--resume", "auto", f"steps={total}"
    )
    assert resumed.returncode == 0, resumed.stderr
    losses, _ = figures(folder / "out" / "metrics.jsonl")
    undisturbed = runs(folder / "whole", ONE, f"steps={total}")
    assert losses == pytest.approx(figures(undisturbed.metrics)[0], rel=1e-9)


def test_killed_launcher_stops_the_run_with_a_checkpoint(folder: Path) -> None:
    process = start(folder, "run.yaml", "--plan", "one.json", "steps=100000")
    wait_for_steps(folder, 2, process)
    process.kill()
    process.communicate(timeout=30)
    deadline_s = time.monotonic() + 60
    while processes_of(folder) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert not processes_of(folder)
    assert list((folder / "out").glob("checkpoint-*/state.json"))


def test_a_checkpoint_of_another_model_is_refused(folder: Path, runs: Runs) -> None:
    runs(folder / "out", ONE, "steps=3", "checkpoint_every=2")
    make_model(
        folder / "other", standard_library_source(60_000), vocabulary=310, hidden_size=32, num_blocks=3
    )
    result = forked_colledge(
        folder, "train", "run.yaml", "--plan", "one.json", "model=./other", "--resume", "auto", "steps=5"
    )
    assert_one_line(result, "model.embed_tokens.weight", "which this model has not")


def test_a_killed_worker_ends_the_run_with_one_line(folder: Path) -> None:
    process = start(folder, "run.yaml", "--plan", "pipeline.json", "steps=5000")
    wait_for_steps(folder, 2, process)
    victims = [p for p in processes_of(folder) if p.cmdline()[-1] == "colledge.launch.worker"]
    workers = [p for p in victims if "torchrun" not in " ".join(p.cmdline())]
    assert len(workers) == 2
    began_s = time.monotonic()
    victim = workers[-1]
    device = ("desk", "pi")[int(victim.environ()["RANK"]) - 1]
    victim.kill()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began_s < 30
    assert process.returncode not in (0, None)
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert f"device '{device}'" in stderr
    assert "Fix:" in stderr
    assert not processes_of(folder)


# -- bad input: one line, a fix, nothing started -------------------------------------------------------------------


def changed(content: dict[str, object], **changes: object) -> str:
    return json.dumps({**content, **changes})


BAD_PLANS = {
    "does not cover": (
        changed(ONE, stages=[{"layers": [0, 4], "replicas": [{"samples": 2, "shards": [shard("desk")]}]}]),
        ["layers", "[0, 4)", "[0, 5)"],
    ),
    "samples do not sum": (
        changed(ONE, stages=[{"layers": [0, 5], "replicas": [{"samples": 3, "shards": [shard("desk")]}]}]),
        ["samples", "3", "wanted 2"],
    ),
    "off the shard units": (
        changed(
            ONE,
            stages=[
                {
                    "layers": [0, 5],
                    "replicas": [{"samples": 2, "shards": [shard("desk", 0.7), shard("pi", 0.3)]}],
                }
            ],
        ),
        ["0.7", "units", "1/4"],
    ),
    "device twice": (
        changed(
            ONE,
            stages=[
                {
                    "layers": [0, 5],
                    "replicas": [
                        {"samples": 1, "shards": [shard("desk")]},
                        {"samples": 1, "shards": [shard("desk")]},
                    ],
                }
            ],
        ),
        ["'desk'", "twice"],
    ),
    "unknown device": (
        changed(ONE, stages=[{"layers": [0, 5], "replicas": [{"samples": 2, "shards": [shard("fridge")]}]}]),
        ["'fridge'", "desk, lap, pi"],
    ),
    "another number of layers": (
        changed(
            ONE,
            num_layers=9,
            stages=[{"layers": [0, 9], "replicas": [{"samples": 2, "shards": [shard("desk")]}]}],
        ),
        ["9 layers", "5"],
    ),
    "another batch": (changed(ONE, global_batch_size=8), ["8", "4"]),
    "unknown key": (changed(ONE, colour="red"), ["'colour'"]),
    "not JSON": ("{", ["not JSON"]),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plan(folder: Path, name: str) -> None:
    content, wanted = BAD_PLANS[name]
    (folder / "bad.json").write_text(content)
    assert_one_line(run_here(folder, "train", "run.yaml", "--plan", "bad.json"), *wanted)
    assert not (folder / "out" / "plan.json").exists()


def test_who_asks_for_rounding_gets_no_plan_without_and_a_plan_that_rounds_says_so(folder: Path) -> None:
    arguments = ["train", "run.yaml", "wire_precision=bfloat16", "--plan", "pipeline.json"]
    wanted = "wire_precision is bfloat16, the plan has none"
    assert_one_line(run_here(folder, *arguments), wanted)
    (folder / "rounded.json").write_text(changed(PIPELINE, wire_precision="bfloat16"))
    result = run_here(folder, "train", "run.yaml", "--plan", "rounded.json", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "between stages in bfloat16" in result.stdout


BAD_RUNS = {
    "unknown key": (["batch.size=8"], ["'batch.size'", "global_size"]),
    "missing model": (["model=./nowhere"], ["nowhere", "no such model"]),
    "missing data": (["data.train=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    "not key=value": (["steps"], ["'steps'", "key=value"]),
    "rows too long": (["data.sequence_length=1000"], ["1000", "512 positions"]),
    "missing pool": (["pool=nowhere.yaml"], ["nowhere.yaml", "no such file"]),
    "no weights": (["model=./hollow"], ["hollow", "model.safetensors"]),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run(folder: Path, name: str) -> None:
    overrides, wanted = BAD_RUNS[name]
    (folder / "hollow").mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "hollow" / file).symlink_to(folder / "model" / file)
    result = run_here(folder, "train", "run.yaml", "--plan", "one.json", *overrides)
    assert_one_line(result, *wanted)
    assert not (folder / "out" / "metrics.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_named_with_its_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = run_here(folder, "train", "run.yaml", "--plan", "one.json", "report_to=tensorboard")
    assert_one_line(result, "pip install 'colledge[tensorboard]'")


def test_a_folder_in_use_is_left_alone(folder: Path) -> None:
    with OutputFolder(folder / "out").locked():
        result = run_here(folder, "train", "run.yaml", "--plan", "one.json")
    assert_one_line(result, "in use by another run")
    assert [path.name for path in (folder / "out").iterdir()] == [".lock"]


def test_an_earlier_checkpoint_is_not_hidden(folder: Path) -> None:
    (folder / "out" / "checkpoint-7").mkdir(parents=True)
    result = run_here(folder, "train", "run.yaml", "--plan", "one.json")
    assert_one_line(result, "checkpoint-7", "--resume auto")


BAD_DATA = {
    "empty": ("", ["corpus-bad.jsonl", "holds no text"]),
    "not JSON": ('{"text": "a"}\n{"text": \n', ["corpus-bad.jsonl, line 2", "not JSON"]),
    "missing key": ('{"txt": "a"}\n', ["line 1", "'text'", "'txt'"]),
    "wrong type": ('{"text": 3}\n', ["line 1", "'text'", "int"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(folder: Path, name: str) -> None:
    content, wanted = BAD_DATA[name]
    (folder / "corpus-bad.jsonl").write_text(content)
    arguments = ["train", "run.yaml", "--plan", "one.json", "data.train=corpus-bad.jsonl"]
    result = run_here(folder, *arguments)
    assert_one_line(result, *wanted)


def test_port_taken(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (folder / "pool.yaml").unlink()
        (folder / "pool.yaml").write_text(f"coordinator: {{port: {port}}}\n{POOL}")
        result = run_here(folder, "train", "run.yaml", "--plan", "one.json")
    assert_one_line(result, str(port), "coordinator.port")
    assert not processes_of(folder)


def test_plan_without_memory_names_device_and_bytes(folder: Path) -> None:
    out = folder / "out"
    out.mkdir()
    layers = [
        {
            "name": name,
            "kind": kind,
            "parameter_bytes": 10**9,
            "trainable_parameter_bytes": 10**9,
            "output_bytes_per_sample": 1000,
            "saved_bytes_per_sample": 1000,
            "forward_flops_per_sample": 1,
            "backward_flops_per_sample": 2,
            "tensor": None,
            "tied_to": None,
        }
        for name, kind in [
            ("embedding", "embedding"),
            *[(f"block.{i}", "block") for i in range(3)],
            ("head", "head"),
        ]
    ]
    (out / "model-profile.json").write_text(
        json.dumps(
            {"schema": "colledge/model-profile/1", "name": "big", "sequence_length": 32, "layers": layers}
        )
    )
    mode = {"name": "default", "idle_w": 1, "compute_w": 2, "communicate_w": 1, "source": "declared"}
    devices = [
        {"id": id, "kind": "k", "memory_bytes": 2 * 10**9, "modes": [mode]} for id in ("desk", "lap", "pi")
    ]
    (out / "pool-profile.json").write_text(
        json.dumps({"schema": "colledge/pool-profile/1", "devices": devices})
    )
    result = run_here(folder, "train", "run.yaml", "--plan", "one.json")
    assert result.returncode == 3
    assert_one_line(result, "'desk'", "20", "2 GB")


# -- profile, plan and report --------------------------------------------------------------------------------------


def test_demo_profiles_plans_trains_and_reports(tmp_path: Path) -> None:
    result = forked_colledge(tmp_path, "demo", "--steps", "12", "--output", "demo", timeout_s=170)
    assert result.returncode == 0, result.stderr
    for word in ("family", "pipeline", "single", "Chosen for least energy", "predicted", "report:"):
        assert word in result.stdout
    assert not processes_of(tmp_path)
    out = tmp_path / "demo" / "out"
    report = read_json(Report, out / "report.json")
    assert report.final_loss < report.first_loss
    assert report.prediction is not None
    assert set(report.prediction.devices) == set(report.measured.devices) == {"desktop", "laptop", "pi"}
    assert report.bounds is not None
    assert report.bounds.step_s is not None
    assert report.bounds.step_s <= report.prediction.step_s
    assert {"single", "data", "pipeline", "tensor"} <= set(report.families)

    printed = run_here(tmp_path, "report", str(out), "--json")
    assert json.loads(printed.stdout)["measured"]["step_s"] == report.measured.step_s
    profiles = [
        "--pool-profile",
        str(out / "pool-profile.json"),
        "--model-profile",
        str(out / "model-profile.json"),
    ]
    planned = run_here(
        tmp_path, "plan", *profiles, "--global-batch-size", "8", "--objective", "time", "--json"
    )
    answer = json.loads(planned.stdout)
    assert set(answer) >= {"plan", "families", "frontier", "bounds", "planning_s"}
    assert answer["plan"]["prediction"]["step_s"] <= report.prediction.step_s + 1e-9


def test_init_writes_files_that_load(tmp_path: Path) -> None:
    assert colledge(tmp_path, "init").returncode == 0
    assert load_run(tmp_path / "run.yaml").batch.global_size == 16
    assert load_pool(tmp_path / "pool.yaml").devices[0].host == "local"
    again = run_here(tmp_path, "init")
    assert_one_line(again, "is there already")
