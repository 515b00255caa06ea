"""report.json: what was predicted against what was measured, with the same field names.

`build_report` is pure: a plan and the metrics of a run in, a record out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal

from pydantic import Field

from colledge.errors import ConfigError
from colledge.plan import DeviceFigures, Plan, StepFigures
from colledge.profiles import PowerMode
from colledge.records import Record
from colledge.report.caching import CacheSaving
from colledge.report.metrics import StepMetrics
from colledge.units import format_joules, format_seconds

_WARMUP_STEPS = 3

EnergySource = Literal["measured", "modelled", "mixed", "missing"]


class Bounds(Record):
    """What no plan for this pool, model and batch can beat."""

    step_s: float | None = Field(default=None, ge=0)
    energy_joules_per_step: float | None = Field(default=None, ge=0)


class FamilyFigures(Record):
    """The best plan of one family, as predicted. `peak_memory_bytes` is of its fullest device."""

    description: str
    step_s: float = Field(ge=0)
    energy_joules_per_step: float = Field(ge=0)
    peak_memory_bytes: int | None = None

    @classmethod
    def of(cls, plan: Plan, *, marginal: bool = False) -> FamilyFigures:
        """Return the figures of a plan that carries its prediction.

        Args:
            plan: The plan.
            marginal: Whether its energy is that of its own devices alone, not the whole pool's.
        """
        figures = plan.prediction
        assert figures is not None, "a family's best plan carries its prediction"
        peaks = [device.peak_memory_bytes or 0 for device in figures.devices.values()]
        return cls(
            description=plan.describe(),
            step_s=figures.step_s,
            energy_joules_per_step=figures.marginal_energy_joules_per_step
            if marginal
            else figures.energy_joules_per_step,
            peak_memory_bytes=max(peaks, default=0) or None,
        )


class Validation(Record):
    """The mean loss on the validation data after a step; its perplexity is e to the power of it."""

    step: int = Field(ge=1)
    loss: float
    seconds: float = Field(ge=0)
    joules: float | None = Field(default=None, ge=0)


class Report(Record):
    """report.json.

    `measured` holds medians over the steps after `warmup_steps`; totals are over all steps. `step_error` is
    (predicted - measured) / measured. `energy_source` says where the joules come from; `missing` means that
    a device had no reading, so a total is "at least".
    """

    schema_tag: Literal["colledge/report/1"] = Field(default="colledge/report/1", alias="schema")
    model: str
    plan: Plan
    prediction: StepFigures | None = None
    measured: StepFigures
    step_error: float | None = None
    steps: int
    warmup_steps: int
    tokens: int
    first_loss: float
    final_loss: float
    validation: tuple[Validation, ...] = ()
    total_energy_joules: float
    energy_source: EnergySource
    joules_per_token: float | None = None
    bounds: Bounds | None = None
    families: dict[str, FamilyFigures] = Field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    activation_cache: CacheSaving | None = None

    def energy_text(self, joules: float) -> str:
        """Return an energy with its unit, and `at least` where a reading is missing."""
        return ("at least " if self.energy_source == "missing" else "") + format_joules(joules)


def build_report(
    plan: Plan,
    metrics: Sequence[StepMetrics],
    *,
    model: str,
    families: Mapping[str, FamilyFigures] | None = None,
    bounds: Bounds | None = None,
    reasons: Sequence[str] = (),
    notes: Sequence[str] = (),
    saving: CacheSaving | None = None,
) -> Report:
    """Return the report of a run.

    Args:
        plan: The plan that ran, with its prediction.
        metrics: The steps, in order.
        model: The model's name.
        families: The best plan of each family.
        bounds: The least time and energy of a step.
        reasons: Why this plan, in words.
        notes: What a reader must know beside what is added here: what is modelled, what is left out.
        saving: What an activation cache took and saved.

    Raises:
        ConfigError: There is no step to report.
    """
    if not metrics:
        raise ConfigError("no step has been trained, so there is nothing to report.", fix="train first.")
    warmup = min(_WARMUP_STEPS, (len(metrics) - 1) // 2)
    measured = _medians(metrics[warmup:], set(plan.devices))
    prediction = plan.prediction
    tokens = sum(line.tokens for line in metrics)
    validation = tuple(
        Validation(
            step=line.step,
            loss=line.validation_loss,
            seconds=line.validation_s or 0.0,
            joules=line.validation_joules,
        )
        for line in metrics
        if line.validation_loss is not None
    )
    energy = sum(line.energy_joules for line in metrics)
    return Report(
        model=model,
        plan=plan.model_copy(update={"prediction": None}),
        prediction=prediction,
        measured=measured,
        step_error=relative_error(prediction.step_s, measured.step_s) if prediction else None,
        steps=len(metrics),
        warmup_steps=warmup,
        tokens=tokens,
        first_loss=metrics[0].loss,
        final_loss=metrics[-1].loss,
        validation=validation,
        total_energy_joules=energy,
        energy_source=_energy_source(line.devices for line in metrics),
        joules_per_token=energy / tokens if tokens else None,
        bounds=bounds,
        families=dict(families or {}),
        reasons=tuple(reasons),
        activation_cache=saving,
        notes=(
            *notes,
            *(saving.sentences() if saving else ()),
            *_notes(measured, warmup, prediction is not None),
            *_validation_notes(validation),
        ),
    )


def relative_error(predicted: float, measured: float) -> float | None:
    """Return (predicted - measured) / measured, or None where nothing was measured."""
    return (predicted - measured) / measured if measured else None


def energy_by_cause(figures: DeviceFigures, mode: PowerMode) -> tuple[float, float, float]:
    """Return the joules of a step while a device idled, computed and communicated.

    The split is modelled from the mode's watts and adds up to the device's energy.
    """
    shares = (
        mode.idle_w * figures.idle_s,
        mode.compute_w * figures.compute_s,
        mode.communicate_w * figures.communicate_s,
    )
    total = sum(shares)
    scale = figures.energy_joules / total if total else 0.0
    return (shares[0] * scale, shares[1] * scale, shares[2] * scale)


def _medians(metrics: Sequence[StepMetrics], used: set[str]) -> StepFigures:
    ids = list(dict.fromkeys(id for line in metrics for id in line.devices))
    marginal = [sum(f.energy_joules for id, f in line.devices.items() if id in used) for line in metrics]
    return StepFigures(
        step_s=median(line.step_s for line in metrics),
        energy_joules_per_step=median(line.energy_joules for line in metrics),
        marginal_energy_joules_per_step=median(marginal),
        devices={
            id: _device_medians([line.devices[id] for line in metrics if id in line.devices]) for id in ids
        },
    )


def _device_medians(figures: Sequence[DeviceFigures]) -> DeviceFigures:
    peaks = [f.peak_memory_bytes for f in figures if f.peak_memory_bytes is not None]
    sources = {f.source for f in figures}
    return DeviceFigures(
        compute_s=median(f.compute_s for f in figures),
        communicate_s=median(f.communicate_s for f in figures),
        idle_s=median(f.idle_s for f in figures),
        energy_joules=median(f.energy_joules for f in figures),
        peak_memory_bytes=max(peaks, default=None),
        source="missing" if "missing" in sources else "modelled" if "modelled" in sources else "measured",
    )


def _energy_source(steps: Iterable[Mapping[str, DeviceFigures]]) -> EnergySource:
    sources = {figures.source for devices in steps for figures in devices.values()}
    if "missing" in sources or not sources:
        return "missing"
    return sources.pop() if len(sources) == 1 else "mixed"


def _validation_notes(validation: Sequence[Validation]) -> list[str]:
    if not validation:
        return []
    seconds = sum(one.seconds for one in validation)
    known = [one.joules for one in validation if one.joules is not None]
    energy = f" and {format_joules(sum(known))}" if len(known) == len(validation) else ""
    return [
        f"Validating took {format_seconds(seconds)}{energy}; neither that time nor its energy is in any figure here."
    ]


def _notes(measured: StepFigures, warmup: int, predicted: bool) -> list[str]:
    notes = [f"Times are measured; figures of a step are medians, the first {warmup} steps left out."]
    for source, text in (
        ("modelled", "Energy is modelled from watts and measured times, not metered, on"),
        ("missing", "Energy is unknown, and left out of every total, on"),
    ):
        ids = [id for id, figures in measured.devices.items() if figures.source == source]
        if ids:
            notes.append(f"{text} {', '.join(ids)}.")
    if not predicted:
        notes.append("The plan carries no prediction: it was not made by `colledge plan`.")
    return notes
