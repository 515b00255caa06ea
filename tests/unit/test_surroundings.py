"""What a machine does to a run: its terminal, its environment, its memory limits, other people's code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from colledge.errors import ConfigError, ModelError
from colledge.launch.cli import main
from colledge.launch.job import Launch
from colledge.launch.rendezvous import _inherited, plan_agents
from colledge.launch.run_config import PoolConfig, load_run
from colledge.measure.memory import cgroup_limits
from colledge.models import HuggingFaceCausalLM


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_command_dies_of_what_its_terminal_cannot_write(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "苔 → é"}, ensure_ascii=False) + "\n{}\n潮\n", encoding="utf-8")
    arguments = ["colledge", "data", "check", str(path)]
    program = f"import sys; from colledge.launch.cli import main; sys.argv = {arguments}; main()"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert b"Traceback" not in ended.stderr
    assert ended.returncode == 2
    assert b"line 3: not JSON" in ended.stdout


def test_what_other_launchers_left_in_the_environment_reaches_no_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "PET_NNODES",
        "PET_RDZV_BACKEND",
        "TORCHELASTIC_RUN_ID",
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
    ):
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("HF_HOME", "/kept")
    kept = _inherited()
    assert kept["HF_HOME"] == "/kept"
    assert not [
        name
        for name in kept
        if name.startswith(("PET_", "TORCHELASTIC_", "MASTER_")) or name.endswith("RANK")
    ]


def launch(host: str, address: str, tmp_path: Path) -> Launch:
    pool = PoolConfig.model_validate(
        {
            "schema": "colledge/pool/1",
            "coordinator": {"address": address},
            "devices": [{"id": "a"}, {"id": "b", "host": host}],
        }
    )
    return Launch(kind="train", pool=pool, devices=("a", "b"), output=tmp_path)


def test_lines_for_other_machines_hold_addresses_that_can_be_called(tmp_path: Path) -> None:
    agents = plan_agents(launch("pi@192.168.77.7", "192.168.77.1", tmp_path), 29512)
    assert "--local-addr=192.168.77.7" in agents[2].command
    assert all("pi@" not in part for part in agents[2].command)
    assert agents[2].host == "pi@192.168.77.7"  # for ssh
    six = plan_agents(launch("fd00::7", "fd00::1", tmp_path), 29512)
    assert "--local-addr=fd00::7" in six[2].command


@pytest.mark.parametrize(
    ("host", "address", "said"),
    [
        ("192.168.77.7", "0.0.0.0", "0.0.0.0, which no device can call"),
        ("192.168.77.7", "::", "::, which no device can call"),
        ("local", "0.0.0.0", "0.0.0.0, which no device can call"),
        ("192.168.77.7", "127.0.0.1", "cannot reach the coordinator at 127.0.0.1"),
        ("127.0.0.1", "192.168.77.1", "host '127.0.0.1' is this machine"),
        ("no.such.host.invalid", "192.168.77.1", "'no.such.host.invalid' is no address"),
    ],
)
def test_addresses_that_cannot_work_are_refused(host: str, address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_agents(launch(host, address, tmp_path), 29512)


@pytest.mark.parametrize("seed", [2**63, 20_000_000_000_000_000_000, -1])
def test_seeds_that_no_generator_takes_are_refused_at_their_key(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    run = {"model": "m", "data": {"train": "a.jsonl"}, "pool": "pool.yaml", "seed": seed}
    path.write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="seed"):
        load_run(path)
    path.write_text(json.dumps({**run, "seed": 2**63 - 1}))
    torch.Generator().manual_seed(load_run(path).seed)


def group(folder: Path, limit: str, used: int, idle: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    most, usage, stat = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    (folder / most).write_text(limit)
    (folder / usage).write_text(str(used))
    (folder / "memory.stat").write_text(f"cache 5\n{stat} {idle}\n")


def test_limits_of_all_control_groups_above_count_and_what_they_use(tmp_path: Path) -> None:
    for version, top, line in (
        (2, tmp_path / "v2", "0::/user/job"),
        (1, tmp_path / "v1", "4:cpu,memory:/user/job"),
    ):
        place = top / "memory" if version == 1 else top
        group(place, "max", 0, 0, version)
        group(place / "user", "1000", 700, 100, version)
        group(place / "user" / "job", "2000", 50, 0, version)
        assert cgroup_limits(f"1:name=systemd:/x\n{line}\n", top) == [(2000, 1950), (1000, 400)]
    (tmp_path / "v2" / "user" / "memory.high").write_text("900")
    assert (900, 300) in cgroup_limits("0::/user/job", tmp_path / "v2")
    group(tmp_path / "v2", "500", 900, 0, 2)  # already above it
    assert cgroup_limits("0::/nowhere", tmp_path / "v2") == [(500, 0)]
    assert cgroup_limits("", tmp_path) == []


CODE = """
open({ran!r}, "w").write("x")
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig): model_type = "mine"
class MineForCausalLM(LlamaForCausalLM): config_class = MineConfig
"""


def test_a_models_own_code_is_neither_run_nor_asked_about(tmp_path: Path, capsys: Any) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "modeling_mine.py").write_text(CODE.format(ran=str(ran)))
    names = {
        "AutoConfig": "modeling_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    with pytest.raises(ModelError, match="'mine' comes with code of its own, which is not run"):
        HuggingFaceCausalLM.from_directory(tmp_path)
    assert not ran.exists()
    assert "Do you wish" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}},
        ),
        (
            "config.json",
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
        ),
        ("config.json", {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "mine.M"}}),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "model", "--prompt", "a"],
        ["data", "check", "data.jsonl", "--model", "model"],
        ["profile", "--model", "model", "--analytic", "-o", "profiles"],
    ],
)
def test_no_command_asks_about_a_folders_code_or_runs_it(
    file: str,
    changes: dict[str, Any],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').write('x')")
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(["a text"], vocab_size=260, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="a").save_pretrained(folder)
    LlamaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        folder
    )
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["colledge", *command])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert not ran.exists()
    assert "Do you wish" not in said.out + said.err
    assert "trust_remote_code" not in said.err
    reads = (
        file == "config.json"
        if command[0] == "profile"
        else file == "tokenizer_config.json" or command[0] == "generate"
    )
    if reads:
        assert ended.value.code == 2
    if reads and changes.get("model_type") != "vit":
        assert "code of its own, which is not run" in said.err
