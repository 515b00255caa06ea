"""One run from its files to its report: read, profile, plan, train, report; what the commands and the demo do.

run.yaml + pool.yaml -> profile -> plan -> train -> report       each step reads and writes files of out/
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from colledge.data import Say
from colledge.errors import ConfigError, PlanError
from colledge.launch import caching, modelling, planning
from colledge.launch.inputs import RunData, check_output, find_model, load_data, open_model
from colledge.launch.job import Job, Outcome, OutputFolder
from colledge.launch.planning import PlanningInputs
from colledge.launch.progress import ProfilingProgress, TrainingProgress
from colledge.launch.rendezvous import Supervisor
from colledge.launch.run_config import (
    PoolConfig,
    RunConfig,
    load_pool,
    load_run,
    read_deepspeed,
    zero_stage,
)
from colledge.models import HuggingFaceCausalLM, ModelWeights
from colledge.models.conversion import stores_weights
from colledge.parallel.backends import check_backend_plan, check_installed
from colledge.parallel.backends.zero_config import check_config, complete_config
from colledge.parallel.checkpoint import find_checkpoint, find_whole_checkpoint
from colledge.plan import Plan, read_plan
from colledge.planner import PlanningResult, PoolCosts, check_memory, predict
from colledge.planner.caching import CachePlan, prefix_layers
from colledge.planner.explain import rounding
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import read_json, write_atomically
from colledge.report import Bounds, FamilyFigures, Report, build_report, read_metrics
from colledge.report.caching import CacheFill, CacheSaving
from colledge.report.charts import Bar, timeline_bars
from colledge.report.html import render
from colledge.report.tables import comparison_table
from colledge.report.trackers import check_tracker
from colledge.schedule import simulate
from colledge.settings import Emulation
from colledge.units import format_bytes, format_seconds

_MANY_BYTES = 2 * 1024**3  # of weights, whose reading may take a while


@dataclass(frozen=True)
class Inputs:
    """What a run is made of, checked; `weights` are None where none are there to be read."""

    run: RunConfig
    pool: PoolConfig
    model_folder: Path
    model: HuggingFaceCausalLM
    weights: ModelWeights | None = None
    notes: tuple[str, ...] = ()  # what of the data is not trained on
    num_rows: tuple[int, int] = (0, 0)  # to train on, and to validate with

    @property
    def folder(self) -> OutputFolder:
        """Where the run's files go."""
        return OutputFolder(self.run.output)


def read_inputs(
    path: Path, overrides: Sequence[str] = (), with_data: bool = True, say: Say | None = None
) -> Inputs:
    """Return a run's inputs; the model's structure and the data's first fault are found here.

    Args:
        path: run.yaml.
        overrides: `key=value` changes.
        with_data: Whether the data and the weights must be there; profiling needs neither.
        say: Told now and then how far reading the data is.

    Raises:
        ConfigError: A file, a key, the model or the data is not usable.
    """
    run = load_run(path, overrides)
    if not run.pool.is_file():
        raise ConfigError(f"{path}: pool is {run.pool}, and there is no such file.", fix="give a pool.yaml.")
    pool = load_pool(run.pool)
    if with_data and pool.is_catalog:
        raise ConfigError(
            f"{run.pool}: its devices are from the catalog, which is to plan with: there is nothing to train on.",
            fix="list real devices in pool.yaml.",
        )
    folder = find_model(run.model)
    model = open_model(run, folder)
    if run.activation_cache is not None:
        prefix_layers(model.first_trained, model.layer_names)
    check_output(run, folder)
    skeleton = model.skeleton()
    weights = ModelWeights(folder, skeleton) if with_data or stores_weights(folder, skeleton) else None
    notes = weights.notes() if weights is not None else ()
    num_rows = (0, 0)
    if with_data:
        check_tracker(run.report_to)
        check_backend(run, pool)
        data = load_data(run, folder, say)
        check_data(data, model)
        notes, num_rows = (*notes, *data.notes()), data.num_rows
    with OutputFolder(run.output).locked():
        return Inputs(run, pool, folder, model, weights, notes, num_rows)


def check_weights(inputs: Inputs, console: Console) -> None:
    """Read every weight once; say so where that takes a while.

    Raises:
        ModelError: A file is damaged, or a weight holds a number that is none.
    """
    weights = inputs.weights
    assert weights is not None  # else reading the inputs said that there are none
    if weights.num_bytes > _MANY_BYTES:
        console.print(f"reading {format_bytes(weights.num_bytes)} of weights, to check them", highlight=False)
    weights.check_values()


def check_backend(run: RunConfig, pool: PoolConfig) -> None:
    """Check that the run's backend is installed here, agrees with run.yaml and runs on the pool's devices.

    Raises:
        ConfigError: It is not, or does not.
    """
    if run.backend == "native":
        return
    check_installed(run.backend)
    if run.deepspeed is not None:
        check_config(read_deepspeed(run.deepspeed), run.optimizer, run.batch.global_size)
    for device in pool.devices:
        if device.accelerator != "cpu" or device.emulate != Emulation():
            what = "emulates a slower one" if device.accelerator == "cpu" else f"is {device.accelerator}"
            raise ConfigError(
                f"backend {run.backend} trains on CPUs as they are; device {device.id!r} {what}.",
                fix="change the device in pool.yaml, or set backend: native.",
            )


def check_data(data: RunData, model: HuggingFaceCausalLM) -> None:
    """Check that a model can read the data.

    Raises:
        ConfigError: A row is longer than the model's positions, or a token is not in its vocabulary.
    """
    sizes = model.config.get_text_config()
    positions = getattr(sizes, "max_position_embeddings", None)
    length = data.train.sequence_length
    if positions is not None and length > positions:
        raise ConfigError(
            f"data.sequence_length is {length}, the model has {positions} positions.",
            fix=f"set data.sequence_length to at most {positions}.",
        )
    largest = max(rows.largest for rows in (data.train, data.validation) if rows is not None)
    if largest >= sizes.vocab_size:
        raise ConfigError(
            f"the tokenizer makes token {largest}, the model's vocabulary has {sizes.vocab_size}.",
            fix="give the tokenizer that belongs to this model.",
        )


def profile(inputs: Inputs, console: Console) -> None:
    """Measure the pool and the model on it; writes pool-profile.json and model-profile.json.

    Of a pool from the catalog nothing is measured.
    """
    devices = tuple(device.id for device in inputs.pool.devices)
    if inputs.pool.is_catalog:
        console.print(f"nothing is measured: {', '.join(devices)} are from the catalog", highlight=False)
        modelling.write_profiles(inputs.run, inputs.pool, inputs.model, inputs.model_folder, inputs.folder)
        return
    console.print(f"profiling {len(devices)} devices: {', '.join(devices)}")
    began_s = time.monotonic()
    supervisor = Supervisor(_job(inputs, "profile", devices))
    with ProfilingProgress(inputs.folder.log("coordinator"), console) as progress:
        supervisor.run(progress)
    console.print(f"profiled in {format_seconds(time.monotonic() - began_s)}")


@dataclass(frozen=True)
class Chosen:
    """A plan to train with; `planning` is the planner's answer to `asked`, None for a plan that was given.

    `cache` is where the activations come from that it trains on, if it does.
    """

    plan: Plan
    planning: PlanningResult | None
    asked: PlanningInputs | None = None
    cache: CachePlan | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that train, and those that only fill the cache."""
        more = self.cache.prefix.devices if self.cache is not None else ()
        return tuple(dict.fromkeys((*self.plan.devices, *more)))

    def write(self, folder: OutputFolder) -> None:
        """Write plan.json, and what the planner said about it; of a plan that was given it says nothing."""
        if self.planning is not None and self.asked is not None:
            planning.write(self.planning, self.asked, folder)
            return
        write_atomically(folder.plan, self.plan.to_json())
        planning.write_cache(self.cache, folder)
        for stale in (folder.planning, folder.plan_html, folder.plan_markdown):
            stale.unlink(missing_ok=True)


def choose_plan(inputs: Inputs, plan_path: Path | None, console: Console) -> Chosen:
    """Return the plan to train with: the given one, or the best for the folder's profiles. Writes nothing.

    Raises:
        ConfigError: The plan does not fit the model, the batch, the pool or a device's memory, or there is neither
            a plan nor a profile.
    """
    profiles = read_profiles(inputs)
    if plan_path is None:
        if profiles is None:
            raise ConfigError(
                f"{inputs.folder.path} holds no profiles of this run.",
                fix="run `colledge profile` first, or give --plan.",
            )
        console.print(f"planning from the profiles in {inputs.folder.path}", highlight=False)
        asked = _asked(inputs, profiles)
        result = planning.plan(asked)
        planning.show(planning.make_report(result, asked), console)
        chosen = Chosen(result.best, result, asked, asked.cache)
        _say_disks(chosen, inputs, console)
        return chosen
    given = divided(read_plan(plan_path), inputs.run)
    check_plan(given, inputs)
    for line in rounding(given, inputs.run.precision):
        console.print(line)
    if profiles is None:
        if inputs.run.activation_cache is not None:
            raise ConfigError(
                f"activation_cache needs the profiles of this run, and {inputs.folder.path} holds none.",
                fix="run `colledge profile` first.",
            )
        console.print("no profiles of this run: memory is not checked and time is not predicted")
        return Chosen(given.model_copy(update={"prediction": None}), None)
    factor = inputs.run.optimizer.state_factor
    check_memory(given, *profiles, factor)
    given = given.model_copy(update={"prediction": predict(given, *profiles, factor)})
    asked = _asked(inputs, profiles)
    wanted = asked.request.layers or (0, given.num_layers)
    if given.layer_range != wanted:
        raise PlanError(
            f"the plan runs layers [{given.layer_range[0]}, {given.layer_range[1]}), the run trains layers "
            f"[{wanted[0]}, {wanted[1]}){' from cached activations' if asked.cache is not None else ''}.",
            fix="plan again, or change activation_cache in run.yaml.",
        )
    chosen = Chosen(given, None, None, asked.cache)
    _say_disks(chosen, inputs, console)
    return chosen


def _asked(inputs: Inputs, profiles: tuple[PoolProfile, ModelProfile]) -> PlanningInputs:
    """Return what to plan from for a run."""
    run, (num_train, num_validation) = inputs.run, inputs.num_rows
    asked = PlanningInputs(
        *profiles,
        planning.request_of(run, planning.trained_layers(run, profiles[1])),
        steps=run.steps,
        deadline_s=run.deadline_s,
        deadline_step_s=run.deadline_step_s,
        num_rows=min(num_train, run.steps * run.batch.global_size) + num_validation,
    )
    return planning.with_cache(asked)


def _say_disks(chosen: Chosen, inputs: Inputs, console: Console) -> None:
    """Say what a plan's activation cache takes on disks, if it has one.

    Raises:
        ConfigError: It is more than the limit.
    """
    if chosen.cache is not None:
        said = caching.disk_sentence(chosen.plan, chosen.cache, inputs.run, inputs.num_rows)
        console.print(said, highlight=False)


def divided(plan: Plan, run: RunConfig) -> Plan:
    """Return a given plan with what the run divides over replicas, equally where the plan does not say how.

    Raises:
        PlanError: The plan divides something else, or for another backend.
    """
    zero, backend = zero_stage(run), run.backend if run.backend != "native" else None
    if plan.zero is not None and (plan.zero, plan.backend) != (zero, backend):
        raise PlanError(
            f"the plan has zero: {plan.zero} for backend {plan.backend or 'native'}, the run has "
            f"{'no zero' if zero is None else f'zero: {zero}'} for backend {run.backend}.",
            fix="plan again, take zero and backend out of the plan, or make the run agree.",
        )
    shares = [place.shard.device for place in plan.places() if place.shard.state_share is not None]
    if zero is None and shares:
        raise PlanError(
            f"the plan gives {shares[0]!r} a state_share, and the run divides no optimizer state.",
            fix="set zero: 1 in run.yaml, or take state_share out of the plan.",
        )
    return plan.model_copy(update={"zero": zero, "backend": backend})


def read_profiles(inputs: Inputs) -> tuple[PoolProfile, ModelProfile] | None:
    """Return the profiles in a run's folder; None where they are of another pool, model, method, precision or rows."""
    profiles = planning.read_profiles(inputs.folder)
    if profiles is None:
        return None
    pool, model = profiles
    same = (
        {device.id for device in pool.devices} == {device.id for device in inputs.pool.devices}
        and tuple(layer.name for layer in model.layers) == inputs.model.layer_names
        and model.sequence_length == inputs.run.data.sequence_length
        and model.precision in (None, inputs.run.precision)
        and model.mixed_precision == inputs.run.mixed_precision
        and model.frozen_precision == inputs.run.frozen_precision
        and planning.trains_the_same(inputs.run, model)
    )
    return profiles if same else None


def check_plan(chosen: Plan, inputs: Inputs) -> None:
    """Check a plan against the run.

    Raises:
        PlanError: It names an unknown device, or is for another model, batch or wire precision.
    """
    known = [device.id for device in inputs.pool.devices]
    for device in chosen.devices:
        if device not in known:
            raise PlanError(
                f"the plan uses device {device!r}, which {inputs.run.pool} does not have.",
                fix=f"use {', '.join(known)}, or add the device.",
            )
    chosen.check_model(len(inputs.model.layer_names), inputs.model.shard_units)
    if chosen.global_batch_size != inputs.run.batch.global_size:
        raise PlanError(
            f"the plan's global_batch_size is {chosen.global_batch_size}, the run's batch.global_size is "
            f"{inputs.run.batch.global_size}.",
            fix="plan again, or give the run the plan's batch size.",
        )
    exact = (None, inputs.run.precision, chosen.wire_precision)
    if chosen.num_stages > 1 and inputs.run.wire_precision not in exact:
        raise PlanError(
            f"the run's wire_precision is {inputs.run.wire_precision}, the plan has none: under it nothing is rounded.",
            fix="plan again, add wire_precision to the plan, or leave it out of the run.",
        )


def find_start(inputs: Inputs, resume: bool, console: Console) -> Path | None:
    """Return the checkpoint to go on from, None to start at step 1; say what is wrong with later ones.

    Raises:
        ConfigError: An earlier run left a checkpoint that a new one would hide, or all that it left are damaged.
    """
    if not resume:
        saved = find_checkpoint(inputs.run.output)
        if saved is not None:
            raise ConfigError(
                f"{inputs.run.output} holds {saved.name} of an earlier run.",
                fix="add --resume auto to go on from it, set another output, or delete it.",
            )
        return None
    checkpoint, faults = find_whole_checkpoint(inputs.run.output)
    for fault in faults:
        console.print(f"passed over a damaged checkpoint: {fault}", highlight=False, markup=False)
    found = (
        f"going on from {checkpoint}" if checkpoint is not None else "no checkpoint there: starting at step 1"
    )
    console.print(found, highlight=False, markup=False)
    return checkpoint


def training_job(inputs: Inputs, chosen: Chosen, checkpoint: Path | None) -> Job:
    """Return the job that trains under a plan: only the devices that the plan uses.

    Raises:
        ConfigError: The run's backend cannot run the plan, or go on from a checkpoint.
    """
    run = inputs.run
    check_backend_plan(run.backend, chosen.plan)
    if run.deepspeed is not None:
        complete_config(read_deepspeed(run.deepspeed), run.optimizer, chosen.plan)
        if checkpoint is not None:
            raise ConfigError(
                f"backend deepspeed cannot go on from {checkpoint}: it takes no optimizer state.",
                fix="set backend: native or fairscale, or another output.",
            )
    return _job(inputs, "train", chosen.devices, checkpoint)


def train(inputs: Inputs, chosen: Chosen, console: Console, checkpoint: Path | None = None) -> None:
    """Train under a plan; writes metrics.jsonl, checkpoints and the trained model.

    Raises:
        ColledgeError: What ended the run.
    """
    folder = inputs.folder
    supervisor = Supervisor(training_job(inputs, chosen, checkpoint))
    chosen.write(folder)
    console.print(f"training {inputs.run.steps} steps under {chosen.plan.describe()}", highlight=False)
    with TrainingProgress(folder, inputs.run.steps, console) as progress:
        supervisor.run(progress)
    for sentence in read_json(Outcome, folder.outcome).sentences():
        console.print(sentence, highlight=False)
    trained = f"model in {folder.model}" if inputs.run.adapters is None else f"adapter in {folder.adapter}"
    console.print(f"saved the trained {trained}")


def report(folder: OutputFolder) -> Report:
    """Compare what was predicted with what was measured; writes report.json and report.html.

    Raises:
        ConfigError: The folder is not that of a run that trained.
    """
    chosen = read_plan(folder.plan)
    metrics = read_metrics(folder.metrics)
    if not metrics:
        raise ConfigError(
            f"{folder.metrics}: holds no whole step, so there is nothing to report.", fix="train first."
        )
    job = read_json(Job, folder.job)
    if chosen.global_batch_size != job.run.batch.global_size:
        raise ConfigError(
            f"{folder.plan}: global_batch_size is {chosen.global_batch_size}, and {folder.job.name} says "
            f"{job.run.batch.global_size}.",
            fix="put back the plan.json that the run trained under.",
        )
    result = read_json(PlanningResult, folder.planning) if folder.planning.is_file() else None
    profiles = planning.read_profiles(folder) if chosen.prediction is not None else None
    outcome = read_json(Outcome, folder.outcome).sentences() if folder.outcome.is_file() else []
    saving = None
    if folder.cache.is_file() and folder.filled.is_file():
        uncached = read_json(CachePlan, folder.cache).uncached
        figures = uncached.prediction if uncached is not None else None
        saving = CacheSaving.of(read_json(CacheFill, folder.filled), metrics, figures)
    bounds = None
    if result is not None:
        bounds = Bounds(**result.bounds.model_dump())
    made = build_report(
        chosen,
        metrics,
        model=job.model.name,
        families={name: FamilyFigures.of(p) for name, p in result.families.items()} if result else None,
        bounds=bounds,
        reasons=result.reasons if result else (),
        notes=(*job.notes, *outcome),
        saving=saving,
    )
    bars: Sequence[Bar] = ()
    modes = {device.id: device.power_mode() for device in job.pool.devices}
    if profiles is not None:
        bars = timeline_bars(
            chosen, simulate(chosen, PoolCosts(*profiles, chosen.wire_precision), record=True)
        )
    write_atomically(folder.report_json, made.to_json())
    write_atomically(folder.report_html, render(made, metrics, bars, modes))
    return made


def show_report(made: Report, folder: OutputFolder, console: Console) -> None:
    """Print predicted against measured, and where the whole report is."""
    console.print(comparison_table(made))
    validated = ""
    if made.validation:
        last = made.validation[-1].loss
        validated = f", on the validation data {last:.3f} (perplexity {math.exp(min(last, 700)):.2f})"
    error = "" if made.step_error is None else f", predicted within {abs(made.step_error):.1%}"
    console.print(
        f"step time {format_seconds(made.measured.step_s)} (median){error}; loss {made.first_loss:.3f} -> "
        f"{made.final_loss:.3f}{validated}; {made.energy_text(made.total_energy_joules)} in all ({made.energy_source})",
        highlight=False,
    )
    for sentence in made.activation_cache.sentences() if made.activation_cache is not None else ():
        console.print(sentence, highlight=False)
    console.print(f"report: {folder.report_html}", highlight=False)


def _job(inputs: Inputs, kind: str, devices: tuple[str, ...], resume: Path | None = None) -> Job:
    return Job.model_validate(
        {
            "kind": kind,
            "run": inputs.run,
            "pool": inputs.pool,
            "model": inputs.model_folder,
            "devices": devices,
            "output": inputs.run.output.resolve(),
            "resume": resume,
            "notes": inputs.notes,
        }
    )
