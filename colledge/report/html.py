"""report.html: one file that works offline, on a phone and in the dark.

Charts are plain Plotly data; its script is inlined once, and a content policy in the page forbids any request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from colledge.plan import Plan
from colledge.profiles import PowerMode
from colledge.report.metrics import StepMetrics
from colledge.report.record import Report, energy_by_cause, relative_error
from colledge.schedule import Timeline
from colledge.units import format_bytes, format_joules, format_seconds

_MOST_POINTS = 2000

# Colours that hold on white and on black, and for the colour-blind (Okabe and Ito).
_BLUE, _SKY, _ORANGE, _GREEN, _GREY, _PURPLE = (
    "#3b82c4",
    "#56b4e9",
    "#e69f00",
    "#009e73",
    "#8a8f98",
    "#b07aa1",
)
_KINDS = {  # of a bar: its name and colour
    "F": ("forward", _SKY),
    "B": ("backward", _BLUE),
    "SEND": ("send", _ORANGE),
    "SYNC": ("gradient sync", _PURPLE),
    "STEP": ("update", _GREEN),
}
_COMPUTES = ("F", "B", "STEP")


@dataclass(frozen=True)
class Bar:
    """One bar of the timeline: what a device does from `start_s` to `end_s` of the simulated step.

    `kind` is F, B, SEND, SYNC or STEP; `label` is shown on hovering.
    """

    device: str
    label: str
    start_s: float
    end_s: float
    kind: str


def timeline_bars(plan: Plan, timeline: Timeline) -> list[Bar]:
    """Return the bars of a simulated step: what each device computes, sends and synchronises.

    Args:
        plan: The plan.
        timeline: Its simulation, recorded.
    """
    bars = []
    for span in timeline.spans:
        action = span.action
        if action.kind.value in _KINDS and span.end_s > span.start_s:
            for shard in plan.stages[action.stage].replicas[span.replica_index].shards:
                bars.append(Bar(shard.device, str(action), span.start_s, span.end_s, action.kind.value))
    for transfer in timeline.transfers:
        label = f"{transfer.source} to {transfer.target}"
        bars.append(Bar(transfer.source, label, transfer.start_s, transfer.end_s, "SEND"))
    order = {device: index for index, device in enumerate(plan.devices)}
    return sorted(bars, key=lambda bar: (order[bar.device], bar.start_s))


def render(
    report: Report,
    metrics: Sequence[StepMetrics],
    timeline: Sequence[Bar] = (),
    power: Mapping[str, PowerMode] | None = None,
) -> str:
    """Return the report as one HTML page.

    Args:
        report: The figures.
        metrics: The steps, for the loss curve.
        timeline: The simulated step.
        power: The watts of each device, which split its energy by cause; without them it is one bar.
    """
    charts = {
        "loss": _loss_chart(metrics),
        "timeline": _timeline_chart(timeline),
        "energy": _energy_chart(report, power or {}),
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"seconds": format_seconds, "joules": format_joules, "bytes": format_bytes}
    template = files("colledge.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=report,
        charts={name: chart for name, chart in charts.items() if chart["data"]},
        plotly_script=get_plotlyjs(),
        relative_error=relative_error,
        split_is_modelled=bool(power),
    )


def _chart(data: list[dict[str, Any]], height: int = 320, **layout: Any) -> dict[str, Any]:
    return {"data": data, "layout": {"height": height, **layout}}


def _loss_chart(metrics: Sequence[StepMetrics]) -> dict[str, Any]:
    shown = metrics[:: max(1, len(metrics) // _MOST_POINTS)]
    trace = {
        "type": "scatter",
        "mode": "lines" if len(shown) > 1 else "markers",
        "x": [line.step for line in shown],
        "y": [line.loss for line in shown],
        "line": {"color": _BLUE, "width": 2},
        "hovertemplate": "step %{x}: loss %{y:.4f}<extra></extra>",
    }
    return _chart([trace], xaxis={"title": {"text": "step"}}, yaxis={"title": {"text": "loss"}})


def _timeline_chart(timeline: Sequence[Bar]) -> dict[str, Any]:
    """Draw computation as thick bars and transfers as thin ones below, so that overlap shows."""
    devices = list(dict.fromkeys(bar.device for bar in timeline))
    traces = []
    for kind, (name, colour) in _KINDS.items():
        bars = [bar for bar in timeline if bar.kind == kind]
        if not bars:
            continue
        computes = kind in _COMPUTES
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": [bar.device for bar in bars],
                "base": [bar.start_s * 1e3 for bar in bars],
                "x": [(bar.end_s - bar.start_s) * 1e3 for bar in bars],
                "customdata": [f"{bar.label}, {format_seconds(bar.end_s - bar.start_s)}" for bar in bars],
                "hovertemplate": "%{customdata}<extra>%{y}</extra>",
                "width": 0.45 if computes else 0.2,
                "offset": -0.15 if computes else -0.4,
                "marker": {"color": colour, "line": {"width": 0.5, "color": "#0006"}},
            }
        )
    return _chart(
        traces,
        height=170 + 60 * len(devices),
        barmode="overlay",
        xaxis={"title": {"text": "milliseconds of the simulated step"}},
        yaxis={"categoryorder": "array", "categoryarray": devices[::-1], "automargin": True},
    )


def _energy_chart(report: Report, power: Mapping[str, PowerMode]) -> dict[str, Any]:
    known = {id: f for id, f in report.measured.devices.items() if f.source != "missing"}
    if not power:
        parts = {"energy": [f.energy_joules for f in known.values()]}
    else:
        known = {id: f for id, f in known.items() if id in power}
        splits = [energy_by_cause(figures, power[id]) for id, figures in known.items()]
        causes = ("idling", "computing", "communicating")
        parts = {cause: [split[i] for split in splits] for i, cause in enumerate(causes)}
    colours = {"idling": _GREY, "computing": _BLUE, "communicating": _ORANGE, "energy": _BLUE}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": cause,
            "y": list(known),
            "x": joules,
            "marker": {"color": colours[cause]},
            "hovertemplate": f"{cause}: %{{x:.3g}} J<extra>%{{y}}</extra>",
        }
        for cause, joules in parts.items()
        if known
    ]
    return _chart(
        traces,
        height=150 + 44 * len(known),
        barmode="stack",
        xaxis={"title": {"text": "joules a step"}},
        yaxis={"autorange": "reversed", "automargin": True},
    )
