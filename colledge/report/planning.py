"""What a plan is, why it was chosen and what limits it, gathered for the terminal, plan.html and plan.md.

Says nothing that the planner did not find; only counts, compares and names sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colledge.plan import DeviceFigures, Plan, Stage, StepFigures
from colledge.profiles import PowerMode
from colledge.report.charts import (
    Bar,
    energy_chart,
    first_bars,
    frontier_chart,
    memory_chart,
    timeline_chart,
)
from colledge.report.page import render_page
from colledge.report.record import Bounds, FamilyFigures, energy_by_cause
from colledge.units import format_joules

NEAR_LIMIT = 0.9  # of a device's memory

_JOULES_PER_KWH = 3.6e6
_GRAMS_PER_KG = 1000


@dataclass(frozen=True)
class RunningCosts:
    """What a whole run takes: energy, and money and carbon where their rates are known."""

    steps: int
    joules: float
    price: float | None = None
    carbon_grams: float | None = None

    def text(self) -> str:
        """Return the figures that are known in words: `1.2 MJ, costing 0.1, 42 g of CO2`."""
        parts = [format_joules(self.joules)]
        if self.price is not None:
            parts.append(f"costing {self.price:.2f}" if self.price >= 1 else f"costing {self.price:.2g}")
        if self.carbon_grams is not None:
            heavy = self.carbon_grams >= _GRAMS_PER_KG
            mass = f"{self.carbon_grams / _GRAMS_PER_KG:.3g} kg" if heavy else f"{self.carbon_grams:.3g} g"
            parts.append(f"{mass} of CO2")
        return ", ".join(parts)


def running_costs(
    joules_per_step: float,
    steps: int,
    price_per_kwh: float | None = None,
    carbon_grams_per_kwh: float | None = None,
) -> RunningCosts:
    """Return what `steps` steps take in joules and, at these rates, in money and carbon."""
    joules = joules_per_step * steps
    kwh = joules / _JOULES_PER_KWH
    return RunningCosts(
        steps=steps,
        joules=joules,
        price=None if price_per_kwh is None else kwh * price_per_kwh,
        carbon_grams=None if carbon_grams_per_kwh is None else kwh * carbon_grams_per_kwh,
    )


@dataclass(frozen=True)
class BaselineFigures:
    """What a simpler planner's plan is predicted to do; without `figures`, or where it cannot run, `why_not`."""

    name: str
    figures: FamilyFigures | None
    why_not: str = ""


@dataclass(frozen=True)
class StepShares:
    """Where the time of a step goes, as shares of it; `headline` says it in words and names what limits."""

    headline: str
    computing: float
    bubble: float
    links: float
    slowest_device: str


@dataclass(frozen=True)
class SourceOf:
    """Where figures come from: `what` (times, watts, links, layers) of `names`."""

    what: str
    names: Sequence[str]
    source: str


@dataclass(frozen=True)
class PlanReport:
    """Everything that is shown of a plan.

    Joules that plans are compared by are the whole pool's, or under `marginal` those of a plan's own devices.
    `memory` has a device's bytes by what they are for, `boundary_bytes` what a micro-batch carries from each
    stage to the next, `basis` what predictions rest on; `estimates` warns of figures that nobody measured.
    """

    model: str
    layer_names: Sequence[str]
    plan: Plan
    goal: str
    marginal: bool
    tokens_per_step: int
    bounds: Bounds
    families: Mapping[str, FamilyFigures]
    baselines: Sequence[BaselineFigures]
    frontier: Sequence[FamilyFigures]
    shares: StepShares
    boundary_bytes: Sequence[int]
    memory: Mapping[str, Mapping[str, float]]
    memory_bytes: Mapping[str, int]
    power: Mapping[str, PowerMode]
    timeline: Sequence[Bar]
    basis: str
    sources: Sequence[SourceOf]
    estimates: Sequence[str]
    reasons: Sequence[str]
    planning_s: float
    running: RunningCosts | None = None

    @property
    def prediction(self) -> StepFigures:
        """What a step of the plan is predicted to take."""
        assert self.plan.prediction is not None, "a plan that was chosen carries its prediction"
        return self.plan.prediction

    @property
    def chosen(self) -> FamilyFigures:
        """The plan in a line."""
        return FamilyFigures.of(self.plan, marginal=self.marginal)

    @property
    def time_ratio(self) -> float | None:
        """The step over the least possible time, T/LB-T."""
        return _ratio(self.chosen.step_s, self.bounds.step_s)

    @property
    def energy_ratio(self) -> float | None:
        """The energy over the least possible, E/LB-E."""
        return _ratio(self.chosen.energy_joules_per_step, self.bounds.energy_joules_per_step)

    def times_chosen(self, figures: FamilyFigures) -> tuple[float | None, float | None]:
        """Return a plan's time and energy as multiples of the chosen plan's."""
        chosen = self.chosen
        return (
            _ratio(figures.step_s, chosen.step_s),
            _ratio(figures.energy_joules_per_step, chosen.energy_joules_per_step),
        )

    def layers_text(self, stage: Stage) -> str:
        """Return a stage's layers, such as `layers 0-4 (embed to block.3)`."""
        first, last = stage.layers[0], stage.layers[1] - 1
        if first == last:
            return f"layer {first} ({self.layer_names[first]})"
        return f"layers {first}-{last} ({self.layer_names[first]} to {self.layer_names[last]})"

    def memory_share(self, device: str) -> float:
        """Return how full a device of the plan is."""
        return sum(self.memory[device].values()) / self.memory_bytes[device]

    def energy_split(self, device: str) -> tuple[float, float, float]:
        """Return the joules of a step while a device idles, computes and communicates."""
        return energy_by_cause(self.prediction.devices[device], self.power[device])

    def figures(self, device: str) -> DeviceFigures:
        """Return what a device is predicted to do in a step."""
        return self.prediction.devices[device]

    def share_of_step(self, seconds: float) -> float:
        """Return seconds as a share of the step."""
        return seconds / self.prediction.step_s if self.prediction.step_s else 0.0


def _ratio(value: float, base: float | None) -> float | None:
    return value / base if base else None


def render_plan(report: PlanReport) -> str:
    """Return plan.html: one page that works offline, on a phone and in the dark."""
    baselines = {one.name: one.figures for one in report.baselines if one.figures is not None}
    shown = first_bars(report.timeline)
    charts = {
        "timeline": timeline_chart(shown),
        "energy": energy_chart(report.prediction.devices, report.power),
        "memory": memory_chart(report.memory, report.memory_bytes),
        "frontier": frontier_chart(report.frontier, report.chosen, report.families, baselines, report.bounds),
    }
    left_out = len(report.timeline) - len(shown)
    return render_page(
        "plan.html.jinja", charts, report=report, bars_left_out=left_out, near_limit=NEAR_LIMIT
    )
