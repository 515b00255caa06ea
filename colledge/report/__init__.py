"""What a run did against what was predicted: metrics.jsonl, report.json, tables. `html` renders report.html."""

from colledge.report.metrics import StepMetrics, append_metrics, keep_metrics, read_metrics
from colledge.report.record import (
    Bounds,
    FamilyFigures,
    Report,
    build_report,
    energy_by_cause,
    relative_error,
)

__all__ = [
    "Bounds",
    "FamilyFigures",
    "Report",
    "StepMetrics",
    "append_metrics",
    "build_report",
    "energy_by_cause",
    "keep_metrics",
    "read_metrics",
    "relative_error",
]
