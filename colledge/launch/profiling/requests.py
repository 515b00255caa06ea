"""What a device is asked while a pool is profiled, and what it answers."""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import nn

from colledge.measure import Workload
from colledge.models import ModelSpec, build_model
from colledge.models.layered import DTYPES
from colledge.parallel.clock import Clock
from colledge.parallel.gradients import Gradients
from colledge.parallel.setup import build_optimizer
from colledge.profiles import LayerProfile, Timing
from colledge.records import Record
from colledge.settings import OptimizerSettings, Precision


class DeviceRequest(Record):
    """Asks a device what it is; the model's code is loaded, for it takes memory too."""

    model: ModelSpec
    accelerator: str
    threads: int | None


class DeviceFacts(Record):
    """What a device says of itself."""

    kind: str = Field(min_length=1)
    runtime_bytes: int = Field(ge=0)
    allocator_overhead: float = Field(ge=0)
    usable_bytes: int = Field(gt=0)


class _Update:
    """The engine's own update of one rank, timed as a run does it."""

    def __init__(self, settings: OptimizerSettings, parameters: list[nn.Parameter]) -> None:
        named = {str(index): parameter for index, parameter in enumerate(parameters)}
        self._clipping = settings.gradient_clipping
        self._gradients = Gradients(named, None, {}, None, frozenset(named), Clock(), overlap=False)
        self._optimizer = build_optimizer(settings, parameters)

    def step(self) -> None:
        """Clip, optimize, forget the gradients."""
        if self._clipping is not None:
            self._gradients.clip(self._clipping, None, "measuring")
        self._optimizer.step()
        self._gradients.zero()


class WorkloadRequest(Record):
    """How the model is run."""

    model: ModelSpec
    row_shape: tuple[int, ...] = Field(min_length=1)
    precision: Precision
    loss: str
    optimizer: OptimizerSettings
    accelerator: str = "cpu"
    threads: int | None = None
    slowdown: float = Field(default=1.0, ge=1)

    def workload(self) -> Workload:
        """Return what to run on this device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Workload(
            build_model(self.model),
            self.row_shape,
            DTYPES[self.precision],
            torch.device(self.accelerator),
            self.loss,
            partial(_Update, self.optimizer),
        )


class LayersRequest(Record):
    """Asks a device to time one layer at several sample counts, whole or the first `num_units` shard units of it."""

    workload: WorkloadRequest
    layer_index: int = Field(ge=0)
    sample_counts: tuple[int, ...] = Field(min_length=1)
    device_kind: str
    mode: str
    num_units: int | None = None


class LayersAnswer(Record):
    """The rows of a layer."""

    rows: tuple[Timing, ...]


class CountAnswer(Record):
    """The bytes and FLOPs of every layer."""

    layers: tuple[LayerProfile, ...]


class LinkRequest(Record):
    """Asks one end of a link to send `messages` of each size, or to acknowledge them.

    The first size is a small one, by whose round trip the acknowledgements' way is told.
    """

    sends: bool
    peer: int = Field(ge=0)
    sizes_bytes: tuple[int, ...] = Field(min_length=1)
    messages: tuple[int, ...] = Field(min_length=1)
    latency_s: float = Field(default=0.0, ge=0)
    bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)


class LinkAnswer(Record):
    """(bytes, one-way seconds) of every message; empty from the end that acknowledged."""

    samples: tuple[tuple[int, float], ...] = ()
