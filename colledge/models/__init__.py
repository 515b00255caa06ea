"""Models as ordered lists of named layers, so that any half-open range of them can be one pipeline stage."""

from colledge.models.build import build_model
from colledge.models.conversion import ModelWeights
from colledge.models.huggingface import HuggingFaceCausalLM
from colledge.models.layered import LayeredModel, ModelSpec, StageModule
from colledge.models.sequential import SequentialModel, initial_weights
from colledge.models.sharding import ShardOps, Slice
from colledge.models.weights import SafetensorsDirectory, WeightWriter

__all__ = [
    "HuggingFaceCausalLM",
    "LayeredModel",
    "ModelSpec",
    "ModelWeights",
    "SafetensorsDirectory",
    "SequentialModel",
    "ShardOps",
    "Slice",
    "StageModule",
    "WeightWriter",
    "build_model",
    "initial_weights",
]
