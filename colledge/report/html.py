"""report.html: what a run did, as one file that works offline, on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from colledge.profiles import PowerMode
from colledge.report.charts import Bar, energy_chart, first_bars, loss_chart, timeline_chart
from colledge.report.metrics import StepMetrics
from colledge.report.page import render_page
from colledge.report.record import Report, relative_error


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
        "loss": loss_chart(metrics),
        "timeline": timeline_chart(first_bars(timeline)),
        "energy": energy_chart(report.measured.devices, power or {}),
    }
    return render_page(
        "report.html.jinja",
        charts,
        report=report,
        relative_error=relative_error,
        split_is_modelled=bool(power),
    )
