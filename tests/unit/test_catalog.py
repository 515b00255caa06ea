"""The catalog: every figure has a source, bad entries are refused, and its devices make a pool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from colledge.errors import ConfigError
from colledge.launch.cli import main
from colledge.launch.run_config import PoolConfig, load_pool
from colledge.profiles.catalog import catalog_device, parse_catalog_device, read_catalog

KINDS = {
    "jetson-agx-orin", "jetson-agx-xavier", "jetson-nano", "jetson-orin-nano", "jetson-orin-nx", "jetson-tx2",
    "jetson-xavier-nx", "mac-mini-m1", "mac-mini-m4", "n100-mini-pc", "raspberry-pi-4", "raspberry-pi-5",
    "rtx-3060", "rtx-3090", "rtx-4060-laptop", "rtx-4090",
}  # fmt: skip

ENTRY = """
title: A board
memory_bytes: 8 GiB
usable_memory_bytes: 6 GiB
runtime_bytes: 500 MB
allocator_overhead: 0.2
default_mode: slow
modes:
  - {name: fast, idle_w: 2, compute_w: 20, communicate_w: 6, achieved_flops_per_s: 2e12, memory_bytes_per_s: 50 GB/s}
  - {name: slow, idle_w: 1, compute_w: 10, communicate_w: 3, achieved_flops_per_s: 1e12, memory_bytes_per_s: 40 GB/s}
sources:
  memory_bytes: "[S] its maker"
  usable_memory_bytes: "[D] three quarters"
  runtime_bytes: "[M] a guess"
  allocator_overhead: "[M] another guess"
  "modes.*.idle_w": "[S2] a forum"
  modes.fast.idle_w: "[S] a meter"
  "modes.*.compute_w": "[S] a meter"
  "modes.*.communicate_w": "[D] between idle_w and compute_w"
  "modes.*.achieved_flops_per_s": "[S] a benchmark"
  "modes.*.memory_bytes_per_s": "[S] a benchmark"
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["colledge", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0


def test_the_catalog_holds_every_device_with_the_source_of_every_figure() -> None:
    catalog = read_catalog()
    assert set(catalog) == KINDS
    for device in catalog.values():
        assert len(device.figures) == 4 + 5 * len(device.modes)
        for mode in device.modes:
            assert mode.idle_w < mode.communicate_w < mode.compute_w
        for figure in device.figures:
            assert figure.estimated == (not figure.source.startswith("[S] ")), (device.kind, figure)
            hearsay = any(f"[{tag}]" in figure.source for tag in ("S2", "M"))
            assert figure.estimated or not hearsay, (device.kind, figure)


def test_measured_products_are_not_marked_and_hobby_figures_are() -> None:
    orin = catalog_device("jetson-orin-nano")
    assert orin.mode("15W").achieved_flops_per_s == 801e9
    assert "modes.15W.achieved_flops_per_s" not in orin.estimated
    assert set(catalog_device("jetson-nano").estimated) == {
        f.path for f in catalog_device("jetson-nano").figures
    }


def test_a_figure_takes_its_own_source_before_that_of_all_modes() -> None:
    device = parse_catalog_device("board", ENTRY)
    sources = {figure.path: figure.source for figure in device.figures}
    assert sources["modes.fast.idle_w"] == "[S] a meter"
    assert sources["modes.slow.idle_w"] == "[S2] a forum"
    assert "modes.slow.idle_w" in device.estimated
    assert "modes.fast.idle_w" not in device.estimated


def test_a_device_of_the_catalog_puts_the_chosen_mode_first() -> None:
    device = parse_catalog_device("board", ENTRY)
    usual, chosen = device.profile("a"), device.profile("a", "fast")
    assert [mode.name for mode in usual.modes] == ["slow", "fast"]
    assert [mode.name for mode in chosen.modes] == ["fast", "slow"]
    assert (chosen.kind, chosen.memory_bytes, chosen.runtime_bytes) == ("board", 6 * 1024**3, 500_000_000)
    first = chosen.modes[0]
    assert (first.source, first.achieved_flops_per_s, first.memory_bytes_per_s) == ("catalog", 2e12, 50e9)


def test_an_unknown_kind_and_an_unknown_mode_list_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'jetson-orin'.*did you mean 'jetson-orin-n.*raspberry-pi-5"):
        catalog_device("jetson-orin")
    with pytest.raises(ConfigError, match=r"jetson-orin-nano has no power mode '10W'.*15W, 7W, 25W"):
        catalog_device("jetson-orin-nano").profile("a", "10W")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("achieved_flops_per_s: 2e12", "achieved_flops_per_s: .nan", ["modes[0].achieved_flops_per_s", "finite"]),
        ("achieved_flops_per_s: 2e12", "achieved_flops_per_s: .inf", ["modes[0].achieved_flops_per_s", "finite"]),
        ("achieved_flops_per_s: 2e12", "achieved_flops_per_s: -1e9", ["greater than 0", "-1e9"]),
        ("memory_bytes_per_s: 50 GB/s", "memory_bytes_per_s: 0", ["memory_bytes_per_s", "greater than 0"]),
        ("memory_bytes_per_s: 50 GB/s", "memory_bytes_per_s: 50 GB", ["50 GB", "GB/s"]),
        ("idle_w: 2,", "idle_w: -2,", ["idle_w", "greater than or equal to 0"]),
        ("compute_w: 20,", "compute_w: .nan,", ["compute_w", "finite"]),
        ("compute_w: 20,", "", ["compute_w", "missing"]),
        ("compute_w: 20,", "compute_w: 20, peak_w: 30,", ["unknown key", "peak_w"]),
        ("default_mode: slow", "default_mode: turbo", ["turbo", "fast, slow"]),
        ("name: fast", "name: slow", ["names must differ"]),
        ("usable_memory_bytes: 6 GiB", "usable_memory_bytes: 9 GiB", ["usable_memory_bytes <= memory_bytes"]),
        ('  runtime_bytes: "[M] a guess"\n', "", ["sources", "'runtime_bytes' has none"]),
        ("[M] a guess", "a guess", ["runtime_bytes", "[S2]", "a guess"]),
        ('modes.fast.idle_w: "', 'modes.turbo.idle_w: "', ["'modes.turbo.idle_w'", "no figure"]),
        ("title: A board", "title: [", ["not YAML"]),
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused_in_words(old: str, new: str, words: list[str]) -> None:
    assert ENTRY.count(old) == 1
    with pytest.raises(ConfigError) as error:
        parse_catalog_device("board", ENTRY.replace(old, new))
    for word in ["catalog entry board", *words]:
        assert word in str(error.value)


def test_the_command_lists_and_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "catalog", "list")
    listed = capsys.readouterr().out
    assert all(kind in listed for kind in KINDS)
    run(monkeypatch, "catalog", "show", "jetson-orin-nano")
    lines = capsys.readouterr().out.splitlines()
    (rate,) = [line for line in lines if "modes.15W.achieved_flops_per_s" in line]
    (idle,) = [line for line in lines if "modes.15W.idle_w" in line]
    assert "801 GFLOP/s" in rate
    assert "[S] branes-ai/graphs" in rate
    assert "estimated" not in rate
    assert "estimated" in idle
    run(monkeypatch, "catalog", "list", "--json")
    assert {entry["kind"] for entry in json.loads(capsys.readouterr().out)} == KINDS
    run(monkeypatch, "catalog", "show", "rtx-3060", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["modes"][0]["achieved_flops_per_s"] == 6.5e12
    assert "modes.default.achieved_flops_per_s" in shown["estimated"]


# -- a pool from the catalog -----------------------------------------------------------------------------------------

POOL = """
devices:
  - {id: orin-0, catalog: jetson-orin-nano, mode: 7W}
  - {id: pi, catalog: raspberry-pi-5, memory: 2 GB}
  - {id: mac, catalog: mac-mini-m4}
segments:
  - {name: wifi, devices: [orin-0, pi, mac], bandwidth: 50 Mbit/s, latency: 3 ms}
links:
  - {between: [orin-0, mac], bandwidth: 1 Gbit/s, latency: 0.3 ms}
"""


def pool(folder: Path, text: str) -> PoolConfig:
    path = folder / "pool.yaml"
    path.write_text(text)
    return load_pool(path)


def test_a_pool_from_the_catalog_has_its_devices_and_the_declared_links(tmp_path: Path) -> None:
    config = pool(tmp_path, POOL)
    assert config.is_catalog
    profile = config.catalog_profile()
    orin, pi, _ = profile.devices
    assert (orin.kind, orin.modes[0].name, orin.modes[0].source) == ("jetson-orin-nano", "7W", "catalog")
    assert pi.memory_bytes == 2_000_000_000
    cable, air = profile.route("mac", "orin-0"), profile.route("orin-0", "pi")
    assert (cable.bandwidth_bytes_per_s, cable.latency_s) == (125e6, pytest.approx(3e-4))
    assert (air.medium, air.bandwidth_bytes_per_s, air.latency_s) == ("wifi", 6.25e6, pytest.approx(3e-3))
    assert {one.provenance for one in (*profile.links, *profile.segments)} == {"declared"}
    assert PoolConfig.model_validate_json(config.to_json()) == config


def test_devices_that_nothing_joins_are_named(tmp_path: Path) -> None:
    values = yaml.safe_load(POOL)
    values["segments"][0]["devices"] = ["orin-0", "pi"]
    with pytest.raises(ConfigError, match="no link and no segment joins 'pi' and 'mac'"):
        pool(tmp_path, yaml.safe_dump(values)).catalog_profile().route("pi", "mac")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("catalog: mac-mini-m4", "catalog: mac-mini-m5", ["'mac-mini-m5'", "did you mean 'mac-mini-m4'"]),
        ("mode: 7W", "mode: 8W", ["jetson-orin-nano", "'8W'", "7W"]),
        ("mode: 7W", "speed: 3", ["'devices[0].speed'", "catalog"]),
        ("memory: 2 GB", "memory: 0 GB", ["memory", "greater than 0"]),
        ("memory: 2 GB", "threads: 4", ["devices[1]", "threads is for a real one"]),
        ("memory: 2 GB", "power: {idle_w: 1, compute_w: 2, communicate_w: 1}", ["power is for a real one"]),
        ("{id: mac, catalog: mac-mini-m4}", "{id: mac}", ["'orin-0' is from the catalog and 'mac' is not"]),
        ("{id: mac, catalog: mac-mini-m4}", "{id: mac, mode: fast}", ["mode is for a device with catalog"]),
        ("bandwidth: 1 Gbit/s", "bandwidth: 0", ["links[0].bandwidth", "greater than 0"]),
        ("bandwidth: 1 Gbit/s", "bandwidth: -1 Gbit/s", ["links[0].bandwidth", "-1 Gbit/s"]),
        ("bandwidth: 50 Mbit/s", "bandwidth: .nan", ["segments[0].bandwidth"]),
        ("latency: 0.3 ms", "latency: -1", ["links[0].latency", "greater than or equal to 0"]),
        ("[orin-0, mac]", "[orin-0, max]", ["links[0]", "'max'", "orin-0, pi, mac"]),
        ("[orin-0, mac]", "[mac, mac]", ["links[0]", "twice"]),
        ("[orin-0, pi, mac]", "[orin-0, pie]", ["segments[0]", "'pie'"]),
        (
            "links:\n",
            "links:\n  - {between: [mac, orin-0], bandwidth: 1 Gbit/s, latency: 1 ms}\n",
            ["joined twice"],
        ),
    ],
)
def test_a_bad_pool_from_the_catalog_is_refused_in_words(
    tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    assert POOL.count(old) == 1
    with pytest.raises(ConfigError) as error:
        pool(tmp_path, POOL.replace(old, new))
    for word in ["pool.yaml", *words]:
        assert word in str(error.value)


def test_links_of_real_devices_are_not_declared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="those of real ones are measured"):
        pool(
            tmp_path,
            "devices: [{id: a}, {id: b}]\nlinks: [{between: [a, b], bandwidth: 1 Gbit/s, latency: 1 ms}]",
        )
