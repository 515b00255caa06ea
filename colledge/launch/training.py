"""The training loop: steps, validation, metrics, checkpoints, and the trained model at the end."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from functools import partial, reduce
from operator import add
from pathlib import Path

import torch

from colledge.data import rows_for_step
from colledge.errors import ColledgeError, ConfigError
from colledge.launch.caching import caches_of, fill_caches, numbered
from colledge.launch.engine_settings import engine_settings, measured_routes
from colledge.launch.inputs import load_data
from colledge.launch.job import LINE_EVERY_S, Job, Outcome, OutputFolder
from colledge.launch.learning_rate import learning_rates
from colledge.launch.saved_model import write_adapter, write_model
from colledge.launch.step_metrics import device_figures, power_modes, step_metrics
from colledge.launch.stop import StopRequest
from colledge.models import HuggingFaceCausalLM, ModelWeights
from colledge.models.lora import StartingValues
from colledge.parallel import Engine, StepRecord, World
from colledge.parallel.caching import ActivationCaches
from colledge.parallel.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    read_state,
    remove_checkpoints,
    save_checkpoint,
)
from colledge.plan import Plan, read_plan
from colledge.planner.caching import CachePlan
from colledge.profiles import PoolProfile
from colledge.records import read_json, write_atomically
from colledge.report import StepMetrics, append_metrics, keep_metrics
from colledge.report.caching import CacheFill
from colledge.report.trackers import TensorBoard
from colledge.report.validation import BestSoFar, best_so_far
from colledge.units import format_joules, format_seconds

# A wait may take as long as this many predicted steps, where that is longer than the default.
_DEADLINE_STEPS = 20


class Training:
    """A training run: steps, metrics, checkpoints, and the trained model at the end."""

    def __init__(self, job: Job, world: World, ranks: Mapping[str, int], model: HuggingFaceCausalLM) -> None:
        self._job, self._folder = job, OutputFolder(job.output)
        self._plan = read_plan(self._folder.plan)
        self._pool = (
            read_json(PoolProfile, self._folder.pool_profile) if self._folder.pool_profile.is_file() else None
        )
        self._data = load_data(job.run, job.model, partial(print, flush=True))
        self._modes = power_modes(job, self._plan, self._pool)
        self._model, self._ranks, self._wire = model, ranks, world.wire
        self._source = ModelWeights(job.model, model.skeleton())
        self._weights = StartingValues(self._source, model.adapter_shapes, job.run.seed)
        self._caches = None if job.run.activation_cache is None else self._find_caches()
        self._engine: Engine
        self._rates = learning_rates(job.run.optimizer, job.run.steps)
        self._losses: dict[int, float] = {}  # on the validation data, by step
        self._line: StepMetrics | None = None  # of the step that is done
        self._saved_step: int | None = None
        self._tracker: TensorBoard | None = None
        self._printed_s = 0.0

    def run(self, stop: StopRequest) -> None:
        """Train and validate to the end or until asked to stop; save the model or a checkpoint."""
        if self._caches is not None:
            self._fill(self._caches, stop)
        self._engine = self._make_engine(self._plan)
        self._begin()
        if self._job.run.report_to == "tensorboard":
            self._tracker = TensorBoard(self._folder.tensorboard, self._engine.step + 1)
        while not stop.asked and (self._validation_due or not self._ended):
            if self._validation_due:
                self._validate(stop)
            else:
                self._train_step()
        finished = self._ended and not self._validation_due
        if not finished:
            saved = (
                "nothing, for backend deepspeed keeps no checkpoints"
                if self._job.run.backend == "deepspeed"
                else self._save_checkpoint()
            )
            print(f"stopped after step {self._engine.step}; saved {saved}", flush=True)
        else:
            self._save_model()
        if self._tracker is not None:
            self._tracker.close()
        self._engine.close()
        if self._caches is not None:
            self._caches.close(remove=finished)

    def _make_engine(self, plan: Plan) -> Engine:
        """Give the devices their parts of a plan; a wait may last as long as some of its steps."""
        if plan.prediction is not None:
            limit_s = _DEADLINE_STEPS * plan.prediction.step_s
            self._wire.timeout_s = max(self._wire.timeout_s, limit_s)
        settings = engine_settings(self._job, plan, self._pool)
        return Engine(plan, self._model, self._weights, settings, self._ranks, self._wire)

    def _find_caches(self) -> ActivationCaches:
        row_shape = (self._data.train.sequence_length,)
        shape = self._model.boundary_shape(row_shape, self._plan.layer_range[0])
        routes = measured_routes(self._job.devices, self._pool) if self._pool is not None else {}
        return caches_of(self._job, self._wire, self._ranks, self._data, self._plan, shape, routes)

    def _fill(self, caches: ActivationCaches, stop: StopRequest) -> None:
        """Fill the activation cache, unless asked to stop; write what that took, before a resumption included."""
        prefix, path = read_json(CachePlan, self._folder.cache).prefix, self._folder.filled
        modes = power_modes(self._job, prefix, self._pool)
        fill = fill_caches(caches, lambda: self._make_engine(prefix), self._data, modes, stop)
        if self._job.resume is not None and path.is_file():
            fill = read_json(CacheFill, path) + fill
        write_atomically(path, fill.to_json())

    @property
    def _validation_due(self) -> bool:
        """Whether the loss on the validation data is wanted after the step that is done, and not known."""
        run, step = self._job.run, self._engine.step
        wanted = run.evaluate_every is not None and (step % run.evaluate_every == 0 or step == run.steps)
        return wanted and step > 0 and step not in self._losses

    @property
    def _ended(self) -> bool:
        """Whether no step is left, or none that early stopping lets go on."""
        return self._engine.step >= self._job.run.steps or self._stops_early

    @property
    def _stops_early(self) -> bool:
        stopping, best = self._job.run.early_stopping, self._best
        return stopping is not None and best is not None and best.failures >= stopping.patience

    @property
    def _best(self) -> BestSoFar | None:
        stopping = self._job.run.early_stopping
        return best_so_far(self._losses, stopping.threshold if stopping is not None else 0.0)

    def _begin(self) -> None:
        """Take up the checkpoint to go on from: its state, and the metrics up to its step."""
        folder, checkpoint = self._folder, self._job.resume
        folder.outcome.unlink(missing_ok=True)
        if checkpoint is None:
            folder.metrics.unlink(missing_ok=True)
            shutil.rmtree(folder.tensorboard, ignore_errors=True)
            return
        state = load_checkpoint(self._engine, checkpoint, self._job.run.seed)
        self._saved_step = state.step
        self._losses = dict(state.validation)
        lines = keep_metrics(folder.metrics, state.step)
        self._line = lines[-1] if lines and lines[-1].step == state.step else None
        print(f"resumed from {checkpoint.name}: going on at step {state.step + 1}", flush=True)
        best = self._best
        if self._job.run.keep_best and best is not None and best.step != state.step:
            try:
                read_state(checkpoint_path(self._job.output, best.step))
            except ConfigError as fault:
                self._losses.clear()
                print(
                    f"the best checkpoint is lost, so the best is looked for anew: {fault.message}",
                    flush=True,
                )

    def _train_step(self) -> None:
        run, engine, rows = self._job.run, self._engine, self._data.train
        rate = self._rates[engine.step]
        indices = rows_for_step(rows.num_rows, run.batch.global_size, run.seed, engine.step)
        self._write(engine.train_step(numbered(rows, indices), rate), rate)
        if run.checkpoint_every and engine.step % run.checkpoint_every == 0 and engine.step < run.steps:
            self._save_checkpoint()

    def _save_checkpoint(self) -> Path:
        """Save a checkpoint of the step that is done, unless it is there; remove those that need not stay."""
        run, folder, step = self._job.run, self._job.output, self._engine.step
        if self._saved_step != step:
            save_checkpoint(self._engine, folder, run.seed, self._losses)
            self._saved_step = step
        best = self._best if run.keep_best else None
        remove_checkpoints(folder, step, run.keep_checkpoints, best.step if best is not None else None)
        return checkpoint_path(folder, step)

    def _save_model(self) -> None:
        """Save the model, the best one where that is asked for, and say what came of the training."""
        run, engine, steps = self._job.run, self._engine, self._engine.step
        best = self._best if run.keep_best else None
        if best is not None and best.step != steps:
            checkpoint = checkpoint_path(self._job.output, best.step)
            try:
                read_state(checkpoint)
            except ConfigError:
                self._save_checkpoint()  # so that a resumed run has the last steps at least
                raise
            load_checkpoint(engine, checkpoint, run.seed)
        saved = self._save()
        why = None
        if self._stops_early and steps < run.steps and run.early_stopping is not None:
            why = f"{run.early_stopping.patience} evaluation(s) in a row did not lower the validation loss enough"
        outcome = Outcome(
            steps=steps, step=engine.step, best_loss=best.loss if best else None, stopped_early=why
        )
        write_atomically(self._folder.outcome, outcome.to_json())
        said = [f"trained {steps} steps; saved {saved}", *outcome.sentences()]
        print("\n".join(said), flush=True)

    def _save(self) -> Path:
        """Save what was trained; return where."""
        run, adapters = self._job.run, self._job.run.adapters
        if adapters is None:
            write_model(self._engine.layers(), self._source, self._folder.model)
            return self._folder.model
        layers = self._engine.layers(trained_only=True)
        write_adapter(layers, adapters, run.model, self._job.model, self._folder.adapter)
        return self._folder.adapter

    def _write(self, record: StepRecord, learning_rate: float) -> None:
        """Write a step's line, and now and then print it.

        Raises:
            ColledgeError: The loss or the gradient is no number.
        """
        self._check_finite("loss", record.loss)
        self._check_finite("norm of the gradient", record.gradient_norm or 0.0)
        self._line = line = step_metrics(record, self._modes, learning_rate)
        append_metrics(self._folder.metrics, line)
        if self._tracker is not None:
            self._tracker.write(line)
        now_s = time.monotonic()
        if now_s - self._printed_s >= LINE_EVERY_S or record.step == self._job.run.steps:
            self._printed_s = now_s
            left_s = (self._job.run.steps - record.step) * record.step_s
            print(
                f"step {record.step}/{self._job.run.steps}  loss {record.loss:.4f}  "
                f"{format_seconds(record.step_s)} a step  {record.num_targets / record.step_s:.0f} tokens/s  "
                f"{format_joules(line.energy_joules)} a step  {format_seconds(left_s)} left",
                flush=True,
            )

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ColledgeError(
                f"the {name} is {value} at step {self._engine.step}: training diverged.",
                fix="lower optimizer.learning_rate or set optimizer.gradient_clipping.",
            )

    def _validate(self, stop: StopRequest) -> None:
        """Compute the mean loss on the validation data, unless asked to stop, and write the step's line with it.

        Raises:
            ColledgeError: The loss is no number.
        """
        run, rows, step = self._job.run, self._data.validation, self._engine.step
        assert rows is not None
        began_s, parts = time.perf_counter(), []
        for start in range(0, rows.num_rows, run.batch.global_size):
            if stop.asked:
                return
            indices = torch.arange(start, min(start + run.batch.global_size, rows.num_rows))
            parts.append(self._engine.evaluate(numbered(rows, indices, self._data.train.num_rows)))
        whole, took_s = reduce(add, parts), time.perf_counter() - began_s
        loss = whole.loss / whole.num_targets
        self._check_finite("validation loss", loss)
        self._losses[step] = loss
        if self._line is not None:
            figures = device_figures(took_s, whole.devices, self._modes)
            validation = {
                "validation_loss": loss,
                "validation_s": took_s,
                "validation_joules": sum(one.energy_joules for one in figures.values()),
            }
            self._line = self._line.model_copy(update=validation)
            append_metrics(self._folder.metrics, self._line)
            if self._tracker is not None:
                self._tracker.write(self._line, "validation_loss")
        print(
            f"step {step}/{run.steps}  validation loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.2f}",
            flush=True,
        )
        best = self._best
        if run.keep_best and best is not None and best.step == step and not self._ended:
            self._save_checkpoint()
