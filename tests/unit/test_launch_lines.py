"""The lines that start a run's processes, here and on other machines."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from colledge.errors import ConfigError
from colledge.launch import rendezvous
from colledge.launch.job import Job
from colledge.launch.rendezvous import Agent, plan_agents
from colledge.launch.run_config import DataConfig, PoolConfig, RunConfig, load_pool


def agents_of(coordinator: str, **host: str) -> list[Agent]:
    pool = PoolConfig.model_validate(
        {"coordinator": {"address": coordinator}, "devices": [{"id": "a"}, {"id": "b", **host}]}
    )
    run = RunConfig(model="m", data=DataConfig(train=(Path("d"),)), pool=Path("pool.yaml"))
    job = Job(kind="train", run=run, pool=pool, model=Path("m"), devices=("a", "b"), output=Path("out"))
    return plan_agents(job, 29500)


@pytest.mark.parametrize("pet", [{}, {"PET_NNODES": "4", "PET_RDZV_CONF": "a=1,b=two words", "PET_TEE": "3"}])
def test_a_printed_line_drops_torchruns_variables_in_any_shell(pet: dict[str, str]) -> None:
    line = Agent("a", "far", {"OMP_NUM_THREADS": "2"}, ("env",)).line()
    surroundings = {"PATH": "/usr/bin:/bin", "KEPT": "x", **pet}
    printed = subprocess.run(["sh", "-c", line], env=surroundings, capture_output=True, text=True, check=True)
    names = {text.partition("=")[0] for text in printed.stdout.splitlines()}
    assert not pet.keys() & names
    assert {"KEPT", "OMP_NUM_THREADS"} <= names


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "localhost", "::1", "::ffff:127.0.0.1"],
)
def test_a_coordinator_that_others_cannot_reach_is_refused(address: str) -> None:
    assert len(agents_of(address)) == 3  # devices of this machine can
    with pytest.raises(ConfigError) as fault:
        agents_of(address, host="192.0.2.7")
    assert f"'b' is on another machine and cannot reach the coordinator at {address}" in str(fault.value)
    assert "set coordinator.address" in fault.value.fix


def test_a_name_goes_as_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"desk.lan": "192.0.2.1", "pi.lan": "192.0.2.7", "here.lan": "127.0.1.1"}

    def look_up(host: str) -> str | None:
        return known.get(host, host if host[0].isdigit() else None)

    monkeypatch.setattr(rendezvous, "_look_up", look_up)
    *_, far = agents_of("192.0.2.1", host="me@pi.lan")
    assert "--local-addr=192.0.2.7" in far.command
    with pytest.raises(ConfigError, match=r"'here.lan' is this machine"):
        agents_of("192.0.2.1", host="here.lan")
    with pytest.raises(ConfigError, match=r"'gone.lan' is no address"):
        agents_of("192.0.2.1", host="gone.lan")
    with pytest.raises(ConfigError, match=r"coordinator at here.lan"):
        agents_of("here.lan", host="192.0.2.7")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("coordinator: {address: 'pi@192.0.2.1'}", "coordinator.address"),
        ("coordinator: {address: '192.0.2.1:29500'}", "coordinator.address"),
        ("coordinator: {address: '[2001:db8::1]'}", "coordinator.address"),
        ("coordinator: {address: '192.0.2.300'}", "coordinator.address"),
        ("coordinator: {address: ''}", "coordinator.address"),
        ("coordinator: {port: 0}", "coordinator.port"),
        ("coordinator: {port: 65536}", "coordinator.port"),
        ("host: 'a b'", "host"),
        ("host: '@192.0.2.1'", "host"),
        ("host: 'pi@192.0.2.1:22'", "host"),
        ("host: 'ssh://192.0.2.1'", "host"),
        ("host: '-oProxyCommand=x'", "host"),
    ],
)
def test_what_is_no_address_is_refused_at_its_key(tmp_path: Path, text: str, key: str) -> None:
    device, more = (f", {text}", "") if text.startswith("host") else ("", text)
    path = tmp_path / "pool.yaml"
    path.write_text(f"{more}\ndevices: [{{id: a{device}}}]")
    with pytest.raises(ConfigError, match=key):
        load_pool(path)
