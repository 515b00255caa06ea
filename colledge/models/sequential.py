"""Architectures of our own as layered models: layers one after another, cut anywhere, never inside a layer.

What the layers are is said in `architectures`; a parameter's name is its layer's and its name in the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from colledge.errors import ModelError, one_line
from colledge.models.architectures import Architecture, Cnn, Llama, Mlp, ResNet
from colledge.models.float64 import keep_float64
from colledge.models.generator import generator_of
from colledge.models.layered import BatchRows, ModelSpec, StageModule
from colledge.models.modular import Modular
from colledge.models.sharding import ShardOps, Slice
from colledge.records import describe_validation_error

ARCHITECTURES: Mapping[str, type[Architecture]] = {
    "cnn": Cnn,
    "mlp": Mlp,
    "resnet": ResNet,
    "llama": Llama,
    "modular": Modular,
}


class SequentialModel:
    """The layered view of an architecture of our own (a `LayeredModel`); structure only, no weights.

    Args:
        config: `architecture` by name, and its sizes (`architectures`).

    Raises:
        ModelError: There is no such architecture, or it does not take these sizes; the message names the key.
    """

    shard_units = 1
    first_trained = 0

    def __init__(self, config: Mapping[str, Any]) -> None:
        architecture = _read(config)
        self.input_name, self.input_dtype = architecture.input_name, architecture.input_dtype
        self.context_names = architecture.context_names
        self.tied: dict[str, str] = {}
        self.spec = ModelSpec(family="sequential", config=architecture.model_dump(mode="json"))
        self._layers = architecture.layers()
        self.layer_names = tuple(layer.name for layer in self._layers)
        self.layer_kinds = tuple(layer.kind for layer in self._layers)
        self._boundaries: dict[tuple[int, tuple[int, ...]], list[tuple[int, ...]]] = {}
        self._check_buffers()

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> SequentialModel:
        """Return the model that a spec describes.

        Raises:
            ModelError: The spec asks for adapters or narrow numbers, which this family does not have.
        """
        for key in ("lora", "mixed_precision", "frozen_precision"):
            if getattr(spec, key) is not None:
                raise ModelError(
                    f"{key} is set for a sequential model, wanted none.",
                    fix=f"leave {key} out, or train a Hugging Face model.",
                )
        return cls(spec.config)

    @cached_property
    def _modules(self) -> tuple[nn.Module, ...]:
        """All layers, on the meta device."""
        with torch.device("meta"):
            return tuple(layer.make() for layer in self._layers)

    def _check_buffers(self) -> None:
        """Refuse layers with buffers: nothing sends their values, and statistics of a batch depend on the plan."""
        for name, module in zip(self.layer_names, self._modules, strict=True):
            buffer = next((buffer for buffer, _ in module.named_buffers()), None)
            if buffer is not None:
                raise ModelError(
                    f"layer {name} holds {buffer!r}, which is no parameter: such values do not travel.",
                    fix="use a norm without running statistics, such as group norm, and make constants in forward.",
                )

    @property
    def output_width(self) -> int:
        """The number of classes, or the size of the vocabulary."""
        return next(reversed(self.layer_parameters(len(self._layers) - 1).values()))[0]

    def layer_parameters(self, layer_index: int) -> dict[str, tuple[int, ...]]:
        """Return a layer's parameters with their shapes."""
        named = self._modules[layer_index].named_parameters(prefix=self.layer_names[layer_index])
        return {name: tuple(parameter.shape) for name, parameter in named}

    def boundary_shape(
        self, row_shape: tuple[int, ...], layer_index: int, first_layer: int = 0
    ) -> tuple[int, ...]:
        """Return the shape of one row that enters a layer, found by running the layers before it without values.

        Raises:
            ModelError: Rows of that shape do not fit the layers.
        """
        key = (first_layer, row_shape)
        if key not in self._boundaries:
            self._boundaries[key] = self._run_empty(row_shape, first_layer)
        return self._boundaries[key][layer_index - first_layer]

    @torch.no_grad()
    def _run_empty(self, row_shape: tuple[int, ...], first_layer: int) -> list[tuple[int, ...]]:
        """Return the shapes of one row that enters `first_layer`, the next ones, and of the model's output."""
        dtype = torch.float32 if first_layer else self.input_dtype
        x = torch.empty((1, *row_shape), dtype=dtype, device="meta")
        shapes = [row_shape]
        for name, module in zip(self.layer_names[first_layer:], self._modules[first_layer:], strict=True):
            try:
                x = module(x, {})
            except (RuntimeError, ValueError, IndexError) as fault:
                raise ModelError(
                    f"rows of {list(shapes[-1])} do not fit layer {name} ({one_line(fault)}).",
                    fix="give rows of the shape that this very model takes.",
                ) from None
            shapes.append(tuple(x.shape[1:]))
        return shapes

    def trains(self, name: str) -> bool:
        """Return True: nothing is frozen."""
        return True

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return `dtype`."""
        return dtype

    def slices(self, name: str, units: tuple[int, int]) -> Slice | None:
        """Return None: layers are not cut."""
        return None

    def is_partial(self, name: str) -> bool:
        """Return False: layers are not cut."""
        return False

    def is_sharded(self, layer_index: int) -> bool:
        """Return False: layers are not cut."""
        return False

    def output_columns(self, units: tuple[int, int]) -> tuple[int, int] | None:
        """Return None: layers are not cut."""
        return None

    def build_stage(
        self,
        layers: tuple[int, int],
        dtype: torch.dtype,
        units: tuple[int, int] | None = None,
        ops: ShardOps | None = None,
    ) -> tuple[StageModule, dict[str, nn.Parameter]]:
        """Return a stage's module on the CPU, values not set, and its parameters by their whole-model names."""
        assert units is None, "sequential models have one shard unit"
        with torch.device("meta"):
            modules = [layer.make() for layer in self._layers[slice(*layers)]]
        stage = SequentialStage(modules, layers[0]).to(dtype).to_empty(device="cpu")
        if dtype is torch.float64:
            keep_float64(stage)
        parameters = {
            name: parameter
            for layer_name, module in zip(self.layer_names[slice(*layers)], modules, strict=True)
            for name, parameter in module.named_parameters(prefix=layer_name)
        }
        return stage, parameters


class SequentialStage(StageModule):
    """Layers one after another, from a layer of the model on."""

    def __init__(self, layers: Sequence[nn.Module], first_layer: int) -> None:
        super().__init__()
        self.layers, self._first_layer = nn.ModuleList(layers), first_layer

    def forward(self, x: Tensor, context: Mapping[str, Tensor], until: int | None = None) -> Tensor:
        """Return what the last layer gives, or the one before `until`, rows first."""
        for layer in islice(self.layers, None if until is None else until - self._first_layer):
            x = layer(x, context)
        return x

    def next_rows(self, rows: BatchRows | None) -> None:
        """Do nothing: nothing is random."""


def initial_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Return the values that a sequential model begins with, float32, by parameter name.

    Each depends on the seed and the parameter's name only, so that a node and its restart agree. Convolutions are as in
    He et al. (arXiv 1502.01852, equation 10), linears and embeddings uniform as torch.nn.Linear's, norms 1, biases 0.
    """
    model = SequentialModel.from_spec(spec)
    layers = (model.layer_parameters(index) for index in range(len(model.layer_names)))
    return {name: initial_value(name, shape, seed) for layer in layers for name, shape in layer.items()}


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the values that a parameter begins with (`initial_weights`)."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    values, generator, fan_in = torch.empty(shape), generator_of(seed, name), math.prod(shape[1:])
    if len(shape) == 2:
        return values.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
    return values.normal_(std=math.sqrt(2 / fan_in), generator=generator)


def _read(config: Mapping[str, Any]) -> Architecture:
    name = config.get("architecture")
    architecture = ARCHITECTURES.get(str(name))
    if architecture is None:
        raise ModelError(
            f"architecture is {name!r}, wanted one of {', '.join(ARCHITECTURES)}.",
            fix="name an architecture that there is.",
        )
    try:
        return architecture.model_validate(dict(config))
    except ValidationError as fault:
        raise ModelError(f"architecture {name}: {describe_validation_error(fault)}") from None
