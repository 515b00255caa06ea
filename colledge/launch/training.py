"""The training loop: steps, validation, metrics, checkpoints, and the trained model at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from colledge.data import rows_for_step
from colledge.errors import ColledgeError
from colledge.launch.inputs import load_data
from colledge.launch.job import Job, OutputFolder
from colledge.launch.learning_rate import learning_rates
from colledge.launch.saved_model import save_adapter, save_model
from colledge.launch.stop import StopRequest
from colledge.models import HuggingFaceCausalLM, SafetensorsDirectory
from colledge.models.lora import StartingValues
from colledge.parallel import Emulation, Engine, EngineSettings, RouteEstimate, StepRecord, World
from colledge.parallel.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from colledge.plan import DeviceFigures, Plan, read_plan
from colledge.profiles import PoolProfile, PowerMode
from colledge.records import read_json
from colledge.report import StepMetrics, append_metrics
from colledge.units import format_joules, format_seconds

_LINE_EVERY_S = 2.0
_DEADLINE_STEPS = (
    20  # a wait may take as long as this many predicted steps, where that is longer than the default
)


class Training:
    """A training run: steps, metrics, checkpoints, and the trained model at the end."""

    def __init__(self, job: Job, world: World, ranks: Mapping[str, int], model: HuggingFaceCausalLM) -> None:
        self._job, self._folder = job, OutputFolder(job.output)
        self._plan = read_plan(self._folder.plan)
        self._pool = (
            read_json(PoolProfile, self._folder.pool_profile) if self._folder.pool_profile.is_file() else None
        )
        self._data = load_data(job.run, job.model)
        self._modes = _power_modes(job, self._plan, self._pool)
        weights = StartingValues(SafetensorsDirectory(job.model), model.adapter_shapes, job.run.seed)
        if self._plan.prediction is not None:
            predicted_s = self._plan.prediction.step_s
            world.wire.timeout_s = max(world.wire.timeout_s, _DEADLINE_STEPS * predicted_s)
        self._engine = Engine(self._plan, model, weights, self._settings(), ranks, world.wire)
        self._printed_s = 0.0

    def _settings(self) -> EngineSettings:
        devices = {device.id: device for device in self._job.pool.devices if device.id in self._plan.devices}
        emulations = {id: device.emulate for id, device in devices.items()}
        return EngineSettings(
            optimizer=self._job.run.optimizer,
            precision=self._job.run.precision,
            seed=self._job.run.seed,
            accelerators={id: device.accelerator for id, device in devices.items()},
            threads={id: device.threads for id, device in devices.items() if device.threads is not None},
            emulations=emulations if any(e != Emulation() for e in emulations.values()) else {},
            routes=_routes(self._plan, self._pool) if self._pool is not None else None,
        )

    def run(self, stop: StopRequest) -> None:
        """Train to the last step or until asked to stop; save the model or a checkpoint."""
        run, engine = self._job.run, self._engine
        if self._job.resume:
            self._resume()
        else:
            self._folder.metrics.unlink(missing_ok=True)
        rates = learning_rates(run.optimizer, run.steps)
        while engine.step < run.steps and not stop.asked:
            rows = self._data.train
            indices = rows_for_step(rows.num_rows, run.batch.global_size, run.seed, engine.step)
            rate = rates[engine.step]
            record = engine.train_step(rows.batch(indices), rate)
            line = self._write(record, rate)
            if run.checkpoint_every and record.step % run.checkpoint_every == 0 and record.step < run.steps:
                save_checkpoint(engine, self._job.output, run.seed)
            if not stop.asked:
                self._validate(line)
        if stop.asked and engine.step < run.steps:
            path = save_checkpoint(engine, self._job.output, run.seed)
            print(f"stopped after step {engine.step}; saved {path}", flush=True)
        else:
            print(f"trained {engine.step} steps; saved {self._save()}", flush=True)
        engine.close()

    def _resume(self) -> None:
        checkpoint = find_checkpoint(self._job.output)
        if checkpoint is None:
            print("no checkpoint to resume from: starting at step 1", flush=True)
            self._folder.metrics.unlink(missing_ok=True)
            return
        state = load_checkpoint(self._engine, checkpoint, self._job.run.seed)
        print(f"resumed from {checkpoint.name}: going on at step {state.step + 1}", flush=True)

    def _save(self) -> Path:
        """Save what was trained; return where."""
        run, adapters = self._job.run, self._job.run.adapters
        if adapters is None:
            save_model(self._engine, self._job.model, self._folder.model)
            return self._folder.model
        save_adapter(self._engine, adapters, run.model, self._job.model, self._folder.adapter)
        return self._folder.adapter

    def _write(self, record: StepRecord, learning_rate: float) -> StepMetrics:
        if not math.isfinite(record.loss) or not math.isfinite(record.gradient_norm or 0.0):
            raise ColledgeError(
                f"the loss is {record.loss} and the gradient's norm {record.gradient_norm} at step {record.step}: "
                "training diverged.",
                fix="lower optimizer.learning_rate or set optimizer.gradient_clipping.",
            )
        line = step_metrics(record, self._modes, learning_rate)
        append_metrics(self._folder.metrics, line)
        now_s = time.monotonic()
        if now_s - self._printed_s >= _LINE_EVERY_S or record.step == self._job.run.steps:
            self._printed_s = now_s
            left_s = (self._job.run.steps - record.step) * record.step_s
            print(
                f"step {record.step}/{self._job.run.steps}  loss {record.loss:.4f}  "
                f"{format_seconds(record.step_s)} a step  {record.num_targets / record.step_s:.0f} tokens/s  "
                f"{format_joules(line.energy_joules)} a step  {format_seconds(left_s)} left",
                flush=True,
            )
        return line

    def _validate(self, line: StepMetrics) -> None:
        """Write a step's line again, with the mean loss on the validation data, where that is due."""
        run, rows, step = self._job.run, self._data.validation, line.step
        if rows is None or not run.evaluate_every or (step % run.evaluate_every and step != run.steps):
            return
        began_s, total, count = time.perf_counter(), 0.0, 0
        for start in range(0, rows.num_rows, run.batch.global_size):
            indices = torch.arange(start, min(start + run.batch.global_size, rows.num_rows))
            part, targets = self._engine.evaluate(rows.batch(indices))
            total, count = total + part, count + targets
        loss, took_s = total / count, time.perf_counter() - began_s
        validated = {"validation_loss": loss, "validation_s": took_s}
        append_metrics(self._folder.metrics, line.model_copy(update=validated))
        print(
            f"step {step}/{run.steps}  validation loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.2f}",
            flush=True,
        )


def step_metrics(record: StepRecord, modes: Mapping[str, PowerMode], learning_rate: float) -> StepMetrics:
    """Return a step's line of metrics.jsonl; the joules are modelled from each device's watts.

    Args:
        record: What the engine measured.
        modes: The power mode of every device of the pool; one that took no part in the step idled.
        learning_rate: Of the step.
    """
    devices = {}
    for id, mode in modes.items():
        own = record.devices.get(id)
        compute_s = min(own.compute_s, record.step_s) if own else 0.0
        communicate_s = min(own.communicate_s, record.step_s - compute_s) if own else 0.0
        devices[id] = DeviceFigures(
            compute_s=compute_s,
            communicate_s=communicate_s,
            idle_s=record.step_s - compute_s - communicate_s,
            energy_joules=mode.joules(record.step_s, compute_s, communicate_s),
            peak_memory_bytes=own.peak_memory_bytes if own else None,
            source="modelled",
        )
    return StepMetrics(
        step=record.step,
        loss=record.loss,
        step_s=record.step_s,
        tokens=record.num_targets,
        energy_joules=sum(figures.energy_joules for figures in devices.values()),
        learning_rate=learning_rate,
        gradient_norm=record.gradient_norm,
        devices=devices,
    )


def _power_modes(job: Job, plan: Plan, pool: PoolProfile | None) -> dict[str, PowerMode]:
    """Return the mode of every device: the one its shard runs in where profiled, else what pool.yaml declares."""
    chosen = {place.shard.device: place.shard.mode for place in plan.places()}
    profiled = {device.id: device for device in pool.devices} if pool is not None else {}
    modes = {}
    for device in job.pool.devices:
        known = profiled.get(device.id)
        modes[device.id] = known.mode(chosen.get(device.id)) if known is not None else device.power_mode()
    return modes


def _routes(plan: Plan, pool: PoolProfile) -> dict[str, dict[str, RouteEstimate]]:
    known = {device.id for device in pool.devices}
    routes: dict[str, dict[str, RouteEstimate]] = {}
    for target in plan.devices:
        for source in plan.devices:
            if source != target and {source, target} <= known:
                route = pool.route(source, target)
                routes.setdefault(target, {})[source] = RouteEstimate(
                    latency_s=route.latency_s, bandwidth_bytes_per_s=route.bandwidth_bytes_per_s
                )
    return routes
