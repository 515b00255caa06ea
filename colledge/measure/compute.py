"""Times layers for real: forward, backward and the optimizer's update, as the engine will run them.

    trial      F B  F B  F B ...  U          medians of a trial's forwards and backwards, one update
    row        trial, trial, trial, ...      median over the trials, and their spread

A stage costs a little beside its blocks: masks and position tables are made once, however many blocks there are.
So a block is timed as a third of a stage of three, unless three take so long that the little does not count, and
times of layers add up to that of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn

from colledge.measure.spread import NOISY_SPREAD, spread_of
from colledge.models import LayeredModel
from colledge.models.losses import LOSSES, OutputShard
from colledge.profiles import Timing

_BLOCKS_TOGETHER = 3


class Stopwatch(Protocol):
    """What measures compute seconds; an emulated slow device's takes as long as that device would."""

    compute_s: float

    def reset(self) -> None:
        """Set the seconds to zero."""

    def begin_compute(self) -> None:
        """Mark the begin of computing."""

    def end_compute(self) -> None:
        """Mark the end of computing, and add the seconds."""


class Update(Protocol):
    """What a step does once its backwards are done: clipping, the optimizer, gradients back to zero."""

    def step(self) -> object:
        """Do it."""


class UpdateFactory(Protocol):
    """What makes the run's update; a torch.optim class is one that only optimizes."""

    def __call__(self, parameters: list[nn.Parameter], /) -> Update:
        """Return the update of these parameters."""


@dataclass(frozen=True)
class Workload:
    """What is timed, and where.

    Args:
        model: The structure; weights are random.
        row_shape: Of one row of the model's input: (tokens,), or that of an image.
        dtype: Of parameters and activations.
        device: Where it runs.
        loss: By name; part of the last layer's time.
        update: Makes the update that is timed.
    """

    model: LayeredModel
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    loss: str
    update: UpdateFactory


@dataclass(frozen=True)
class Effort:
    """How long to measure one row.

    Args:
        trial_s: Seconds of computing in a trial; fewer repeats where one alone takes longer.
        trials: Trials wanted; a noisy row gets up to twice as many.
        least_trials: Trials even where `limit_s` has passed.
        limit_s: Seconds of computing after which a row gets no further trial.
        slow_s: A forward and backward as slow as this ends the doubling of sample counts.
    """

    trial_s: float = 0.02
    trials: int = 5
    least_trials: int = 3
    limit_s: float = 0.3
    slow_s: float = 2.0


@dataclass(frozen=True)
class LayerTime:
    """Medians over trials; `spread` is (third quartile - first quartile) / median of forward plus backward."""

    samples: int
    shard_fraction: float
    forward_s: float
    backward_s: float
    update_s: float
    spread: float

    def row(self, device_kind: str, mode: str, layer_kind: str) -> Timing:
        """Return the row of a model profile."""
        return Timing(
            device_kind=device_kind,
            mode=mode,
            layer_kind=layer_kind,
            samples=self.samples,
            shard_fraction=self.shard_fraction,
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            update_s=self.update_s,
            spread=self.spread,
        )


class NoShardOps:
    """f and g of a shard that is timed alone: the all-reduces are priced by the planner from the link."""

    def enter(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def sum_in_place(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def max_in_place(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class StageBench:
    """A stage with random weights, run as the engine runs one: backward adds to gradients that are there.

    Args:
        workload: The model and how it is run.
        layers: The half-open range of layers.
        units: The half-open range of shard units, or None for whole layers.
    """

    def __init__(
        self, workload: Workload, layers: tuple[int, int], units: tuple[int, int] | None = None
    ) -> None:
        self._workload = workload
        self._layers = layers
        is_last = layers[1] == len(workload.model.layer_names)
        self._loss = LOSSES[workload.loss] if is_last else None
        ops = NoShardOps() if units is not None else None
        module, self.parameters = workload.model.build_stage(layers, workload.dtype, units, ops)
        columns = workload.model.output_columns(units) if units is not None else None
        self._shard = OutputShard(columns, ops) if columns is not None and ops is not None else None
        self._generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters.values():
            if parameter.is_floating_point():
                nn.init.normal_(parameter, std=0.02, generator=self._generator)
            else:
                nn.init.zeros_(parameter)
        if workload.device.type != "cpu":
            module.to(workload.device)
        self._module = module
        trained = {id(p): p for p in self.parameters.values() if p.requires_grad}
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self._update = workload.update(list(trained.values()))

    def load(self, samples: int) -> None:
        """Make random rows: the model's input for the first stage, activations for a later one."""
        model, row_shape = self._workload.model, self._workload.row_shape
        entering, leaving, output = (
            (samples, *model.boundary_shape(row_shape, index))
            for index in (*self._layers, len(model.layer_names))
        )
        takes_tokens = self._layers[0] == 0 and not model.input_dtype.is_floating_point
        self._x = self._random_ids(entering) if takes_tokens else self._random(entering)
        self.gradient = None if self._loss else self._random(leaving)
        self._targets: Mapping[str, Tensor] = {"labels": self._random_ids(output[:-1])}
        self._denominator = prod(output[:-1])  # as in a run, where it is known before the forward

    def _random_ids(self, shape: tuple[int, ...]) -> Tensor:
        ids = torch.randint(self._workload.model.output_width, shape, generator=self._generator)
        return ids.to(self._workload.device)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=self._generator)
        return values.to(self._workload.device, self._workload.dtype)

    def rows(self) -> Tensor:
        """Return the stage's input as it arrives from the wire: a new leaf."""
        x = self._x.detach()
        return x.requires_grad_() if self._layers[0] > 0 else x

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output, on the last stage the loss."""
        output: Tensor = self._module(x, {})
        if self._loss is None:
            return output
        return self._loss.total(output, self._targets, self._shard) / self._denominator

    def backward(self, output: Tensor) -> None:
        """Add to the gradients; nothing where everything up to here is frozen."""
        if output.requires_grad:
            torch.autograd.backward(output, self.gradient)

    def update(self) -> None:
        """Run the step's update."""
        self._update.step()

    def wait(self) -> None:
        """Wait until the device has computed what was asked of it."""
        if self._workload.device.type == "cuda":
            torch.cuda.synchronize(self._workload.device)


@dataclass(frozen=True)
class _Trial:
    forward_s: float
    backward_s: float
    update_s: float


def _timed(bench: StageBench, stopwatch: Stopwatch) -> tuple[float, float]:
    """Return the seconds of one forward and of one backward."""
    x = bench.rows()
    stopwatch.reset()
    stopwatch.begin_compute()
    output = bench.forward(x)
    bench.wait()
    stopwatch.end_compute()
    forward_s = stopwatch.compute_s
    stopwatch.begin_compute()
    bench.backward(output)
    bench.wait()
    stopwatch.end_compute()
    return forward_s, stopwatch.compute_s - forward_s


def _timed_update(bench: StageBench, stopwatch: Stopwatch) -> float:
    stopwatch.reset()
    stopwatch.begin_compute()
    bench.update()
    bench.wait()
    stopwatch.end_compute()
    return stopwatch.compute_s


def _trial(bench: StageBench, stopwatch: Stopwatch, repeats: int) -> _Trial:
    times = [_timed(bench, stopwatch) for _ in range(repeats)]
    update_s = _timed_update(bench, stopwatch)
    return _Trial(median(f for f, _ in times), median(b for _, b in times), update_s)


def _warm_up(bench: StageBench, stopwatch: Stopwatch, effort: Effort) -> int:
    """Run until caches, allocator and optimizer state are warm; return the repeats that fill a trial."""
    spent_s = once_s = sum(_timed(bench, stopwatch))
    _timed_update(bench, stopwatch)
    while spent_s < effort.trial_s:
        once_s = sum(_timed(bench, stopwatch))
        spent_s += max(once_s, effort.trial_s / 100)
    return min(max(round(effort.trial_s / max(once_s, 1e-9)), 1), 100)


def _spread(trials: Sequence[_Trial]) -> float:
    return spread_of([t.forward_s + t.backward_s for t in trials])


def _trials(bench: StageBench, samples: int, stopwatch: Stopwatch, effort: Effort) -> list[_Trial]:
    bench.load(samples)
    repeats = _warm_up(bench, stopwatch, effort)
    trials: list[_Trial] = []
    spent_s = 0.0
    while len(trials) < effort.least_trials or (
        spent_s < effort.limit_s
        and (
            len(trials) < effort.trials
            or (len(trials) < 2 * effort.trials and _spread(trials) > NOISY_SPREAD)
        )
    ):
        trial = _trial(bench, stopwatch, repeats)
        trials.append(trial)
        spent_s += repeats * (trial.forward_s + trial.backward_s) + trial.update_s
    return trials


def _medians(trials: Sequence[_Trial]) -> tuple[float, float, float]:
    return (
        median(t.forward_s for t in trials),
        median(t.backward_s for t in trials),
        median(t.update_s for t in trials),
    )


def _fraction(workload: Workload, units: tuple[int, int] | None) -> float:
    return 1.0 if units is None else (units[1] - units[0]) / workload.model.shard_units


def time_stage(
    workload: Workload,
    layers: tuple[int, int],
    samples: int,
    stopwatch: Stopwatch,
    effort: Effort,
    units: tuple[int, int] | None = None,
) -> LayerTime:
    """Time the layers of a stage together.

    Args:
        workload: The model and how it is run.
        layers: The half-open range of layers.
        samples: Rows in a forward and backward.
        stopwatch: Gives the seconds.
        effort: How long to measure.
        units: The half-open range of shard units, or None for whole layers.
    """
    trials = _trials(StageBench(workload, layers, units), samples, stopwatch, effort)
    return LayerTime(samples, _fraction(workload, units), *_medians(trials), _spread(trials))


def time_layer(
    workload: Workload,
    layer_index: int,
    sample_counts: Sequence[int],
    stopwatch: Stopwatch,
    effort: Effort,
    units: tuple[int, int] | None = None,
) -> list[LayerTime]:
    """Time one layer at several sample counts.

    Args:
        workload: The model and how it is run.
        layer_index: The layer, the first of its kind; the last layer's time includes the loss.
        sample_counts: Rows in a forward and backward, rising. A slow device is not asked for all of them: more
            samples than take `effort.slow_s` follow the line through those before.
        stopwatch: Gives the seconds.
        effort: How long to measure a row.
        units: The half-open range of shard units, or None for the whole layer.
    """
    num_alike = _num_alike(workload, layer_index)
    alone = StageBench(workload, (layer_index, layer_index + 1), units)
    together = StageBench(workload, (layer_index, layer_index + num_alike), units) if num_alike > 1 else alone
    times: list[LayerTime] = []
    for samples in sample_counts:
        if len(times) >= 2 and times[-1].forward_s + times[-1].backward_s > effort.slow_s / 2:
            break
        alone.load(samples)
        fits = num_alike * sum(_timed(alone, stopwatch)) <= effort.limit_s / 2
        n, bench = (num_alike, together) if fits else (1, alone)
        trials = _trials(bench, samples, stopwatch, effort)
        forward_s, backward_s, update_s = (seconds / n for seconds in _medians(trials))
        fraction = _fraction(workload, units)
        times.append(LayerTime(samples, fraction, forward_s, backward_s, update_s, _spread(trials)))
    return times


def _num_alike(workload: Workload, layer_index: int) -> int:
    """Return how many layers of one kind to time together: those from this one on, neither first nor last."""
    kinds = workload.model.layer_kinds
    alike = 1
    while (
        layer_index > 0
        and alike < _BLOCKS_TOGETHER
        and layer_index + alike < len(kinds) - 1
        and kinds[layer_index + alike] == kinds[layer_index]
    ):
        alike += 1
    return alike
