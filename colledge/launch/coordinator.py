"""Rank 0 of a run: reads the job in an output folder, drives the devices, writes what happened.

    torchrun ... -m colledge.launch.coordinator OUT_DIR

SIGTERM or SIGINT ends a training after the step under way, with a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from colledge.data import rows_for_step
from colledge.errors import ColledgeError, LaunchError
from colledge.launch.inputs import load_data
from colledge.launch.job import Failure, Job, OutputFolder
from colledge.launch.rendezvous import LAUNCHER_VARIABLE
from colledge.models import HuggingFaceCausalLM, SafetensorsDirectory
from colledge.parallel import Emulation, Engine, EngineSettings, Message, RouteEstimate, StepRecord, World
from colledge.parallel.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from colledge.parallel.world import join_world, leave_world, timeout_from_environment
from colledge.plan import DeviceFigures, Plan, read_plan
from colledge.profiles import PoolProfile, PowerMode
from colledge.records import read_json, write_atomically
from colledge.report import StepMetrics, append_metrics
from colledge.units import format_joules, format_seconds

_LINE_EVERY_S = 2.0
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
_DEADLINE_STEPS = (
    20  # a wait may take as long as this many predicted steps, where that is longer than the default
)


class StopRequest:
    """Whether a signal has asked this process to end after the step under way, or its launcher is gone."""

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = int(os.environ.get(LAUNCHER_VARIABLE, "0"))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def asked(self) -> bool:
        """Whether to end. A run started by hand has no launcher to lose."""
        return self._signalled or (self._launcher != 0 and not psutil.pid_exists(self._launcher))


def run_job(job: Job, world: World, stop: StopRequest) -> None:
    """Do a job.

    Raises:
        ColledgeError: What ended it.
    """
    if world.size != len(job.devices) + 1:
        raise LaunchError(
            f"{world.size - 1} devices joined, wanted {len(job.devices)}: {', '.join(job.devices)}.",
            fix="start exactly the lines that --print-commands prints.",
        )
    ranks = {device: rank for rank, device in enumerate(job.devices, start=1)}
    model = HuggingFaceCausalLM.from_directory(job.model)
    if job.kind == "profile":
        _profile(job, world, ranks, model)
    else:
        _Training(job, world, ranks, model).run(stop)


def _profile(job: Job, world: World, ranks: Mapping[str, int], model: HuggingFaceCausalLM) -> None:
    from colledge.launch.profiling import profile_pool

    run = job.run
    pool_profile, model_profile = profile_pool(
        world.wire,
        ranks,
        job.pool.devices,
        model,
        name=job.model.name,
        sequence_length=run.data.sequence_length,
        global_batch_size=run.batch.global_size,
        precision=run.precision,
        optimizer=run.optimizer,
        progress=lambda line: print(line, flush=True),
    )
    folder = OutputFolder(job.output)
    write_atomically(folder.pool_profile, pool_profile.to_json())
    write_atomically(folder.model_profile, model_profile.to_json())


class _Training:
    """A training run: steps, metrics, checkpoints, and the trained model at the end."""

    def __init__(self, job: Job, world: World, ranks: Mapping[str, int], model: HuggingFaceCausalLM) -> None:
        self._job, self._folder = job, OutputFolder(job.output)
        self._plan = read_plan(self._folder.plan)
        self._pool = (
            read_json(PoolProfile, self._folder.pool_profile) if self._folder.pool_profile.is_file() else None
        )
        self._data = load_data(job.run, job.model)
        self._modes = _power_modes(job, self._plan, self._pool)
        weights = SafetensorsDirectory(job.model)
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
        while engine.step < run.steps and not stop.asked:
            rows = self._data.train
            indices = rows_for_step(rows.num_rows, run.batch.global_size, run.seed, engine.step)
            record = engine.train_step(rows.batch(indices))
            line = self._write(record)
            if run.checkpoint_every and record.step % run.checkpoint_every == 0 and record.step < run.steps:
                save_checkpoint(engine, self._job.output, run.seed)
            if not stop.asked:
                self._validate(line)
        if stop.asked and engine.step < run.steps:
            path = save_checkpoint(engine, self._job.output, run.seed)
            print(f"stopped after step {engine.step}; saved {path}", flush=True)
        else:
            save_model(engine, self._job.model, self._folder.model)
            print(f"trained {engine.step} steps; saved {self._folder.model}", flush=True)
        engine.close()

    def _resume(self) -> None:
        checkpoint = find_checkpoint(self._job.output)
        if checkpoint is None:
            print("no checkpoint to resume from: starting at step 1", flush=True)
            self._folder.metrics.unlink(missing_ok=True)
            return
        state = load_checkpoint(self._engine, checkpoint, self._job.run.seed)
        print(f"resumed from {checkpoint.name}: going on at step {state.step + 1}", flush=True)

    def _write(self, record: StepRecord) -> StepMetrics:
        if not math.isfinite(record.loss) or not math.isfinite(record.gradient_norm or 0.0):
            raise ColledgeError(
                f"the loss is {record.loss} and the gradient's norm {record.gradient_norm} at step {record.step}: "
                "training diverged.",
                fix="lower optimizer.learning_rate or set optimizer.gradient_clipping.",
            )
        line = step_metrics(record, self._modes)
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


def step_metrics(record: StepRecord, modes: Mapping[str, PowerMode]) -> StepMetrics:
    """Return a step's line of metrics.jsonl; the joules are modelled from each device's watts.

    Args:
        record: What the engine measured.
        modes: The power mode of every device of the pool; one that took no part in the step idled.
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
        gradient_norm=record.gradient_norm,
        devices=devices,
    )


def save_model(engine: Engine, source: Path, target: Path) -> None:
    """Write the trained model as a Hugging Face folder: the source's configuration and tokenizer, new weights.

    The folder is written beside its place and renamed into it.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for path in source.iterdir():
            if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, partial / path.name)
        tensors = {name: value for layer in engine.state_dict().values() for name, value in layer.items()}
        path = partial / "model.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
        path.chmod(0o644)
        config = json.loads((partial / "config.json").read_text())
        config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_atomically(partial / "config.json", json.dumps(config, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def _shut_down(world: World) -> None:
    """Tell every device to end, and wait until it heard."""
    for rank in range(1, world.size):
        world.wire.send_message(rank, Message({"command": "shutdown"}))
        world.wire.receive_message(rank, "shutting down")


def main() -> None:
    """Run the job in the folder that the command line names; leave error.json where it fails."""
    output = Path(sys.argv[1])
    folder = OutputFolder(output)
    stop = StopRequest()
    torch.set_num_threads(1)
    try:
        with folder.locked():
            try:
                job = read_json(Job, folder.job)
                world = join_world(timeout_from_environment())
                run_job(job, world, stop)
                _shut_down(world)
            except Exception as fault:
                failure = _failure(fault)
                write_atomically(folder.failure, failure.to_json())
                os._exit(failure.exit_code)  # sockets close now: that is what frees the devices
    except LaunchError as fault:  # the folder is another run's: leave nothing in it
        print(f"LaunchError: {fault}", file=sys.stderr, flush=True)
        os._exit(fault.exit_code)
    leave_world()


def _failure(fault: Exception) -> Failure:
    if isinstance(fault, ColledgeError):
        print(f"error: {fault}", file=sys.stderr, flush=True)
        return Failure(message=fault.message, fix=fault.fix, exit_code=fault.exit_code)
    traceback.print_exception(fault)
    if isinstance(fault, OSError | SafetensorError):
        return Failure(
            message=f"a file could not be read or written ({fault}).",
            fix="make room on that disk.",
            exit_code=2,
        )
    return Failure(
        message=f"the coordinator failed: {type(fault).__name__}: {fault}",
        fix="read the coordinator's log; this may be a fault of colledge.",
        exit_code=1,
    )


if __name__ == "__main__":
    main()
