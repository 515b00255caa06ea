"""How to train, as plain data: the optimizer, the precision, and what an emulated device rehearses. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from colledge.records import Record
from colledge.units import BytesPerSecond, Seconds

Precision = Literal["float64", "float32", "bfloat16"]
WirePrecision = Literal["bfloat16"]  # of what travels between pipeline stages; None: as computed

Schedule = Literal["constant", "linear", "cosine"]  # of the learning rate; the last two fall to 0

NarrowPrecision = Literal["bfloat16"]  # of products alone, or of frozen weights in memory

LibraryName = Literal["deepspeed", "fairscale"]
BackendName = Literal["native", LibraryName]  # what trains: colledge's engine, or a library

Objective = Literal["energy", "time", "energy-delay"]  # of a plan: what is to be least

ZeroStage = Literal[1, 2, 3]  # of ZeRO: replicas divide optimizer state, gradients too, parameters too

LossOn = Literal["all", "answers"]  # answers: completions, and what a chat's assistant says

ITEM_BYTES: Mapping[Precision, int] = {"float64": 8, "float32": 4, "bfloat16": 2}


class OptimizerSettings(Record):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) or SGD, as torch.optim names their settings.

    `schedule` says what becomes of the learning rate, after it rose from 0 over `warmup_steps`. Weight decay leaves
    biases and norms alone. `gradient_clipping` bounds the 2-norm of all gradients of the model together. `betas` and
    `eps` are read by adamw, `momentum` by sgd.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=5e-5, gt=0)
    schedule: Schedule = "constant"
    warmup_steps: int = Field(default=0, ge=0, strict=True)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    gradient_clipping: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}, wanted two numbers in [0, 1)")
        return self

    @property
    def state_factor(self) -> float:
        """Bytes of optimizer state for every byte of trainable parameter."""
        if self.name == "adamw":
            return 2.0
        return 1.0 if self.momentum else 0.0


class LoraSettings(Record):
    """Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685); in brackets PEFT's names for the same.

    `rank` (r), `alpha` (lora_alpha), `dropout` (lora_dropout). `targets` (target_modules) are names of linears in the
    blocks, or all-linear; None is PEFT's choice for the model's type. `modules_to_save` are trained whole. `blocks`
    (layers_to_transform) are the blocks that get adapters; None is all.
    """

    rank: int = Field(default=8, ge=1, strict=True)
    alpha: int = Field(default=16, ge=1, strict=True)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] | None = None
    modules_to_save: tuple[str, ...] = ()
    blocks: tuple[int, ...] | None = Field(default=None, min_length=1)

    def costs_as(self, other: LoraSettings) -> bool:
        """Return whether adapters of other settings take the same time and memory."""
        free = {"alpha", "dropout"}  # numbers alone; whether something is dropped takes time
        alike = self.model_dump(exclude=free) == other.model_dump(exclude=free)
        return alike and (self.dropout > 0) == (other.dropout > 0)


class DeepSpeedSettings(Record):
    """How DeepSpeed shards: a stage of ZeRO (Rajbhandari et al., arXiv 1910.02054), or a configuration file."""

    zero_stage: ZeroStage | None = None
    config: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedSettings:
        if (self.zero_stage is None) == (self.config is None):
            raise ValueError("give zero_stage (1, 2 or 3) or config (a DeepSpeed file)")
        return self


class EarlyStopping(Record):
    """End a training after `patience` evaluations in a row that did not lower the validation loss, as in transformers.

    Lower is what is lower than the best before it by more than `threshold`.
    """

    patience: int = Field(default=1, ge=1, strict=True)
    threshold: float = Field(default=0.0, ge=0)


class Emulation(Record):
    """A slower device to rehearse: computing takes `slowdown` times as long, sends are paced and delayed."""

    slowdown: float = Field(default=1.0, ge=1)
    bandwidth_bytes_per_s: BytesPerSecond | None = Field(default=None, alias="bandwidth", gt=0)
    latency_s: Seconds = Field(default=0.0, alias="latency", ge=0)

    def link_to(self, other: Emulation) -> tuple[float, float | None]:
        """Return latency in seconds and bytes per second (None: no limit) of the link between two devices."""
        ends = (self, other)
        bandwidths = [e.bandwidth_bytes_per_s for e in ends if e.bandwidth_bytes_per_s is not None]
        return sum(e.latency_s for e in ends), min(bandwidths, default=None)
