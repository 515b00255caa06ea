"""`colledge plan`: from profiles, or a run's, to plan.json and words. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from colledge.errors import ConfigError
from colledge.launch.job import OutputFolder
from colledge.launch.run_config import RunConfig, load_run
from colledge.planner import PlanningRequest, PlanningResult, plan_training
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import parse_record, read_json, write_atomically
from colledge.report import FamilyFigures
from colledge.report.tables import family_table, plan_table


def from_run(
    path: Path, overrides: Sequence[str]
) -> tuple[PoolProfile, ModelProfile, PlanningRequest, OutputFolder]:
    """Return what a run's output folder holds to plan with.

    Raises:
        ConfigError: The run file is malformed, or the run has not been profiled.
    """
    run = load_run(path, overrides)
    folder = OutputFolder(run.output)
    profiles = read_profiles(folder)
    if profiles is None:
        raise ConfigError(f"{folder.path}: no profiles there.", fix=f"run `colledge profile {path}` first.")
    return *profiles, request_of(run), folder


def from_profiles(
    pool_path: Path | None, model_path: Path | None, global_batch_size: int | None, objective: str
) -> tuple[PoolProfile, ModelProfile, PlanningRequest]:
    """Return profiles measured elsewhere and what to plan for.

    Raises:
        ConfigError: A file or an option is missing or malformed.
    """
    if pool_path is None or model_path is None or global_batch_size is None:
        raise ConfigError(
            "nothing to plan from.",
            fix="give run.yaml, or --pool-profile, --model-profile and --global-batch-size together.",
        )
    values = {"global_batch_size": global_batch_size, "objective": objective}
    request = parse_record(PlanningRequest, values, "the command line")
    return read_json(PoolProfile, pool_path), read_json(ModelProfile, model_path), request


def plan(
    pool: PoolProfile, model: ModelProfile, request: PlanningRequest, folder: OutputFolder | None
) -> PlanningResult:
    """Plan from profiles; writes plan.json and planning.json where there is a folder."""
    result = plan_training(pool, model, request)
    if folder is not None:
        write_atomically(folder.plan, result.best.to_json())
        write_atomically(folder.planning, result.to_json())
    return result


def request_of(run: RunConfig) -> PlanningRequest:
    """Return what a run asks of the planner."""
    return PlanningRequest(
        global_batch_size=run.batch.global_size,
        objective=run.objective,
        deadline_step_s=run.step_limit_s,
        optimizer_state_factor=run.optimizer.state_factor,
    )


def read_profiles(folder: OutputFolder) -> tuple[PoolProfile, ModelProfile] | None:
    """Return the profiles in a folder, or None where there are none yet."""
    if not (folder.pool_profile.is_file() and folder.model_profile.is_file()):
        return None
    return read_json(PoolProfile, folder.pool_profile), read_json(ModelProfile, folder.model_profile)


def to_json(result: PlanningResult) -> str:
    """Return the planner's answer for programs: plan, families, frontier, bounds, reasons, planning_s."""
    values = json.loads(result.to_json())
    values["plan"] = values.pop("best")
    return json.dumps(values, indent=2)


def show(result: PlanningResult, pool: PoolProfile, model: ModelProfile, console: Console) -> None:
    """Print the family table, the plan and why."""
    samples = result.best.global_batch_size
    families = {name: FamilyFigures.of(family) for name, family in result.families.items()}
    console.print(
        family_table(
            families,
            samples_per_step=samples,
            tokens_per_step=samples * (model.sequence_length - 1),
            chosen=result.best.family,
        )
    )
    figures = result.best.prediction
    memory = {device.id: device.memory_bytes for device in pool.devices}
    console.print(plan_table(result.best, memory, figures.devices if figures else None))
    for reason in result.reasons:
        console.print(f"- {reason}", highlight=False)
