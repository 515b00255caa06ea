"""Bad input: every fault is one clear line, through the command line too; fuzzed files crash no loader, no planner."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import colledge
from colledge.errors import ColledgeError
from colledge.launch import cli
from colledge.launch.cli import main
from colledge.launch.run_config import RunConfig, load_pool, load_run
from colledge.plan import Plan, read_plan
from colledge.planner import PlanningRequest, plan_training, predict
from colledge.planner.baselines import all_baselines
from colledge.planner.cost import PoolCosts
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import Record, parse_record, read_json
from tests.unit.test_planner import MB, make_model, make_pool

POOL: dict[str, Any] = json.loads(make_pool(["k", "slow", "k"]).to_json())
MODEL: dict[str, Any] = json.loads(make_model({"k": 0.05, "slow": 0.1}, tied=True).to_json())
PLAN: dict[str, Any] = {
    "schema": "colledge/plan/1",
    "num_layers": 4,
    "global_batch_size": 8,
    "microbatch_size": 4,
    "schedule": {"name": "1f1b", "warmup": [3, 1]},
    "stages": [
        {"layers": [0, 2], "replicas": [{"samples": 4, "shards": [{"device": "a"}]}]},
        {
            "layers": [2, 4],
            "replicas": [
                {
                    "samples": 4,
                    "shards": [{"device": "b", "fraction": 0.5}, {"device": "c", "fraction": 0.5}],
                }
            ],
        },
    ],
    "recompute": [False, True],
}
RUN: dict[str, Any] = {
    "schema": "colledge/run/1",
    "model": "some/model",
    "data": {"train": "train.txt", "sequence_length": 64},
    "batch": {"global_size": 8},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.99]},
    "steps": 10,
    "pool": "pool.yaml",
    "deadline": "8h",
}
POOL_YAML: dict[str, Any] = {
    "schema": "colledge/pool/1",
    "coordinator": {"address": "127.0.0.1", "port": 4000},
    "devices": [
        {"id": "a", "memory": "4 GB", "power": {"idle_w": 1, "compute_w": 9, "communicate_w": 2}},
        {"id": "b", "emulate": {"slowdown": 2, "bandwidth": "100 Mbit/s", "latency": "2 ms"}},
    ],
}


def changed(value: dict[str, Any], change: Callable[[Any], object]) -> dict[str, Any]:
    other = copy.deepcopy(value)
    change(other)
    return other


# -- through the command line --------------------------------------------------------------------------------


class Cli:
    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def plan(self, pool: object, model: object, *options: str) -> tuple[int, str, str]:
        for name, value in (("pool", pool), ("model", model)):
            text = value if isinstance(value, bytes) else json.dumps(value).encode()
            (self.folder / f"{name}.json").write_bytes(text)
        arguments = [
            "colledge",
            "plan",
            f"--pool-profile={self.folder / 'pool.json'}",
            f"--model-profile={self.folder / 'model.json'}",
            "--global-batch-size=8",
            *options,
        ]
        self.monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = self.capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    def fault(self, pool: object, model: object, *options: str) -> str:
        code, out, err = self.plan(pool, model, *options)
        assert code in (2, 3), (code, out, err)
        assert out == ""
        assert err.startswith("colledge: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert len(err) < 900
        assert " Fix: " in err
        return err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, monkeypatch, capsys)


def test_a_good_pool_is_planned_without_a_word_on_stderr(run: Cli) -> None:
    code, out, err = run.plan(POOL, MODEL, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["plan"]["prediction"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "1e999", 1e308, 10**400, -1])
@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("pool", ("links", 0, "bandwidth_bytes_per_s")),
        ("pool", ("links", 0, "latency_s")),
        ("pool", ("devices", 1, "memory_bytes")),
        ("pool", ("devices", 0, "modes", 0, "idle_w")),
        ("pool", ("devices", 0, "modes", 0, "compute_w")),
        ("model", ("layers", 0, "parameter_bytes")),
        ("model", ("layers", 1, "saved_bytes_per_sample")),
        ("model", ("layers", 1, "forward_flops_per_sample")),
        ("model", ("timings", 0, "forward_s")),
        ("model", ("timings", 0, "samples")),
        ("model", ("timings", 0, "shard_fraction")),
    ],
)
def test_numbers_that_no_device_has_are_refused_by_name(
    run: Cli, file: str, path: tuple[str | int, ...], value: object
) -> None:
    values = {"pool": copy.deepcopy(POOL), "model": copy.deepcopy(MODEL)}
    holder: Any = values[file]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    err = run.fault(values["pool"], values["model"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    assert f"{file}.json: {name}" in err


@pytest.mark.parametrize("path", ["links.0.bandwidth_bytes_per_s", "devices.0.memory_bytes"])
def test_true_is_no_number(run: Cli, path: str) -> None:
    holder: Any = (pool := copy.deepcopy(POOL))
    *parents, last = path.split(".")
    for key in parents:
        holder = holder[int(key) if key.isdigit() else key]
    holder[last] = True
    assert f"{last} is true, wanted a number" in run.fault(pool, MODEL)


@pytest.mark.parametrize("id", ["", " a", "a\nb", "\u200b", "x" * 101])
def test_names_that_nobody_can_read_are_refused(run: Cli, id: str) -> None:
    pool = changed(POOL, lambda pool: pool["devices"][2].update(id=id))
    assert "devices[2].id" in run.fault(pool, MODEL)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"name": "air", "devices": ["b", "c"]}, "segment 'air' appears 2 times"),
        ({"name": "sea", "devices": ["b", "b"]}, "segment 'sea' names a device twice"),
    ],
)
def test_segments_that_mean_two_things_are_refused(run: Cli, second: dict[str, Any], words: str) -> None:
    figures = {"latency_s": 0.001, "bandwidth_bytes_per_s": 1e7}
    first = {"name": "air", "devices": ["a", "b"]}
    pool = changed(POOL, lambda pool: pool.update(segments=[{**first, **figures}, {**second, **figures}]))
    assert words in run.fault(pool, MODEL)


def test_a_pool_in_pieces_that_cannot_hold_the_model_says_what_is_not_joined(run: Cli) -> None:
    def small(pool: dict[str, Any]) -> None:
        pool.update(links=[])
        for device in pool["devices"]:
            device.update(memory_bytes=100 * MB)

    err = run.fault(changed(POOL, small), MODEL)
    assert "nothing joins a and b (and 2 other pairs)" in err


@pytest.mark.parametrize("arguments", [["plan", "--steps", "0"], ["catalog", "show"], ["plan", "--no-such"]])
def test_a_bad_command_line_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["colledge", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("colledge: ")
    assert line.endswith(
        f"Fix: see `colledge {' '.join(arguments[:2] if arguments[0] == 'catalog' else ['plan'])} --help`."
    )


@pytest.mark.parametrize("path", ["links.0.bandwidth_bytes_per_s", "devices.0.memory_bytes"])
def test_zero_is_refused_where_it_makes_no_sense(run: Cli, path: str) -> None:
    holder: Any = (pool := copy.deepcopy(POOL))
    *parents, last = path.split(".")
    for key in parents:
        holder = holder[int(key) if key.isdigit() else key]
    holder[last] = 0
    assert "greater than 0" in run.fault(pool, MODEL)


def test_a_missing_link_leaves_devices_apart_and_says_so_where_both_must_be_used(run: Cli) -> None:
    apart = changed(POOL, lambda pool: pool.update(links=[]))
    code, out, _ = run.plan(apart, MODEL, "--json")
    assert code == 0
    assert len(json.loads(out)["plan"]["stages"][0]["replicas"]) == 1
    pool = parse_record(PoolProfile, apart, "pool")
    model = parse_record(ModelProfile, MODEL, "model")
    with pytest.raises(ColledgeError) as fault:
        plan_training(pool, model, PlanningRequest(global_batch_size=8, must_use=("a", "b")))
    assert fault.value.fix
    lone_plan = parse_record(Plan, PLAN, "plan")
    with pytest.raises(ColledgeError, match="no link and no segment joins 'b' and 'c'") as fault:
        predict(lone_plan, pool, model)
    assert fault.value.fix


def test_a_kind_without_timings_or_rates_is_named(run: Cli) -> None:
    unknown = changed(POOL, lambda pool: pool["devices"][1].update(kind="abacus"))
    assert "device kind 'abacus'" in run.fault(unknown, MODEL)


def test_a_timing_given_twice_is_named(run: Cli) -> None:
    twice = changed(MODEL, lambda model: model["timings"].append(model["timings"][0]))
    assert "two timings of layer kind 'embed' on device kind 'k'" in run.fault(POOL, twice)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"must_use": ("a",), "must_not_use": ("a",)}, "'a' stands in must_use and in must_not_use"),
        ({"must_use": ("zz",)}, "'zz' is not in the pool"),
        ({"must_not_use": ("zz",)}, "'zz' is not in the pool"),
        ({"must_not_use": ("a", "b", "c")}, "names every device"),
        ({"deadline_step_s": 1e-6}, "deadline of 1 us a step is impossible"),
    ],
)
def test_contradictory_constraints_are_one_line(options: dict[str, Any], match: str) -> None:
    pool, model = make_pool(["k", "k", "k"]), make_model({"k": 0.05})
    with pytest.raises(ColledgeError, match=match) as fault:
        plan_training(pool, model, PlanningRequest(global_batch_size=8, **options))
    assert fault.value.fix
    assert "\n" not in str(fault.value)


def test_a_deadline_below_the_bound_says_what_can_be_had(run: Cli) -> None:
    err = run.fault(POOL, MODEL, "--deadline-step=1us")
    assert "a deadline of 1 us a step is impossible" in err
    assert "Fix: allow at least" in err


def test_what_does_not_fit_names_a_device_and_exits_with_3(run: Cli) -> None:
    small = changed(POOL, lambda pool: [device.update(memory_bytes=50 * MB) for device in pool["devices"]])
    code, _, err = run.plan(small, MODEL)
    assert code == 3
    assert "no plan fits in memory" in err


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"nul", b"\xff\xfe{}", b'{"schema":', b"[" * 100_000, b"1" * 5000, b'{"schema": "\\ud800"}'],
)
def test_files_that_are_no_profile(run: Cli, content: bytes) -> None:
    assert "pool.json" in run.fault(content, MODEL)
    assert "model.json" in run.fault(POOL, content)


# -- fuzz ----------------------------------------------------------------------------------------------------

# Files are written to one folder: what is drawn must not need a fixture of its own each time.
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 10**6, 10**25, 10**400, 2**63, 0.5, 1e-300, 1e308, 1e20, -0.0]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(),
    st.floats(),
    st.sampled_from(
        ["", "a", "k", "max", "nan", "1e999 GB", "4 GB", "8h", "~nobody-there/x", "\0", "x" * 5000]
    ),
    st.text(max_size=8),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (holder, key) in a tree."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


@st.composite
def mutated(draw: st.DrawFn, valid: dict[str, Any], junk: st.SearchStrategy[Any] = JSON) -> dict[str, Any]:
    """Draw a valid file with one to three things wrong with it."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(value))
        if not there:
            break
        holder, key = there[draw(st.integers(0, len(there) - 1))]
        match draw(st.sampled_from(["replace", "replace", "drop", "add", "nest", "swap", "twice"])):
            case "replace":
                holder[key] = draw(junk)
            case "drop":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = draw(junk)
            case "nest":
                for _ in range(draw(st.sampled_from([1, 50, 300]))):
                    holder[key] = [holder[key]]
            case "swap":
                other, name = there[draw(st.integers(0, len(there) - 1))]
                one, two = copy.deepcopy(holder[key]), copy.deepcopy(other[name])
                holder[key], other[name] = two, one
            case "twice" if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case _:
                pass
    return value


@st.composite
def file_bytes(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """Draw a file's bytes: mutated, random JSON, cut short, or with a byte that is no UTF-8."""
    match draw(st.sampled_from(["mutated", "mutated", "mutated", "random", "cut", "byte"])):
        case "mutated":
            return json.dumps(draw(mutated(valid))).encode()
        case "random":
            return json.dumps(draw(JSON)).encode()
        case "cut":
            text = json.dumps(valid).encode()
            return text[: draw(st.integers(0, len(text)))]
        case _:
            text = json.dumps(valid).encode()
            at = draw(st.integers(0, len(text)))
            return text[:at] + draw(st.sampled_from([b"\xff", b"\x80", b"\0", b"\n", b'"', b"9"])) + text[at:]


def check_line(fault: ColledgeError) -> None:
    assert "\n" not in fault.message
    assert fault.message


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


@FUZZ
@given(content=file_bytes(POOL))
def test_fuzzed_pool_profiles(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        pool = read_json(PoolProfile, path)
    except ColledgeError as fault:
        check_line(fault)
    else:
        assert PoolProfile.model_validate_json(pool.to_json()) == pool


@FUZZ
@given(content=file_bytes(MODEL))
def test_fuzzed_model_profiles(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        model = read_json(ModelProfile, path)
    except ColledgeError as fault:
        check_line(fault)
    else:
        assert ModelProfile.model_validate_json(model.to_json()) == model


@FUZZ
@given(content=file_bytes(PLAN))
def test_fuzzed_plans(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    pool, model = make_pool(["k", "slow", "k"]), make_model({"k": 0.05, "slow": 0.1})
    try:
        plan = read_plan(path)
        plan.check_pool(pool)
        plan.check_model(len(model.layers), model.shard_units)
        plan.describe()
    except ColledgeError as fault:
        check_line(fault)


@FUZZ
@given(data=st.data())
def test_fuzzed_run_and_pool_yaml(path: Path, data: st.DataObject) -> None:
    load, valid = data.draw(st.sampled_from([(load_run, RUN), (load_pool, POOL_YAML)]))
    match data.draw(st.sampled_from(["mutated", "mutated", "json", "text", "tagged"])):
        case "mutated":
            text = yaml.safe_dump(data.draw(mutated(valid)))
        case "json":
            text = data.draw(file_bytes(valid)).decode("utf-8", errors="replace")
        case "text":
            text = data.draw(st.text())
        case _:
            tail = data.draw(
                st.sampled_from(
                    ["!!binary x", "2001-99-99", "!!python/object:x {}", "&a [*a]", "1:99", "{[]: 1}"]
                )
            )
            text = yaml.safe_dump(valid) + f"\nextra: {tail}\n"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    try:
        record: Record = load(path)
    except ColledgeError as fault:
        check_line(fault)
    else:
        assert record.to_json()


@FUZZ
@given(
    text=st.text(max_size=20)
    | st.sampled_from(["seed=2001-99-99", "model=~nobody-there", "pool=\0", "a..b=1"])
)
def test_fuzzed_overrides(path: Path, text: str) -> None:
    path.write_text(yaml.safe_dump(RUN))
    try:
        assert isinstance(load_run(path, [text]), RunConfig)
    except ColledgeError as fault:
        check_line(fault)


NUMBERS = st.sampled_from([0, 1, 2, 3, 0.25, 1e-30, 1e-9, 1e6, 1e12, 1e20, 10 * MB])


@st.composite
def renumbered(draw: st.DrawFn, valid: dict[str, Any]) -> dict[str, Any]:
    """Draw a file with other numbers in up to four places, or an element less: mostly still valid."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 4))):
        there = [
            (holder, key)
            for holder, key in places(value)
            if isinstance(holder, dict) and type(holder[key]) in (int, float)
        ]
        holder, key = draw(st.sampled_from(there))
        number = draw(NUMBERS)
        holder[key] = int(number) if type(holder[key]) is int and number >= 1 else number
    for name in draw(st.lists(st.sampled_from(["links", "devices", "layers", "timings"]), max_size=1)):
        if len(value.get(name, ())) > 1:
            value[name].pop(draw(st.integers(0, len(value[name]) - 1)))
    return value


@settings(FUZZ, max_examples=80)
@given(
    pool_values=renumbered(POOL) | mutated(POOL, NUMBERS),
    model_values=renumbered(MODEL) | mutated(MODEL, NUMBERS),
    batch=st.sampled_from([1, 4, 7]),
    objective=st.sampled_from(["energy", "time", "energy-delay"]),
)
def test_planning_with_fuzzed_profiles(
    pool_values: dict[str, Any], model_values: dict[str, Any], batch: int, objective: str
) -> None:
    try:
        pool = parse_record(PoolProfile, pool_values, "pool")
        model = parse_record(ModelProfile, model_values, "model")
        request = parse_record(
            PlanningRequest, {"global_batch_size": batch, "objective": objective}, "request"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", category=RuntimeWarning)
            baselines = all_baselines(PoolCosts(pool, model), request)
        assert all((baseline.plan is None) == bool(baseline.why_not) for baseline in baselines)
        result = plan_training(pool, model, request)
    except ColledgeError as fault:
        check_line(fault)
    else:
        assert result.best.prediction is not None
        assert math.isfinite(result.best.prediction.step_s)


# -- without torch -------------------------------------------------------------------------------------------

BLOCKING = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
from colledge.launch.cli import main
main()
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--json"],
        ["--advise", "--json"],
        [
            "--with=catalog:jetson-orin-nano:2",
            "--without=c",
            "--bandwidth=a->b=1 Gbit/s",
            "--electricity=0.3/kWh",
        ],
    ],
)
def test_planning_works_where_torch_is_not_installed(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "pool.json").write_text(json.dumps(POOL))
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    done = subprocess.run(
        [
            sys.executable, "-c", BLOCKING, "plan", "--pool-profile", "pool.json", "--model-profile", "model.json",
            "--global-batch-size", "4", *options,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(colledge.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if "--json" in options:
        assert json.loads(done.stdout)
