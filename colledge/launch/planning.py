"""`colledge plan`: from profiles, or a run's, to plan.json, words and a report. Never imports torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from colledge.errors import ConfigError, PlanError
from colledge.launch.job import OutputFolder
from colledge.launch.run_config import PoolConfig, RunConfig, load_pool, load_run, zero_stage
from colledge.planner import PlanningRequest, PlanningResult, PoolCosts, plan_memory, plan_training
from colledge.planner.caching import CachePlan, plan_cache, prefix_layers
from colledge.planner.explain import goal, limit_sentences
from colledge.planner.limits import find_limits
from colledge.planner.sources import basis, estimates, figure_sources
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import parse_record, read_json, write_atomically
from colledge.report import Bounds, FamilyFigures
from colledge.report.charts import timeline_bars
from colledge.report.markdown import plan_markdown
from colledge.report.planning import (
    BaselineFigures,
    PlanReport,
    RunningCosts,
    SourceOf,
    StepShares,
    render_plan,
    running_costs,
)
from colledge.report.tables import baseline_table, family_table, plan_table
from colledge.schedule import simulate
from colledge.units import format_joules, format_seconds

_STEPS_WITHOUT_A_RUN = 1000


@dataclass(frozen=True)
class PlanningInputs:
    """What to plan from, where the answer goes, and the steps of the run where they are known.

    The deadlines are the run's own, in seconds. `notes` says what was supposed of the pool; prices and grams are of
    a kilowatt-hour. `cache` is where activations come from that the plan trains on; `num_rows` of them are wanted.
    """

    pool: PoolProfile
    model: ModelProfile
    request: PlanningRequest
    folder: OutputFolder | None = None
    steps: int | None = None
    deadline_s: float | None = None
    deadline_step_s: float | None = None
    price_per_kwh: float | None = None
    carbon_grams_per_kwh: float | None = None
    notes: tuple[str, ...] = ()
    cache: CachePlan | None = None
    num_rows: int | None = None


def from_run(path: Path, overrides: Sequence[str]) -> PlanningInputs:
    """Return what a run's output folder holds to plan with.

    Raises:
        ConfigError: The run file is malformed, or the run has not been profiled.
    """
    run = load_run(path, overrides)
    folder = OutputFolder(run.output)
    profiles = read_profiles(folder)
    if profiles is None:
        raise ConfigError(f"{folder.path}: no profiles there.", fix=f"run `{_profiling(path)}` first.")
    if run.pool.is_file():
        _check_profiles(*profiles, run, load_pool(run.pool), path)
    request = request_of(run, trained_layers(run, profiles[1]))
    return PlanningInputs(*profiles, request, folder, run.steps, run.deadline_s, run.deadline_step_s)


def _check_profiles(
    pool: PoolProfile, model: ModelProfile, run: RunConfig, config: PoolConfig, path: Path
) -> None:
    """Check that profiles are of this run.

    Raises:
        ConfigError: They have other devices, rows or precision, or the pool is from the catalog and has changed since.
    """
    seen = ""
    here, there = [d.id for d in config.devices], [d.id for d in pool.devices]
    if sorted(here) != sorted(there):
        seen = f"they have the devices {', '.join(there)}; {run.pool} has {', '.join(here)}"
    elif model.sequence_length != run.data.sequence_length:
        seen = f"their rows have {model.sequence_length} tokens, the run's {run.data.sequence_length}"
    elif model.precision not in (None, run.precision):
        seen = f"they are of {model.precision}, the run trains in {run.precision}"
    elif not trains_the_same(run, model):
        seen = "they are of another method, or of other adapters"
    elif config.is_catalog and config.catalog_profile() != pool:
        seen = f"{run.pool} has changed since"
    if seen:
        raise ConfigError(
            f"the profiles in {run.output} are not of this run: {seen}.",
            fix=f"run `{_profiling(path)}` again.",
        )


def _profiling(path: Path) -> str:
    """Return the command that profiles a run, as a shell takes it."""
    return f"colledge profile {shlex.quote(str(path))}"


def trains_the_same(run: RunConfig, model: ModelProfile) -> bool:
    """Return whether a profile is of a model that is trained whole, or of such adapters, as the run says."""
    if run.adapters is None or model.lora is None:
        return run.adapters is None and model.lora is None
    return run.adapters.costs_as(model.lora)


def from_profiles(
    pool_path: Path | None,
    model_path: Path | None,
    global_batch_size: int | None,
    objective: str,
    output: Path | None,
    wire_precision: str | None = None,
) -> PlanningInputs:
    """Return profiles measured elsewhere and what to plan for.

    Raises:
        ConfigError: A file or an option is missing or malformed.
    """
    if pool_path is None or model_path is None or global_batch_size is None:
        raise ConfigError(
            "nothing to plan from.",
            fix="give run.yaml, or --pool-profile, --model-profile and --global-batch-size together.",
        )
    values = {
        "global_batch_size": global_batch_size,
        "objective": objective,
        "wire_precision": wire_precision,
    }
    request = parse_record(PlanningRequest, values, "the command line")
    return PlanningInputs(
        read_json(PoolProfile, pool_path),
        read_json(ModelProfile, model_path),
        request,
        OutputFolder(output) if output is not None else None,
    )


def constrained(
    inputs: PlanningInputs, accounting: str | None, must_use: Sequence[str], switch_modes: bool
) -> PlanningInputs:
    """Return inputs with the options of the command line in place of the run's.

    Raises:
        ConfigError: There is no such accounting.
    """
    values = inputs.request.model_dump()
    if accounting is not None:
        values["accounting"] = accounting
    if must_use:
        values["must_use"] = tuple(must_use)
    values["switch_modes"] = switch_modes
    return replace(inputs, request=parse_record(PlanningRequest, values, "the command line"))


def with_cache(inputs: PlanningInputs) -> PlanningInputs:
    """Return inputs with a plan of what computes the activations that they train on, if they do.

    Of a deadline of the whole run, that comes first, where the number of rows is known.

    Raises:
        ConfigError: There is no such plan, or the deadline leaves no time after it.
    """
    request, steps = inputs.request, inputs.steps
    if request.layers is None:
        return inputs
    cache = plan_cache(inputs.pool, inputs.model, request)
    if inputs.deadline_s is not None and steps is not None and inputs.num_rows is not None:
        filling_s = cache.fill_figures(inputs.num_rows)[0]
        left_s = (inputs.deadline_s - filling_s) / steps
        if left_s <= 0:
            raise PlanError(
                f"filling the activation cache takes {format_seconds(filling_s)}, and the deadline is "
                f"{format_seconds(inputs.deadline_s)}.",
                fix="allow more time, or take activation_cache out.",
            )
        limits = [left_s] if inputs.deadline_step_s is None else [left_s, inputs.deadline_step_s]
        request = request.model_copy(update={"deadline_step_s": min(limits)})
    return replace(inputs, request=request, cache=cache)


def plan(inputs: PlanningInputs) -> PlanningResult:
    """Plan from profiles; writes the plan and its reports where there is a folder."""
    if inputs.folder is not None:
        inputs.folder.create()
    result = plan_training(inputs.pool, inputs.model, inputs.request)
    if inputs.folder is not None:
        write(result, inputs, inputs.folder)
    return result


def write(result: PlanningResult, inputs: PlanningInputs, folder: OutputFolder) -> None:
    """Write plan.json, planning.json, plan.html and plan.md."""
    report = make_report(result, inputs)
    write_atomically(folder.plan, result.best.to_json())
    write_atomically(folder.planning, result.to_json())
    write_cache(inputs.cache, folder)
    write_atomically(folder.plan_html, render_plan(report))
    write_atomically(folder.plan_markdown, plan_markdown(report))


def write_cache(cache: CachePlan | None, folder: OutputFolder) -> None:
    """Write activation-cache.json, or remove that of an earlier plan."""
    if cache is None:
        folder.cache.unlink(missing_ok=True)
    else:
        write_atomically(folder.cache, cache.to_json())


def trained_layers(run: RunConfig, model: ModelProfile) -> tuple[int, int] | None:
    """Return the layers above cached activations, or None where a run caches none.

    Raises:
        ConfigError: Nothing is worth caching.
    """
    if run.activation_cache is None:
        return None
    names = [layer.name for layer in model.layers]
    return prefix_layers(model.first_trained, names)[1], len(names)


def request_of(run: RunConfig, layers: tuple[int, int] | None = None) -> PlanningRequest:
    """Return what a run asks of the planner, for all layers or a range of them."""
    return PlanningRequest(
        global_batch_size=run.batch.global_size,
        objective=run.objective,
        accounting=run.accounting,
        must_use=run.must_use,
        must_not_use=run.must_not_use,
        deadline_step_s=run.step_limit_s,
        optimizer_state_factor=run.optimizer.state_factor,
        wire_precision=run.wire_precision,
        layers=layers,
        zero=zero_stage(run),
        backend=None if run.backend == "native" else run.backend,
    )


def read_profiles(folder: OutputFolder) -> tuple[PoolProfile, ModelProfile] | None:
    """Return the profiles in a folder, or None where there are none yet."""
    if not (folder.pool_profile.is_file() and folder.model_profile.is_file()):
        return None
    return read_json(PoolProfile, folder.pool_profile), read_json(ModelProfile, folder.model_profile)


def to_json(result: PlanningResult, inputs: PlanningInputs) -> str:
    """Return the planner's answer for programs: plan, families, frontier, bounds, baselines, reasons, planning_s.

    Where steps or rates are known there are running_costs too, notes on what was supposed of the pool, and
    activation_cache where activations are cached.
    """
    values = json.loads(result.to_json())
    values["plan"] = values.pop("best")
    chosen = FamilyFigures.of(result.best, marginal=inputs.request.accounting == "marginal")
    running = whole_run(chosen.energy_joules_per_step, inputs)
    if running is not None:
        values["running_costs"] = {
            name: value for name, value in asdict(running).items() if value is not None
        }
    if inputs.notes:
        values["notes"] = list(inputs.notes)
    if inputs.cache is not None:
        values["activation_cache"] = json.loads(inputs.cache.to_json())
    return json.dumps(values, indent=2)


def whole_run(joules_per_step: float, inputs: PlanningInputs) -> RunningCosts | None:
    """Return what the whole run takes, or 1000 steps where only rates are known."""
    rates = inputs.price_per_kwh, inputs.carbon_grams_per_kwh
    if inputs.steps is None and rates == (None, None):
        return None
    return running_costs(joules_per_step, inputs.steps or _STEPS_WITHOUT_A_RUN, *rates)


def make_report(result: PlanningResult, inputs: PlanningInputs) -> PlanReport:
    """Return everything that is shown of a planner's answer."""
    pool, model, request = inputs.pool, inputs.model, inputs.request
    best, marginal = result.best, request.accounting == "marginal"
    costs = PoolCosts(pool, model, best.wire_precision)
    limits = find_limits(best, costs, request.optimizer_state_factor)
    warnings, limited = estimates(best, request, costs), limit_sentences(limits, best, pool)
    sources = figure_sources(best, request, costs)
    groups: dict[tuple[str, str], list[str]] = {}
    for figure in sources:
        groups.setdefault((figure.what, figure.source), []).append(figure.name)
    modes = {place.shard.device: place.shard.mode for place in best.places()}
    chosen = FamilyFigures.of(best, marginal=marginal)
    memory = plan_memory(best, pool, model, request.optimizer_state_factor)
    return PlanReport(
        model=model.name,
        layer_names=tuple(layer.name for layer in model.layers),
        plan=best,
        goal=goal(request),
        marginal=marginal,
        tokens_per_step=best.global_batch_size * max(1, model.sequence_length - 1),
        bounds=Bounds(**result.bounds.model_dump()),
        families={name: FamilyFigures.of(p, marginal=marginal) for name, p in result.families.items()},
        baselines=tuple(
            BaselineFigures(
                one.name, FamilyFigures.of(one.plan, marginal=marginal) if one.plan else None, one.why_not
            )
            for one in result.baselines
        ),
        frontier=tuple(FamilyFigures.of(p, marginal=marginal) for p in result.frontier),
        shares=StepShares(
            headline=" ".join(limited),
            computing=limits.compute_share,
            bubble=limits.bubble_share,
            links=limits.link_share,
            slowest_device=limits.slowest_device,
        ),
        boundary_bytes=tuple(
            costs.boundary_bytes(stage.layers[1] - 1) * best.microbatch_size for stage in best.stages[:-1]
        ),
        memory={
            device: {
                name.removesuffix("_bytes").replace("_", " "): size for name, size in asdict(parts).items()
            }
            for device, parts in memory.items()
        },
        memory_bytes={device.id: device.memory_bytes for device in pool.devices},
        power={device.id: device.mode(modes.get(device.id)) for device in pool.devices},
        timeline=timeline_bars(best, simulate(best, costs, record=True)),
        basis=basis(sources),
        sources=tuple(SourceOf(what, names, source) for (what, source), names in groups.items()),
        estimates=warnings,
        reasons=(
            *inputs.notes,
            *(inputs.cache.sentences(model) if inputs.cache is not None else ()),
            *(reason for reason in result.reasons if reason not in (*warnings, *limited)),
        ),
        planning_s=result.planning_s,
        running=whole_run(chosen.energy_joules_per_step, inputs),
    )


def show(report: PlanReport, console: Console) -> None:
    """Print the plan as a picture, what it is compared with, its bounds and why; before all that, what is estimated."""
    if report.estimates:
        console.print(Text("This plan rests on estimates:", style="yellow"))
        _print_list(report.estimates, console)
        console.print()
    console.print(Text(f"The plan for {report.goal}; predictions are simulated from {report.basis}"))
    console.print(plan_table(report.plan, report.memory_bytes, boundary_bytes=report.boundary_bytes))
    console.print("The best plan found of each family (* chosen)", markup=False)
    console.print(
        family_table(
            report.families,
            samples_per_step=report.plan.global_batch_size,
            tokens_per_step=report.tokens_per_step,
            chosen=report.chosen.description,
        )
    )
    if report.baselines:
        console.print("What simpler planners would do")
        console.print(baseline_table(report))
    console.print(Text(_bounds_text(report)))
    if report.running is not None:
        console.print(Text(f"{report.running.steps:,} steps take {report.running.text()} (modelled)"))
    console.print(Text(report.shares.headline))
    console.print()
    _print_list(report.reasons, console)


def _bounds_text(report: PlanReport) -> str:
    time, energy = report.time_ratio, report.energy_ratio
    parts = []
    if time is not None and report.bounds.step_s is not None:
        parts.append(f"T/LB-T {time:.2f} (no plan takes less than {format_seconds(report.bounds.step_s)})")
    if energy is not None and report.bounds.energy_joules_per_step is not None:
        least = format_joules(report.bounds.energy_joules_per_step)
        parts.append(f"E/LB-E {energy:.2f} (no plan takes less than {least})")
    return ", ".join(parts)


def _print_list(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(Text(f"- {line}"))
