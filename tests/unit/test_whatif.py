"""What-if pools, the command line's what-if options, and the advice on single changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from colledge.errors import ConfigError
from colledge.launch import cli
from colledge.planner import PlanningRequest, PoolCosts, plan_training
from colledge.planner.advise import advise
from colledge.planner.whatif import (
    add_devices,
    apply_changes,
    cable_segment,
    cable_slow_links,
    fix_mode,
    remove_devices,
    set_bandwidth,
)
from colledge.profiles import PoolProfile
from colledge.profiles.catalog import catalog_device
from colledge.units import parse_bytes, parse_grams_per_kwh, parse_price_per_kwh, parse_seconds
from tests.unit.test_planner import MB, make_model, make_pool, two_modes

# -- pools ---------------------------------------------------------------------------------------------------


def test_removed_devices_take_their_links_and_segments_along() -> None:
    pool = make_pool(["k", "k", "k"])
    left = remove_devices(pool, ["b"]).pool
    assert [device.id for device in left.devices] == ["a", "c"]
    assert [(link.source, link.target) for link in left.links] == [("a", "c")]
    air = make_pool(["k", "k", "k"], segment=True)
    assert remove_devices(air, ["b"]).pool.segments[0].devices == ("a", "c")
    assert remove_devices(air, ["b", "c"]).pool.segments == ()
    with pytest.raises(ConfigError, match="'zz' is not in the pool"):
        remove_devices(pool, ["zz"])
    with pytest.raises(ConfigError, match="leaves no device"):
        remove_devices(pool, ["a", "b", "c"])


def test_a_changed_pool_forgets_the_routes_that_were_looked_up() -> None:
    pool = make_pool(["k", "k", "k"])
    pool.route("a", "b"), pool.device("b")
    left = remove_devices(pool, ["b"]).pool
    with pytest.raises(ConfigError, match="not in the pool"):
        left.device("b")
    faster = set_bandwidth(pool, "a->b", 7 * MB).pool
    assert faster.route("a", "b").bandwidth_bytes_per_s == 7 * MB
    assert pool.route("a", "b").bandwidth_bytes_per_s == 100 * MB


def test_added_devices_join_the_first_segment_or_get_the_median_link() -> None:
    template = make_pool(["k"]).devices[0]
    air = add_devices(make_pool(["k", "k"], segment=True), template, 2)
    assert [device.id for device in air.pool.devices] == ["a", "b", "k-1", "k-2"]
    assert air.pool.segments[0].devices == ("a", "b", "k-1", "k-2")
    assert "join segment 'air'" in air.notes[0]
    again = add_devices(air.pool, template, 1).pool
    assert again.devices[-1].id == "k-3"
    wired = add_devices(make_pool(["k", "k", "k"], bandwidth=5 * MB, latency_s=2e-3), template, 2)
    for source in ("k-1", "k-2"):
        for target in {"a", "b", "c", "k-1", "k-2"} - {source}:
            for one, two in ((source, target), (target, source)):
                assert wired.pool.route(one, two).bandwidth_bytes_per_s == 5 * MB
                assert wired.pool.route(one, two).latency_s == 2e-3
    assert "median link (5 MB/s, 2 ms)" in wired.notes[0]
    alone = add_devices(make_pool(["k"]), template)
    assert alone.pool.route("a", "k-1").bandwidth_bytes_per_s == 125 * MB
    assert "a cable" in alone.notes[0]


def test_bandwidth_of_a_segment_and_of_a_link() -> None:
    air = make_pool(["k", "k", "k"], segment=True)
    assert set_bandwidth(air, "air", 3 * MB).pool.route("a", "c").bandwidth_bytes_per_s == 3 * MB
    own = set_bandwidth(air, "a->c", 9 * MB)
    assert own.pool.route("c", "a").bandwidth_bytes_per_s == 9 * MB
    assert own.pool.route("a", "b").bandwidth_bytes_per_s == 100 * MB
    assert "a link of their own, both ways" in own.notes[0]
    wired = make_pool(["k", "k"])  # given a->b only, which serves both ways
    back = set_bandwidth(wired, "b -> a", 9 * MB).pool
    assert back.route("b", "a").bandwidth_bytes_per_s == 9 * MB
    assert back.route("a", "b").bandwidth_bytes_per_s == 100 * MB
    for name, match in (("water", "no segment 'water'"), ("a->zz", "'zz'"), ("a->a", "to itself")):
        with pytest.raises(ConfigError, match=match):
            set_bandwidth(air, name, 1.0)
    with pytest.raises(ConfigError, match="wanted more than 0"):
        set_bandwidth(air, "air", 0.0)


def test_cables_and_modes() -> None:
    air = make_pool(["k", "k", "k"], bandwidth=5 * MB, segment=True)
    cabled = cable_segment(air, "air").pool
    assert not cabled.segments
    assert cabled.route("c", "a").bandwidth_bytes_per_s == 125 * MB
    assert cabled.route("c", "a").medium != cabled.route("a", "c").medium
    crowd = make_pool(["k"] * 60, ids=[f"d{i}" for i in range(60)], bandwidth=5 * MB, segment=True)
    wired = cable_segment(crowd, "air")
    assert wired.pool.segments[0].bandwidth_bytes_per_s == 125 * MB
    assert wired.notes
    slow = cable_slow_links(make_pool(["k", "k"], bandwidth=5 * MB)).pool
    assert slow.links[0].bandwidth_bytes_per_s == 125 * MB
    fast = make_pool(["k", "k"], bandwidth=5000 * MB)
    assert cable_slow_links(fast).pool == fast
    pool, _ = two_modes(make_pool(["k"]), make_model({"k": 0.1}))
    assert [mode.name for mode in fix_mode(pool, "a", "low").pool.devices[0].modes] == ["low"]
    with pytest.raises(ConfigError, match="no power mode 'turbo'"):
        fix_mode(pool, "a", "turbo")


def test_changes_are_applied_in_order() -> None:
    template = make_pool(["k"]).devices[0]
    pool = make_pool(["k", "k"], segment=True)
    changed = apply_changes(
        pool,
        [
            lambda pool: remove_devices(pool, ["b"]),
            lambda pool: add_devices(pool, template),
            lambda pool: set_bandwidth(pool, "a->k-1", 3 * MB),
        ],
    )
    assert changed.pool.route("a", "k-1").bandwidth_bytes_per_s == 3 * MB
    assert len(changed.notes) == 1


def test_an_added_kind_is_timed_by_its_timings_or_its_rates() -> None:
    model = make_model({"k": 0.1})
    orin = catalog_device("jetson-orin-nano").profile("x")
    pool = add_devices(make_pool(["k", "k"]), orin).pool
    costs = PoolCosts(pool, model)
    plan = plan_training(
        pool, model, PlanningRequest(global_batch_size=4, must_use=("jetson-orin-nano-1",))
    ).best
    assert "jetson-orin-nano-1" in plan.devices
    rates = orin.modes[0].achieved_flops_per_s
    assert rates is not None
    assert costs.layer_s("jetson-orin-nano-1", None, 1, 1, 1.0) >= 3e9 / rates * 0.99
    timed = make_model({"k": 0.1, "jetson-orin-nano": 7.0})
    mode = timed.timings[0].model_copy(update={"mode": orin.modes[0].name})
    rows = tuple(
        row.model_copy(update={"mode": mode.mode}) for row in timed.timings if row.device_kind != "k"
    )
    measured = timed.model_copy(update={"timings": (*model.timings, *rows)})
    assert PoolCosts(pool, measured).layer_s("jetson-orin-nano-1", None, 1, 1, 1.0) == pytest.approx(21.0)


# -- units ---------------------------------------------------------------------------------------------------


def test_prices_and_grams() -> None:
    assert parse_price_per_kwh("0.30/kWh") == 0.30
    assert parse_price_per_kwh("300 /MWh") == pytest.approx(0.3)
    assert parse_price_per_kwh(0.25) == 0.25
    assert parse_grams_per_kwh("350g/kWh") == 350
    assert parse_grams_per_kwh("0.35 kg/kWh") == pytest.approx(350)
    for parse in (parse_price_per_kwh, parse_grams_per_kwh):
        for text in ("cheap", "-1", "0.3 EUR", "nan", "1e999", True, None):
            with pytest.raises(ValueError, match=r"must be|is not|infinite"):
                parse(text)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, "1e999 GB", "1e999"])
def test_quantities_that_are_no_number_are_refused(value: object) -> None:
    for parse in (parse_bytes, parse_seconds):
        with pytest.raises(ValueError, match=r"infinite|is not"):
            parse(value)


# -- advice --------------------------------------------------------------------------------------------------


def test_advice_finds_the_slow_network() -> None:
    model = make_model({"k": 0.05})
    pool = make_pool(["k", "k"], bandwidth=0.2 * MB, segment=True)
    advice = advise(pool, model, PlanningRequest(global_batch_size=8, objective="time"))
    assert advice.best_for_time == "cables of 1 Gbit/s instead of air"
    best = advice.changes[0]
    assert best.change == advice.best_for_time
    assert best.time_gain is not None
    assert best.time_gain > 0.3
    assert advice.now.time_gain is None


def test_advice_switches_off_what_only_idles() -> None:
    model = make_model({"k": 0.05, "furnace": 1.0})
    pool = make_pool(["k", "furnace"], watts=[(2, 10, 3), (200, 400, 200)])
    advice = advise(pool, model, PlanningRequest(global_batch_size=8))
    assert advice.best_for_energy == "b switched off"
    gain = next(change.energy_gain for change in advice.changes if change.change == "b switched off")
    assert gain is not None
    assert gain > 0.8


def test_advice_is_bounded_and_says_what_was_left_out() -> None:
    pool, model = two_modes(make_pool(["k", "k", "k"], segment=True), make_model({"k": 0.05}))
    catalog = [catalog_device(kind).profile(kind) for kind in ("jetson-nano", "raspberry-pi-5")]
    request = PlanningRequest(global_batch_size=4)
    everything = advise(pool, model, request, catalog)
    names = {change.change for change in everything.changes}
    assert {"one more k", "add a jetson-nano (catalog)", "a always in mode low"} <= names
    assert "b switched off (one of 2 alike)" in names
    few = advise(pool, model, request, catalog, most_changes=2)
    assert len(few.changes) == 2
    assert any("were not tried" in note for note in few.notes)


def test_another_device_is_never_shown_as_a_loss_where_it_may_be_left_off() -> None:
    model = make_model({"p": 0.05, "q": 0.08, "r": 0.02}, num_blocks=3)
    pool = make_pool(["p", "q", "r"], watts=[(1, 12, 3), (2, 8, 3), (4, 45, 8)], segment=True)
    request = PlanningRequest(global_batch_size=6, accounting="marginal")
    advice = advise(pool, model, request, most_changes=3)
    assert [change.change for change in advice.changes if change.change.startswith("one more")]
    for change in advice.changes:
        assert change.energy_gain is not None
        assert change.energy_gain >= -1e-9


def test_advice_where_nothing_fits_names_what_makes_it_fit() -> None:
    model = make_model({"k": 0.05})
    pool = make_pool(["k"], memory_bytes=100 * MB)
    advice = advise(pool, model, PlanningRequest(global_batch_size=4))
    assert advice.now.step_s is None
    assert "no plan fits in memory" in advice.now.why_not
    assert advice.best_for_energy == "one more k"
    assert advice.changes[0].energy_gain is None


# -- command line --------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    pool = make_pool(["k", "slow"], bandwidth=20 * MB, segment=True)
    model = make_model({"k": 0.05, "slow": 0.1})
    (tmp_path / "pool.json").write_text(pool.to_json())
    (tmp_path / "model.json").write_text(model.to_json())
    return [
        "plan",
        f"--pool-profile={tmp_path / 'pool.json'}",
        f"--model-profile={tmp_path / 'model.json'}",
        "--global-batch-size=8",
    ]


class Cli:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["colledge", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = self.capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


def test_plan_without_a_device_and_with_bought_ones(files: list[str], run: Cli, tmp_path: Path) -> None:
    code, out, err = run(*files, "--without", "b", "--json")
    assert code == 0, err
    assert set(json.loads(out)["plan"]["prediction"]["devices"]) == {"a"}
    code, out, err = run(*files, "--with", "catalog:jetson-orin-nano:2", "--with", "pool:slow", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert set(values["plan"]["prediction"]["devices"]) == {
        "a", "b", "jetson-orin-nano-1", "jetson-orin-nano-2", "slow-1",
    }  # fmt: skip
    assert "jetson-orin-nano-1, jetson-orin-nano-2: assumed to join segment 'air'." in values["notes"]
    code, out, err = run(
        *files, "--with=catalog:jetson-orin-nano", "--bandwidth=air=1 Gbit/s", f"-o{tmp_path}"
    )
    assert code == 0, err
    assert "assumed to join segment 'air'" in out
    assert (tmp_path / "plan.json").is_file()


def test_constraints_and_accounting_on_the_command_line(files: list[str], run: Cli) -> None:
    def plan(*options: str) -> dict[str, Any]:
        code, out, err = run(*files, *options, "--json")
        assert code == 0, err
        return dict(json.loads(out)["plan"])

    def devices(plan: dict[str, Any]) -> set[str]:
        return {h["device"] for s in plan["stages"] for r in s["replicas"] for h in r["shards"]}

    assert devices(plan("--must-use=b")) >= {"b"}
    assert devices(plan("--without=b")) == {"a"}
    whole, marginal = plan(), plan("--accounting=marginal")
    for key in ("energy_joules_per_step", "marginal_energy_joules_per_step"):
        best = marginal if key.startswith("marginal") else whole
        assert best["prediction"][key] == min(p["prediction"][key] for p in (whole, marginal))
    assert plan("--switch-modes")["prediction"]["step_s"] == whole["prediction"]["step_s"]  # one mode only
    code, _, err = run(*files, "--accounting=free")
    assert code == 2
    assert "accounting" in err
    assert "whole-pool" in err
    code, _, err = run(*files, "--must-use=nobody")
    assert code == 2
    assert "'nobody' is not in the pool" in err


def test_what_travels_between_stages_can_be_rounded(files: list[str], run: Cli, tmp_path: Path) -> None:
    both = ("--must-use=a", "--must-use=b", "--json")
    code, out, err = run(*files, *both, "--wire-precision=bfloat16")
    assert (code, out) == (2, "")
    assert "does not say in which precision it computes. Fix: " in err
    assert err.count("\n") == 1
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "float32"}))
    plans = []
    for option in ([], ["--wire-precision=bfloat16"]):
        code, out, err = run(*files, *both, "--objective=time", "--bandwidth=air=5 Mbit/s", *option)
        assert code == 0, err
        plans.append(json.loads(out)["families"]["pipeline"])
    exact, rounded = plans
    assert "wire_precision" not in exact
    assert rounded["wire_precision"] == "bfloat16"
    assert rounded["prediction"]["step_s"] < exact["prediction"]["step_s"]
    code, _, err = run(*files, "--wire-precision=float16")
    assert code == 2
    assert "wire_precision" in err
    code, _, err = run("plan", "run.yaml", "--wire-precision=bfloat16")
    assert code == 2
    assert "options that belong to profiles" in err


def test_deadlines_prices_and_carbon(files: list[str], run: Cli) -> None:
    code, out, err = run(*files, "--electricity", "0.30/kWh", "--carbon", "350g/kWh", "--json")
    assert code == 0, err
    values = json.loads(out)
    joules = 1000 * values["plan"]["prediction"]["energy_joules_per_step"]
    costs = values["running_costs"]
    assert costs["steps"] == 1000
    assert costs["joules"] == pytest.approx(joules)
    assert costs["price"] == pytest.approx(joules / 3.6e6 * 0.30)
    assert costs["carbon_grams"] == pytest.approx(joules / 3.6e6 * 350)
    code, out, _ = run(*files, "--electricity=0.30/kWh", "--steps=50", "--deadline=8h")
    assert code == 0
    assert "50 steps take" in out
    step_s = values["plan"]["prediction"]["step_s"]
    code, out, err = run(*files, f"--deadline-step={step_s * 0.9}s", "--json")
    assert code == 0, err
    assert json.loads(out)["plan"]["prediction"]["step_s"] <= step_s * 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--without", "zz"], "'zz' is not in the pool"),
        (["--without", "a", "--without", "b"], "leaves no device"),
        (["--with", "catalog:jetson-orin-nana"], "did you mean 'jetson-orin-nano'?"),
        (["--with", "jetson-orin-nano"], "write catalog:KIND:COUNT"),
        (["--with", "catalog:jetson-orin-nano:0"], "write catalog:KIND:COUNT"),
        (["--with", "catalog:jetson-orin-nano:"], "write catalog:KIND:COUNT"),
        (["--with", "catalog:jetson-orin-nano:99999"], "write catalog:KIND:COUNT"),
        (["--with", "pool:zz"], "no device of kind 'zz'"),
        (["--bandwidth", "air"], "has no '='"),
        (["--bandwidth", "air=1 Gbit/s", "--bandwidth", "air=2 Gbit/s"], "gives 'air' twice"),
        (["--bandwidth", "air=fast"], "--bandwidth: 'fast' is not a rate"),
        (["--bandwidth", "air=0"], "wanted more than 0"),
        (["--bandwidth", "water=1 Gbit/s"], "no segment 'water'"),
        (["--deadline", "8h"], "its steps are not known"),
        (["--deadline", "0", "--steps", "3"], "a deadline is 0 s"),
        (["--deadline-step", "soon"], "--deadline-step: 'soon' is not a duration"),
        (["--deadline-step", "1e-9"], "a step is impossible"),
        (["--electricity", "0.30 EUR"], "--electricity:"),
        (["--carbon", "1e999"], "--carbon:"),
    ],
)
def test_faults_of_the_options_are_one_line(
    files: list[str], run: Cli, options: list[str], message: str
) -> None:
    code, out, err = run(*files, *options)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("colledge: ")
    assert " Fix: " in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_keeps_its_plan_when_asked_what_if(files: list[str], run: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "pool.json").rename(out / "pool-profile.json")
    (tmp_path / "model.json").rename(out / "model-profile.json")
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: some/model\ndata: {train: x.txt}\npool: pool.yaml\nsteps: 50\nbatch: {global_size: 4}\n"
    )
    code, text, err = run("plan", str(file), "--without=b", "--deadline=8h", "--json")
    assert code == 0, err
    assert json.loads(text)["running_costs"]["steps"] == 50
    assert sorted(path.name for path in out.iterdir()) == ["model-profile.json", "pool-profile.json"]
    for options in (["--electricity=0.3/kWh"], ["--steps=9"]):
        assert run("plan", str(file), *options)[0] == 0
        assert not (out / "plan.json").exists()
    assert run("plan", str(file))[0] == 0
    assert (out / "plan.json").is_file()
    (tmp_path / "pool.yaml").write_text("devices:\n  - {id: a}\n  - {id: c}\n")
    code, _, err = run("plan", str(file))
    assert code == 2
    assert "are not of this run: they have the devices a, b; " in err
    (tmp_path / "pool.yaml").write_text("devices:\n  - {id: b}\n  - {id: a}\n")
    file = file.rename(tmp_path / "my run.yaml")
    code, _, err = run("plan", str(file))
    assert code == 2
    assert "their rows have 8 tokens, the run's 512" in err
    assert f"run `colledge profile '{tmp_path}/my run.yaml'` again." in err
    assert run("plan", str(file), "data.sequence_length=8")[0] == 0
    model = out / "model-profile.json"
    model.write_text(json.dumps({**json.loads(model.read_text()), "precision": "float32"}))
    assert run("plan", str(file), "data.sequence_length=8")[0] == 0
    code, _, err = run("plan", str(file), "data.sequence_length=8", "precision=float64")
    assert code == 2
    assert "they are of float32, the run trains in float64" in err


def test_advice_on_the_command_line(files: list[str], run: Cli) -> None:
    code, out, err = run(*files, "--advise")
    assert code == 0, err
    assert "the pool as it is" in out
    assert "Best for time: " in out
    assert "1,000 steps" not in out
    code, out, err = run(*files, "--advise", "--electricity", "0.3/kWh", "--steps", "2000")
    assert code == 0, err
    assert "2,000 steps" in out
    assert "costing " in out
    code, out, err = run(*files, "--advise", "--json", "--without", "b")
    assert code == 0, err
    values = json.loads(out)
    assert {"now", "changes", "notes"} <= set(values)
    assert "one more k" in {change["change"] for change in values["changes"]}


def test_a_pool_read_back_is_the_pool_written(files: list[str]) -> None:
    pool = add_devices(make_pool(["k", "k"]), catalog_device("jetson-nano").profile("x"), 3).pool
    assert PoolProfile.model_validate_json(pool.to_json()) == pool
