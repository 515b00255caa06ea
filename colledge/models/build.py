"""From a model's spec to the model: the one place that knows every family."""

from __future__ import annotations

from colledge.models.huggingface import HuggingFaceCausalLM
from colledge.models.layered import LayeredModel, ModelSpec


def build_model(spec: ModelSpec) -> LayeredModel:
    """Return the model that a spec describes.

    Raises:
        ModelError: The structure is not one that can be cut into layers.
    """
    match spec.family:
        case "huggingface":
            return HuggingFaceCausalLM.from_spec(spec)
