from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from colledge.errors import ConfigError
from colledge.plan import Plan
from colledge.profiles import PowerMode
from colledge.records import read_json, write_atomically
from colledge.report import (
    Bounds,
    FamilyFigures,
    Report,
    StepMetrics,
    append_metrics,
    build_report,
    energy_by_cause,
    keep_metrics,
    read_metrics,
)
from colledge.report.charts import Bar, timeline_bars
from colledge.report.html import render
from colledge.report.tables import comparison_table, family_table, plan_table
from colledge.schedule import Action, Span, Transfer


def figures(step_s: float, energy: float = 2.0, source: str = "modelled", **more: Any) -> dict[str, Any]:
    return {
        "compute_s": step_s / 2,
        "communicate_s": step_s / 4,
        "idle_s": step_s / 4,
        "energy_joules": energy,
        "source": source,
        **more,
    }


def line(step: int, step_s: float = 0.5, **changes: Any) -> StepMetrics:
    values = {
        "step": step,
        "loss": 5.0 / step,
        "step_s": step_s,
        "tokens": 100,
        "energy_joules": 7.0,
        "devices": {
            "desk": figures(step_s, 4.0, "measured", peak_memory_bytes=10**9 + step),
            "pi": figures(step_s, 2.0),
            "spare": figures(step_s, 1.0),
        },
    }
    return StepMetrics.model_validate(values | changes)


@pytest.fixture
def plan() -> Plan:
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": 4,
            "global_batch_size": 8,
            "microbatch_size": 4,
            "stages": [
                {"layers": [0, 3], "replicas": [{"samples": 4, "shards": [{"device": "desk"}]}]},
                {"layers": [3, 4], "replicas": [{"samples": 4, "shards": [{"device": "pi"}]}]},
            ],
            "prediction": {
                "step_s": 0.45,
                "energy_joules_per_step": 6.0,
                "marginal_energy_joules_per_step": 5.0,
                "devices": {"desk": figures(0.45, peak_memory_bytes=9 * 10**8), "pi": figures(0.45)},
            },
        }
    )


@pytest.fixture
def report(plan: Plan) -> Report:
    return build_report(
        plan,
        [line(n, s) for n, s in enumerate((3.0, 3.0, 3.0, 0.5, 0.4, 0.6, 0.5, 0.7), start=1)],
        model="tiny",
        families={
            "single": FamilyFigures(description="desk[0:4)", step_s=0.9, energy_joules_per_step=9.0),
            "pipeline": FamilyFigures(
                description=plan.describe(),
                step_s=0.45,
                energy_joules_per_step=6.0,
                peak_memory_bytes=9 * 10**8,
            ),
        },
        bounds=Bounds(step_s=0.4, energy_joules_per_step=5.5),
        reasons=["desk is faster & pi is cheaper"],
    )


# metrics.jsonl


def test_metrics_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line(1), line(2, gradient_norm=0.5)]
    for one in lines:
        append_metrics(path, one)
    assert read_metrics(path) == lines
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == ["step", "loss", "step_s", "tokens", "energy_joules", "devices"]
    assert list(first["devices"]["pi"]) == ["compute_s", "communicate_s", "idle_s", "energy_joules", "source"]


def test_the_torn_end_of_a_crash_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, line(1))
    append_metrics(path, line(2))
    path.write_bytes(path.read_bytes()[:-30])
    assert [one.step for one in read_metrics(path)] == [1]
    append_metrics(path, line(2, loss=9.0))
    assert [(one.step, one.loss) for one in read_metrics(path)] == [(1, 5.0), (2, 9.0)]
    path.write_bytes(b'{"torn')
    append_metrics(path, line(1))
    assert [one.step for one in read_metrics(path)] == [1]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for one in (line(1), line(2), line(3), line(2, loss=8.0)):
        append_metrics(path, one)
    assert [(one.step, one.loss) for one in read_metrics(path)] == [(1, 5.0), (2, 8.0), (3, 5 / 3)]


def test_the_steps_that_a_resumed_run_repeats_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_metrics(path, 4) == []
    for one in (line(1), line(2), line(2, loss=8.0), line(3), line(4)):
        append_metrics(path, one)
    path.write_bytes(path.read_bytes() + b'{"torn')
    assert keep_metrics(path, 2) == read_metrics(path) == [line(1), line(2, loss=8.0)]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("{torn\n", ["line 2", "not JSON"]),
        ("\n", ["line 2", "not JSON"]),
        ('{"step": 2, "speed": 1}\n', ["line 2", "is missing"]),
        ("[]\n", ["line 2", "list"]),
    ],
)
def test_other_damage_is_an_error_that_names_the_line(tmp_path: Path, damage: str, words: list[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, line(1))
    path.write_text(path.read_text() + damage)
    append_metrics(path, line(3))
    with pytest.raises(ConfigError) as error:
        read_metrics(path)
    for word in ["metrics.jsonl", *words]:
        assert word in str(error.value)


def test_missing_metrics_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train first"):
        read_metrics(tmp_path / "metrics.jsonl")


# report.json


def test_the_report_subtracts(report: Report) -> None:
    assert report.warmup_steps == 3
    assert report.measured.step_s == 0.5
    assert report.step_error == pytest.approx(-0.1)
    assert (report.first_loss, report.final_loss) == (5.0, 5 / 8)
    assert (report.steps, report.tokens, report.total_energy_joules) == (8, 800, 56.0)
    assert report.joules_per_token == pytest.approx(0.07)
    assert report.measured.energy_joules_per_step == 7.0
    assert report.measured.marginal_energy_joules_per_step == 6.0  # `spare` is left out by the plan
    assert report.measured.devices["desk"].peak_memory_bytes == 10**9 + 8
    assert report.energy_source == "mixed"


def test_the_report_says_what_is_modelled_and_left_out(report: Report) -> None:
    notes = " ".join(report.notes)
    assert "first 3 steps left out" in notes
    assert "modelled" in notes
    assert "pi, spare" in notes


def test_prediction_and_measured_have_the_same_fields(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, report.to_json())
    assert read_json(Report, path) == report
    value = json.loads(path.read_text())
    assert value["schema"] == "colledge/report/1"
    assert set(value["prediction"]) == set(value["measured"])
    assert set(value["prediction"]["devices"]["desk"]) == set(value["measured"]["devices"]["desk"])


@pytest.mark.parametrize(("steps", "left_out"), [(1, 0), (2, 0), (3, 1), (7, 3), (100, 3)])
def test_short_runs_leave_out_fewer_steps(plan: Plan, steps: int, left_out: int) -> None:
    assert build_report(plan, [line(n + 1) for n in range(steps)], model="m").warmup_steps == left_out


def test_a_missing_meter_makes_totals_at_least(plan: Plan) -> None:
    devices = {"desk": figures(0.5, 0.0, "missing"), "pi": figures(0.5)}
    report = build_report(plan, [line(1, devices=devices)], model="m")
    assert report.energy_source == "missing"
    assert report.energy_text(7.0) == "at least 7 J"
    assert any("unknown" in note and "desk" in note for note in report.notes)
    assert "unknown" in render(report, [line(1, devices=devices)])


def test_a_plan_by_hand_has_no_prediction(plan: Plan) -> None:
    bare = plan.model_copy(update={"prediction": None})
    report = build_report(bare, [line(1)], model="m")
    assert report.prediction is None
    assert report.step_error is None
    assert any("no prediction" in note for note in report.notes)
    assert "Predicted against measured" in render(report, [line(1)])


def test_no_steps_is_an_error(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="no step has been trained"):
        build_report(plan, [], model="m")


def test_energy_by_cause_adds_up_to_the_device(report: Report) -> None:
    mode = PowerMode(name="m", idle_w=4, compute_w=8, communicate_w=4, source="declared")
    device = report.measured.devices["desk"]
    idle, compute, communicate = energy_by_cause(device, mode)
    assert idle + compute + communicate == pytest.approx(device.energy_joules)
    assert compute == pytest.approx(device.energy_joules * 4 / 6)
    dark = PowerMode(name="m", idle_w=0, compute_w=0, communicate_w=0, source="declared")
    assert energy_by_cause(device, dark) == (0, 0, 0)


def test_nan_is_no_figure() -> None:
    with pytest.raises(ValidationError):
        line(1, loss=float("nan"))


# Tables


def text_of(*tables: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_family_table_ranks_by_energy_and_marks_the_choice(report: Report) -> None:
    text = text_of(
        family_table(report.families, samples_per_step=8, tokens_per_step=100, chosen=report.plan.describe())
    )
    rows = [row for row in text.splitlines() if "[" in row]
    assert re.search(r"\* pipeline +desk\[0:3\) -> pi\[3:4\) +450 ms +6 +0.06 +1.00 +900 MB", rows[0])
    assert re.search(r"  single +desk\[0:4\) +900 ms +9 +0.09 +1.50 +-", rows[1])
    assert "J/token" in text
    assert "J/sample" in text_of(family_table(report.families, samples_per_step=8))


def test_the_plan_table_shows_stages_and_memory(plan: Plan) -> None:
    text = text_of(plan_table(plan, {"desk": 18 * 10**8}))
    assert re.search(r"0 +0-2 +desk +4 of 4 +225 ms +50% +#{5}\.{5} 900 MB of 1.8 GB", text)
    assert re.search(r"1 +3 +pi ", text)


def test_the_comparison_table_subtracts(report: Report) -> None:
    text = text_of(comparison_table(report))
    assert re.search(r"step +450 ms +500 ms +-10.0% +measured", text)
    assert re.search(r"pi energy +2 J +2 J +\+0.0% +modelled", text)
    assert re.search(r"spare compute +- +250 ms +- ", text)


def test_brackets_in_names_are_no_markup(plan: Plan) -> None:
    families = {"[bold]": FamilyFigures(description="[/red]", step_s=1, energy_joules_per_step=1)}
    text = text_of(family_table(families, samples_per_step=8))
    assert "[bold]" in text
    assert "[/red]" in text


# report.html


class Page(HTMLParser):
    """What a page would load, and the text of it outside scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    return page


def test_the_page_is_one_file_that_loads_nothing(report: Report) -> None:
    html = render(report, [line(1)])
    page = parsed(html)
    assert [load for load in page.loads if not load.startswith("data:")] == []
    assert "default-src 'none'" in html
    assert html.count("plotly.js v") == 1
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def charts_of(page: Page) -> dict[str, Any]:
    script = next(s for s in page.scripts if "const charts" in s)
    value: dict[str, Any] = json.loads(re.search(r"const charts = (.*);\n", script)[1])  # type: ignore[index]
    return value


def test_the_page_has_every_part(report: Report) -> None:
    timeline = [Bar("desk", "F0@0", 0.0, 0.2, "F"), Bar("desk", "desk to pi", 0.2, 0.3, "SEND")]
    power = {"desk": PowerMode(name="m", idle_w=4, compute_w=8, communicate_w=4, source="declared")}
    page = parsed(render(report, [line(1), line(2)], timeline, power))
    charts = charts_of(page)
    assert charts["loss"]["data"][0]["y"] == [5.0, 2.5]
    assert [trace["name"] for trace in charts["timeline"]["data"]] == ["forward", "send"]
    assert charts["timeline"]["data"][1]["base"] == [200.0]
    assert [trace["name"] for trace in charts["energy"]["data"]] == ["idling", "computing", "communicating"]
    for words in ("8 steps", "-10.0 %", "10.0 % too\nshort", "no plan can beat 400 ms", "desk is faster & pi",
                  "spare (left out by the plan)", "measured", "modelled", "single"):  # fmt: skip
        assert words in page.text


def test_a_simulated_step_becomes_bars(plan: Plan) -> None:
    spans = [("F0@0", 0.0, 0.2), ("SEND_F0@0", 0.2, 0.2), ("RECV_F0@1", 0.0, 0.3), ("F0@1", 0.3, 0.4),
             ("SYNC@1", 0.4, 0.4), ("STEP@1", 0.4, 0.5)]  # fmt: skip
    timeline: Any = SimpleNamespace(
        spans=tuple(Span(Action.parse(text), 0, start_s, end_s) for text, start_s, end_s in spans),
        transfers=(Transfer("desk", "pi", "desk->pi", 0.2, 0.3),),
    )
    assert timeline_bars(plan, timeline) == [
        Bar("desk", "F0@0", 0.0, 0.2, "F"),
        Bar("desk", "desk to pi", 0.2, 0.3, "SEND"),
        Bar("pi", "F0@1", 0.3, 0.4, "F"),
        Bar("pi", "STEP@1", 0.4, 0.5, "STEP"),
    ]


def test_a_family_is_what_its_plan_predicts(plan: Plan) -> None:
    family = FamilyFigures.of(plan)
    assert family.description == "desk[0:3) -> pi[3:4)"
    assert (family.step_s, family.energy_joules_per_step, family.peak_memory_bytes) == (0.45, 6.0, 9 * 10**8)


def test_names_cannot_break_out_of_the_page(plan: Plan) -> None:
    evil = "</script><script>alert(1)</script>"
    metrics = [line(1, devices={evil: figures(0.5)})]
    report = build_report(plan, metrics, model=evil, reasons=[evil])
    html = render(report, metrics, [Bar(evil, evil, 0, 1, "F")])
    assert "<script>alert" not in html
    assert len(parsed(html).scripts) == len(parsed(render(report, metrics)).scripts)


def test_a_long_run_stays_a_small_page(plan: Plan) -> None:
    metrics = [line(step) for step in range(1, 6001)]
    charts = charts_of(parsed(render(build_report(plan, metrics, model="m"), metrics)))
    assert 1000 < len(charts["loss"]["data"][0]["x"]) <= 3000
