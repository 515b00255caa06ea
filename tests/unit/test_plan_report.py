"""What `colledge plan` shows: on the terminal, in plan.html (also in a real browser) and in plan.md."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from colledge.launch import planning
from colledge.launch.job import OutputFolder
from colledge.launch.planning import PlanningInputs, make_report, show, to_json
from colledge.plan import Plan
from colledge.planner import PlanBounds, PlanningRequest, PlanningResult, predict
from colledge.planner.explain import explain
from colledge.planner.request import Baseline
from colledge.profiles import ModelProfile, PoolProfile
from colledge.report.charts import Bar, first_bars, frontier_chart
from colledge.report.markdown import plan_markdown
from colledge.report.planning import PlanReport, render_plan, running_costs
from colledge.report.record import Bounds, FamilyFigures

MB = 1_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def model() -> ModelProfile:
    tensor = {
        "units": 4,
        "forward_allreduces": 2,
        "backward_allreduces": 2,
        "allreduce_bytes_per_sample": MB,
    }
    layer = {
        "kind": "block",
        "parameter_bytes": 10 * MB,
        "trainable_parameter_bytes": 10 * MB,
        "output_bytes_per_sample": MB,
        "saved_bytes_per_sample": 5 * MB,
        "forward_flops_per_sample": 1e9,
        "backward_flops_per_sample": 2e9,
        "tensor": tensor,
    }
    timings = [
        {
            "device_kind": kind,
            "mode": "15W",
            "layer_kind": "block",
            "samples": samples,
            "shard_fraction": fraction,
            "forward_s": 0.01 * slowness * samples * fraction,
            "backward_s": 0.02 * slowness * samples * fraction,
            "update_s": 0.001 * slowness * fraction,
        }
        for kind, slowness in (("fast", 1.0), ("slow", 2.0))
        for samples in (1, 4)
        for fraction in (1.0, 0.5)
    ]
    return ModelProfile.model_validate(
        {
            "schema": "colledge/model-profile/1",
            "name": "toy-llama",
            "sequence_length": 8,
            "layers": [{"name": f"block.{i}", **layer} for i in range(4)],
            "timings": timings,
        }
    )


@pytest.fixture
def pool() -> PoolProfile:
    def device(id: str, kind: str, memory_mb: int, source: str) -> dict[str, Any]:
        watts = {"idle_w": 5.0, "compute_w": 20.0, "communicate_w": 8.0}
        modes = [{"name": "15W", **watts, "source": source}]
        return {"id": id, "kind": kind, "memory_bytes": memory_mb * MB, "modes": modes}

    ids = ("desk", "lap", "pi", "spare")
    return PoolProfile.model_validate(
        {
            "schema": "colledge/pool-profile/1",
            "devices": [
                device("desk", "fast", 2000, "measured"),
                device("lap", "slow", 120, "declared"),
                device("pi", "slow", 4000, "declared"),
                device("spare", "slow", 4000, "measured"),
            ],
            "segments": [
                {
                    "name": "air",
                    "devices": ids,
                    "latency_s": 1e-3,
                    "bandwidth_bytes_per_s": 100 * MB,
                    "provenance": "declared",
                }
            ],
        }
    )


def shards(*names: str) -> list[dict[str, Any]]:
    return [{"device": name, "fraction": 1 / len(names), "mode": "15W"} for name in names]


def make_plan(*stages: tuple[list[int], list[tuple[int, list[dict[str, Any]]]]]) -> Plan:
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": 4,
            "global_batch_size": 8,
            "microbatch_size": 4,
            "stages": [
                {"layers": layers, "replicas": [{"samples": n, "shards": held} for n, held in replicas]}
                for layers, replicas in stages
            ],
        }
    )


HYBRID = make_plan(([0, 3], [(4, shards("desk"))]), ([3, 4], [(2, shards("lap")), (2, shards("pi"))]))
SINGLE = make_plan(([0, 4], [(4, shards("desk"))]))
TENSOR = make_plan(([0, 4], [(4, shards("desk", "pi"))]))


@pytest.fixture
def inputs(pool: PoolProfile, model: ModelProfile) -> PlanningInputs:
    return PlanningInputs(pool, model, PlanningRequest(global_batch_size=8), steps=100)


@pytest.fixture
def result(inputs: PlanningInputs) -> PlanningResult:
    def predicted(plan: Plan) -> Plan:
        return plan.model_copy(update={"prediction": predict(plan, inputs.pool, inputs.model)})

    best = predicted(HYBRID)
    families: Any = {"hybrid": best, "single": predicted(SINGLE), "tensor": predicted(TENSOR)}
    bounds = PlanBounds(step_s=0.4, energy_joules_per_step=8.0)
    baselines = (
        Baseline(name="one device", plan=families["single"]),
        Baseline(name="equal <split>", why_not="does not fit: lap lacks 80 MB"),
    )
    reasons = explain(best, families, bounds, inputs.request, inputs.pool, inputs.model, baselines)
    return PlanningResult(
        best=best,
        families=families,
        frontier=(best, families["single"]),
        bounds=bounds,
        baselines=baselines,
        reasons=tuple(reasons),
        planning_s=0.02,
    )


@pytest.fixture
def report(result: PlanningResult, inputs: PlanningInputs) -> PlanReport:
    return make_report(result, inputs)


# -- the terminal --------------------------------------------------------------------------------------------


def shown(report: PlanReport, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_shows_the_plan_as_a_picture(report: PlanReport) -> None:
    text = shown(report)
    assert re.search(r"0 +0-2 +desk +15W +4 of 4 +\S+ m?s +\d+% +#+\.* \S+ MB of 2 GB", text)
    assert re.search(r"\| +v 4 MB a micro-batch", text)
    assert re.search(r"1 +3 +lap +15W +2 of 4 ", text)
    assert re.search(r"\n +pi +15W +2 of 4 ", text)
    assert "share" not in text.split("best plan found of each family")[0]  # no stage is sharded


def test_estimates_are_the_first_thing_said(report: PlanReport) -> None:
    text = shown(report)
    assert text.startswith("This plan rests on estimates:")
    assert text.index("watts of lap, pi are declared") < text.index("stage")
    assert text.index("latency of air are declared") < text.index("stage")
    assert text.count("watts of lap, pi") == 1
    measured = replace(report, estimates=())
    assert "estimates" not in shown(measured)


def test_the_terminal_compares_with_families_baselines_and_bounds(report: PlanReport) -> None:
    text = shown(report)
    assert re.search(r"\* hybrid +desk\[0:3\) -> lap\[3:4\)x2 \+ pi\[3:4\)x2", text)
    assert re.search(r"  single +desk\[0:4\)", text)
    assert re.search(r"\* chosen .* 1\.00 .* 1\.00", text)
    single, chosen = report.families["single"], report.chosen
    time = single.step_s / chosen.step_s
    energy = single.energy_joules_per_step / chosen.energy_joules_per_step
    assert re.search(rf"  one device +desk\[0:4\) +\S+ m?s +{time:.2f} +\S+ +{energy:.2f}", text)
    assert re.search(r"equal <split> +does not fit: lap lacks 80 MB", text)
    assert f"T/LB-T {report.chosen.step_s / 0.4:.2f}" in text
    assert f"E/LB-E {report.chosen.energy_joules_per_step / 8:.2f}" in text
    assert "Limited by" in text
    assert "100 steps take" in text


def test_a_nearly_full_device_is_marked(report: PlanReport) -> None:
    used = report.prediction.devices["lap"].peak_memory_bytes
    assert used is not None
    assert "nearly full" not in shown(replace(report, memory_bytes={**report.memory_bytes, "lap": 2 * used}))
    assert "nearly full" in shown(replace(report, memory_bytes={**report.memory_bytes, "lap": used}))


def test_a_narrow_terminal_loses_no_figure(report: PlanReport) -> None:
    assert "T/LB-T" in shown(report, width=60)


# -- figures -------------------------------------------------------------------------------------------------


def test_under_marginal_accounting_idle_devices_are_not_compared(
    result: PlanningResult, inputs: PlanningInputs
) -> None:
    marginal = replace(inputs, request=inputs.request.model_copy(update={"accounting": "marginal"}))
    whole, own = make_report(result, inputs).chosen, make_report(result, marginal).chosen
    idle = 5.0 * whole.step_s  # `spare`
    assert whole.energy_joules_per_step - own.energy_joules_per_step == pytest.approx(idle)


def test_running_costs() -> None:
    costs = running_costs(36.0, 1_000_000, price_per_kwh=0.30, carbon_grams_per_kwh=350)
    assert costs.joules == 36e6
    assert costs.price == pytest.approx(3.0)  # 10 kWh
    assert costs.carbon_grams == pytest.approx(3500)
    assert costs.text() == "36 MJ, costing 3.00, 3.5 kg of CO2"
    assert running_costs(36.0, 100, 0.30, 350).text() == "3.6 kJ, costing 0.0003, 0.35 g of CO2"
    assert running_costs(36.0, 2).text() == "72 J"


def test_the_answer_for_programs_keeps_its_keys(result: PlanningResult, inputs: PlanningInputs) -> None:
    answer = json.loads(to_json(result, replace(inputs, steps=None)))
    assert set(answer) == {"plan", "families", "frontier", "bounds", "baselines", "reasons", "planning_s"}
    for plan in (answer["plan"], *answer["families"].values(), *answer["frontier"]):
        assert plan["prediction"]["step_s"] > 0


def test_a_folder_gets_the_plan_its_reasons_and_both_reports(
    result: PlanningResult, inputs: PlanningInputs, tmp_path: Path
) -> None:
    planning.write(result, inputs, OutputFolder(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "plan.json",
        "planning.json",
        "plan.html",
        "plan.md",
    }


def test_a_plan_that_was_given_leaves_no_report_of_another(
    result: PlanningResult, inputs: PlanningInputs, tmp_path: Path
) -> None:
    from colledge.launch.run import Chosen

    Chosen(result.best, result, inputs).write(OutputFolder(tmp_path))
    assert (tmp_path / "plan.html").exists()
    Chosen(SINGLE, None).write(OutputFolder(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}


# -- plan.html -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page would load, and its text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.num_scripts = 0
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.num_scripts += tag == "script"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def charts_of(html: str) -> dict[str, Any]:
    found = re.search(r"const charts = (.*);\n", html)
    assert found is not None
    charts: dict[str, Any] = json.loads(found[1])
    return charts


def test_the_page_loads_nothing(report: PlanReport) -> None:
    html = render_plan(report)
    assert [load for load in Page(html).loads if not load.startswith("data:")] == []
    assert "default-src 'none'" in html
    assert html.count("plotly.js v") == 1


def test_the_page_says_everything(report: PlanReport) -> None:
    html = render_plan(report)
    text = " ".join(Page(html).text.split())
    for words in (
        "rests on estimates",
        "watts of lap, pi are declared",
        "2 of 4 rows",
        "layers 0-2 (block.0 to block.2)",
        "Limited by",
        "Best tensor plan",
        "does not fit: lap lacks 80 MB",
        "equal <split>",
        "LB-T 400 ms",
        "LB-E 8 J",
        "for 100 steps",
    ):
        assert words in text
    for source in ("measured", "declared", "modelled"):
        assert f'class="tag {source}"' in html
    assert text.index("rests on estimates") < text.index("Stage 0")


def test_the_charts_hold_the_figures(report: PlanReport) -> None:
    charts = charts_of(render_plan(report))
    assert set(charts) == {"timeline", "energy", "memory", "frontier"}
    assert {trace["name"] for trace in charts["timeline"]["data"]} >= {
        "forward",
        "backward",
        "send",
        "update",
    }
    energy = charts["energy"]["data"]
    assert energy[0]["y"] == ["desk", "lap", "pi", "spare"]
    total = sum(sum(trace["x"]) for trace in energy)
    assert total == pytest.approx(report.prediction.energy_joules_per_step)
    memory = {trace["name"]: trace["x"] for trace in charts["memory"]["data"]}
    assert memory.pop("limit") == [2000, 120, 4000]
    lap = sum(sizes[1] for sizes in memory.values())
    assert lap * MB == pytest.approx(report.prediction.devices["lap"].peak_memory_bytes, abs=1)
    names = [trace["name"] for trace in charts["frontier"]["data"]]
    assert names == ["frontier", "families", "baselines", "chosen", "LB-T, least time", "LB-E, least energy"]
    bounds = charts["frontier"]["data"][-2:]
    assert bounds[0]["x"] == [400, 400]
    assert bounds[1]["y"] == [8, 8]


def test_names_cannot_break_out_of_the_page(report: PlanReport) -> None:
    evil = "</script><script>alert(1)</script>"
    html = render_plan(replace(report, model=evil, estimates=(evil,), reasons=(evil,)))
    assert "<script>alert" not in html
    assert Page(html).num_scripts == Page(render_plan(report)).num_scripts


def test_a_step_of_very_many_bars_is_drawn_from_its_start() -> None:
    bars = [Bar("a", f"F{n}", float(n), n + 1.0, "F") for n in range(9000)]
    drawn = first_bars(bars)
    assert 3000 < len(drawn) < 5000
    assert drawn == bars[: len(drawn)]
    assert first_bars(bars[:10]) == bars[:10]


def test_far_apart_plans_are_drawn_on_a_logarithmic_axis() -> None:
    def figures(step_s: float) -> FamilyFigures:
        return FamilyFigures(description=f"{step_s}", step_s=step_s, energy_joules_per_step=1.0)

    for far, kind in ((2.0, None), (2000.0, "log")):
        chart = frontier_chart([figures(1.0)], figures(1.0), {"data": figures(far)}, {}, Bounds(step_s=0.5))
        assert chart["layout"]["xaxis"].get("type") == kind
        low, high = chart["layout"]["xaxis"]["range"]
        assert (10**low if kind else low) < 500 or far == 2000.0
        assert (10**high if kind else high) > far * (1 if far == 2000.0 else 1e3)


def chromium(page: Path, folder: Path) -> tuple[str, str]:
    """Return the document after its scripts ran, and what the console said."""
    quiet = ("quic", "background-networking", "component-update", "sync", "gpu")
    command = [
        CHROMIUM or "",
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{name}" for name in quiet),
        f"--user-data-dir={folder}",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_chart_without_a_complaint(report: PlanReport, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    html = render_plan(report)
    page.write_text(html, encoding="utf-8")
    drawn, console = chromium(page, tmp_path / "one")
    assert console == ""
    for name in ("timeline", "energy", "memory", "frontier"):
        body = drawn[drawn.index(f'<div id="{name}"') :]
        assert body.index('class="main-svg"') < body.index("</section>")
    page.write_text(html.replace("draw();\n", "draw(); fetch('https://example.org/');\n"), encoding="utf-8")
    assert "Content Security Policy" in chromium(page, tmp_path / "two")[1]  # what a complaint looks like


# -- plan.md -------------------------------------------------------------------------------------------------


def test_the_markdown_has_the_same_in_text(report: PlanReport) -> None:
    text = plan_markdown(report)
    title, rest = text.split("\n", 1)
    assert title == "# toy-llama: the plan"
    assert rest.lstrip().startswith("> **This plan rests on estimates.**")
    for words in (
        "| hybrid (chosen) |",
        "| desk (15W) | 4 of 4 |",
        "| equal &lt;split> | does not fit: lap lacks 80 MB |",
        "no plan can go below either (LB-T, LB-E)",
        "## What limits it (modelled)",
        "desk\\|pi[0:4)",
        "| watts | lap, pi | declared |",
        "x the least possible (LB-E)",
    ):
        assert words in text


def test_every_table_of_the_markdown_is_whole(report: PlanReport) -> None:
    rows = [line for line in plan_markdown(report).splitlines() if line.startswith("|")]
    width = 0
    for row, below in zip(rows, [*rows[1:], ""], strict=True):
        cells = len(re.findall(r"(?<!\\)\|", row))
        if below.startswith("| ---"):
            width = cells
        assert cells == width
