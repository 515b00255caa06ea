"""What an activation cache took and saved, measured against what was predicted without it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from colledge.plan import StepFigures
from colledge.records import Record
from colledge.report.metrics import StepMetrics
from colledge.units import format_joules, format_seconds


class CacheFill(Record):
    """activation-cache-filled.json: rows that were computed, in how long, with how many joules of the whole pool."""

    num_rows: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    energy_joules: float = Field(default=0.0, ge=0)

    def __add__(self, other: CacheFill) -> CacheFill:
        """Return both together: a run that was resumed fills what was missing."""
        return CacheFill(
            num_rows=self.num_rows + other.num_rows,
            seconds=self.seconds + other.seconds,
            energy_joules=self.energy_joules + other.energy_joules,
        )


class CacheSaving(Record):
    """What the run took with the cache, filling it counted, and what it was predicted to take without.

    `without_s` and `without_joules` are None where no plan could run without the cache.
    """

    fill: CacheFill
    with_s: float = Field(ge=0)
    with_joules: float = Field(ge=0)
    without_s: float | None = None
    without_joules: float | None = None

    @classmethod
    def of(cls, fill: CacheFill, metrics: Sequence[StepMetrics], uncached: StepFigures | None) -> CacheSaving:
        """Return what a run saved.

        Args:
            fill: What filling the cache took.
            metrics: The steps.
            uncached: What a step was predicted to cost without the cache.
        """
        steps = len(metrics)
        return cls(
            fill=fill,
            with_s=fill.seconds + sum(line.step_s for line in metrics),
            with_joules=fill.energy_joules + sum(line.energy_joules for line in metrics),
            without_s=steps * uncached.step_s if uncached is not None else None,
            without_joules=steps * uncached.energy_joules_per_step if uncached is not None else None,
        )

    def sentences(self) -> tuple[str, ...]:
        """Return it in words."""
        took = f"{format_seconds(self.fill.seconds)} and {format_joules(self.fill.energy_joules)}"
        said = (
            f"Computing {self.fill.num_rows} rows for the activation cache took {took} (those that were lost since, "
            "again); these are in no figure of a step."
        )
        if self.without_s is None or self.without_joules is None:
            return (said,)
        return (
            said,
            f"The run took {format_seconds(self.with_s)} and {format_joules(self.with_joules)} with it, and was "
            f"predicted to take {format_seconds(self.without_s)} and {format_joules(self.without_joules)} without: "
            f"{_saved(self.without_s, self.with_s)} of the time and "
            f"{_saved(self.without_joules, self.with_joules)} of the energy.",
        )


def _saved(without: float, took: float) -> str:
    """Return `40 % less`, or `10 % more`."""
    if without <= 0:
        return "0 % less"
    share = 100 * (without - took) / without
    return f"{share:.0f} % less" if share >= 0 else f"{-share:.0f} % more"
