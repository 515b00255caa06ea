"""A model's profile from its configuration alone: no weights, no memory, nothing timed.

The layers run on tensors that have shapes and no values, so what is counted are the operators and the saved
tensors of a real run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from colledge.errors import ModelError, one_line
from colledge.measure.count import count_model
from colledge.models import HuggingFaceCausalLM, ShardOps, StageModule
from colledge.models.layered import DTYPES
from colledge.profiles import ModelProfile
from colledge.settings import Precision

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
) -> ModelProfile:
    """Return the profile of a model's layers, without timings.

    Args:
        model: The structure.
        name: What to call the model in its profile.
        sequence_length: Tokens a row.
        precision: Of parameters and activations.
        loss: By name; part of the last layer.

    Raises:
        ModelError: There are more tokens than positions, or the library's code looks at values.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ModelError(
            f"the sequence length is {sequence_length}, the model has {positions} positions.",
            fix=f"use a sequence length of at most {positions}.",
        )
    AttentionInterface.register(_CAUSAL_ATTENTION, sdpa_attention_forward)
    valueless = _ValuelessModel.from_spec(model.spec)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            layers = count_model(valueless, (sequence_length,), DTYPES[precision], loss, _NoUpdate)
    except (RuntimeError, TypeError, ValueError) as fault:  # of the library's own code
        raise ModelError(
            f"the layers of this {model.config.model_type!r} do not run without values ({one_line(fault)}).",
            fix="profile the model on a device instead.",
        ) from None
    return ModelProfile(
        schema_tag="colledge/model-profile/1",
        name=name,
        sequence_length=sequence_length,
        layers=layers,
        provenance="modelled",
        precision=precision,
        mixed_precision=model.spec.mixed_precision,
        frozen_precision=model.spec.frozen_precision,
        lora=model.spec.lora,
    )


class _NoUpdate:
    """An update of nothing: none is counted."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        pass

    def step(self) -> None:
        """Do nothing."""


class _ValuelessModel(HuggingFaceCausalLM):
    """A model whose stages can run on tensors without values."""

    def build_stage(
        self,
        layers: tuple[int, int],
        dtype: torch.dtype,
        units: tuple[int, int] | None = None,
        ops: ShardOps | None = None,
    ) -> tuple[StageModule, dict[str, nn.Parameter]]:
        """Return a stage that makes no masks, and its parameters."""
        module, parameters = super().build_stage(layers, dtype, units, ops)
        for child in module.modules():
            config: Any = getattr(child, "config", None)
            if getattr(config, "_attn_implementation", None) == "sdpa":
                config._attn_implementation = _CAUSAL_ATTENTION
        return module, parameters
