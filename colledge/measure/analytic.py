"""A model's profile from its configuration alone: no weights, no memory, nothing timed.

The layers run on tensors that have shapes and no values, so what is counted are the operators and the saved
tensors of a real run. Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) can stand beside some linears, and
everything else is frozen then:

    x ──┬── frozen linear ──────────┬── +        no gradient of the linear's weight, nothing kept for one
        └── A (rank, in) ── B (out, rank)        the adapters' parameters alone train
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from colledge.errors import ModelError
from colledge.measure.count import count_model
from colledge.models import HuggingFaceCausalLM, ShardOps
from colledge.models.layered import DTYPES
from colledge.profiles import ModelProfile
from colledge.settings import Precision

DEFAULT_TARGETS = (("q_proj", "v_proj"), ("c_attn",), ("qkv_proj",), ("query_key_value",))

# Under a name of its own the library makes no mask: it would look at the values of positions to see that it needs
# none. Attention is causal then, as it is for rows without padding in a real run.
_CAUSAL_ATTENTION = "colledge_causal"


def model_profile_from_config(
    model: HuggingFaceCausalLM,
    *,
    name: str,
    sequence_length: int,
    precision: Precision = "float32",
    loss: str = "causal_lm",
    lora_rank: int | None = None,
    lora_targets: Sequence[str] | None = None,
) -> ModelProfile:
    """Return the profile of a model's layers, without timings.

    Args:
        model: The structure.
        name: What to call the model in its profile.
        sequence_length: Tokens a row.
        precision: Of parameters and activations.
        loss: By name; part of the last layer.
        lora_rank: Train adapters of this rank and freeze the rest; None trains everything.
        lora_targets: Names of the linears that get an adapter; None is the query and value projections, or the
            projection that holds them.

    Raises:
        ModelError: There are more tokens than positions, or no linear has a name of `lora_targets`.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ModelError(
            f"the sequence length is {sequence_length}, the model has {positions} positions.",
            fix=f"use a sequence length of at most {positions}.",
        )
    AttentionInterface.register(_CAUSAL_ATTENTION, sdpa_attention_forward)
    adapters = _Adapters(model, lora_rank, lora_targets) if lora_rank is not None else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = count_model(
            _ValuelessModel(model, adapters), sequence_length, DTYPES[precision], loss, _NoUpdate
        )
    return ModelProfile(
        schema_tag="colledge/model-profile/1",
        name=name,
        sequence_length=sequence_length,
        layers=layers,
        provenance="modelled",
        precision=precision,
    )


class _NoUpdate:
    """An update of nothing: none is counted."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        pass

    def step(self) -> None:
        """Do nothing."""


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    rows, columns = linear.get_parameter("weight").shape
    return rows, columns


class _AdaptedLinear(nn.Module):
    """A frozen linear with a low-rank adapter beside it."""

    def __init__(self, linear: nn.Module, rank: int) -> None:
        super().__init__()
        self.linear = linear
        num_inputs, num_outputs = _sizes(linear)
        dtype = linear.get_parameter("weight").dtype
        self.lora_a = nn.Parameter(torch.zeros(rank, num_inputs, dtype=dtype))
        self.lora_b = nn.Parameter(torch.zeros(num_outputs, rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.lora_a)
        output: Tensor = self.linear(x) + nn.functional.linear(low, self.lora_b)
        return output


class _Adapters:
    """Which linears get an adapter, and of which rank."""

    def __init__(self, model: HuggingFaceCausalLM, rank: int, targets: Sequence[str] | None) -> None:
        module, _ = model.build_stage((1, 2), torch.float32)
        linears = {name.rpartition(".")[2] for name, child in module.named_modules() if _is_linear(child)}
        wanted = targets or next((names for names in DEFAULT_TARGETS if linears.issuperset(names)), ())
        unknown = [name for name in wanted if name not in linears]
        if unknown or not wanted:
            raise ModelError(
                f"no linear of a block is called {unknown[0]!r}."
                if unknown
                else "the linears of a block have none of the known names of query and value projections.",
                fix=f"name some of {', '.join(sorted(linears))} in the targets.",
            )
        self.rank, self.targets = rank, frozenset(wanted)

    def attach(self, module: nn.Module) -> None:
        """Freeze a stage, and put the adapters into it."""
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if name in self.targets and _is_linear(child):
                    setattr(parent, name, _AdaptedLinear(child, self.rank))


class _ValuelessModel:
    """A `LayeredModel` whose stages can run on tensors without values, with adapters where there are any."""

    def __init__(self, model: HuggingFaceCausalLM, adapters: _Adapters | None) -> None:
        self._model, self._adapters = model, adapters
        self.spec, self.layer_names, self.layer_kinds = model.spec, model.layer_names, model.layer_kinds
        self.shard_units, self.output_width = model.shard_units, model.output_width
        self.input_name, self.context_names, self.tied = model.input_name, model.context_names, model.tied
        self.boundary_shape, self.slices, self.is_partial = (
            model.boundary_shape,
            model.slices,
            model.is_partial,
        )
        self.is_sharded, self.output_columns = model.is_sharded, model.output_columns

    def layer_parameters(self, layer_index: int) -> dict[str, tuple[int, ...]]:
        """Return a layer's parameters and whole shapes, adapters included."""
        shapes = self._model.layer_parameters(layer_index)
        if self._adapters is None:
            return shapes
        _, parameters = self.build_stage((layer_index, layer_index + 1), torch.float32)
        adapters = {name: tuple(p.shape) for name, p in parameters.items() if p.requires_grad}
        return shapes | adapters

    def build_stage(
        self,
        layers: tuple[int, int],
        dtype: torch.dtype,
        units: tuple[int, int] | None = None,
        ops: ShardOps | None = None,
    ) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """Return a stage that makes no masks, and its parameters."""
        module, parameters = self._model.build_stage(layers, dtype, units, ops)
        for child in module.modules():
            config: Any = getattr(child, "config", None)
            if config is not None:
                config._attn_implementation = _CAUSAL_ATTENTION
        if self._adapters is not None:
            self._adapters.attach(module)
            parameters |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        return module, parameters
