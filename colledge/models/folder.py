"""What a folder holds that is given as a model and is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from colledge.errors import ModelError

_FIX = "use one such as Llama, Qwen3, Gemma 3 or GPT-2."
_OTHER_HEADS = {
    "ForSequenceClassification": "a classifier of texts",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that answers from a text",
    "ForMultipleChoice": "a model of multiple choice",
    "ForMaskedLM": "an encoder",
    "ForImageClassification": "a classifier of images",
    "ForAudioClassification": "a classifier of sounds",
}
_SEQ2SEQ = (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.keys()
)


def check_folder(directory: Path) -> None:
    """Check that a folder is a whole model's, by the names of its files.

    Raises:
        ModelError: It is something else; the message says what, where that can be told.
    """
    adapter, state = _values(directory / "adapter_config.json"), _values(directory / "state.json")
    if adapter is not None:
        base = adapter.get("base_model_name_or_path") or "a model that it does not name"
        raise ModelError(
            f"{directory}: is an adapter of {base}, not a whole model.",
            fix="set model to that model, or give the adapter merged into it (colledge export --merge).",
        )
    config = _values(directory / "config.json")
    if config is not None:
        _check_type(directory, config)
        return
    seen, fix = "no config.json there", "give a directory that save_pretrained wrote."
    if state is not None and str(state.get("schema", "")).startswith("colledge/checkpoint/"):
        seen, fix = (
            "is a checkpoint of a run, not a model",
            f"colledge export {directory.parent} writes one of it.",
        )
    elif (directory / "job.json").is_file():
        seen, fix = (
            "is the output of a run, not a model",
            f"give {directory / 'model'}, or colledge export it.",
        )
    elif (directory / "model_index.json").is_file():
        seen, fix = "is a diffusion pipeline; colledge trains decoder-only causal language models", _FIX
    elif (directory / "modules.json").is_file():
        seen, fix = (
            "is a model of sentence embeddings; colledge trains decoder-only causal language models",
            _FIX,
        )
    elif any(directory.glob("*.gguf")):
        seen, fix = "holds GGUF files, which are for llama.cpp", "give the model that they were made from."
    raise ModelError(f"{directory}: {seen}.", fix=fix)


def _check_type(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a model that transformers does not know, and would run code of the folder for, or that is no decoder."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if config.get("auto_map") and not known:
        raise ModelError(
            f"{directory}: model type {kind!r} comes with code of its own, which is not run.",
            fix="use a model of a type that transformers knows.",
        )
    what = _other_kind(config, kind) if isinstance(kind, str) and known else None
    if what is not None:
        raise ModelError(
            f"{directory}: is {what}; colledge trains decoder-only causal language models.", fix=_FIX
        )


def _other_kind(config: dict[str, Any], kind: str) -> str | None:
    """Return in words what a model is that is no decoder-only causal language model."""
    names = config.get("architectures")
    architectures = [str(name) for name in names] if isinstance(names, list) else []
    for suffix, what in _OTHER_HEADS.items():
        if any(name.endswith(suffix) for name in architectures):
            return f"{what} ({', '.join(architectures)})"
    default = CONFIG_MAPPING[kind]
    two = True in (config.get("is_encoder_decoder"), getattr(default, "is_encoder_decoder", None))
    if two or kind in _SEQ2SEQ - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        return f"an encoder-decoder ({kind})"
    if hasattr(default, "cross_attention_hidden_size"):
        return f"the decoder of an encoder-decoder ({kind})"
    other = hasattr(default, "add_cross_attention") and getattr(default, "is_decoder", None) is False
    if (other or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES) and config.get("is_decoder") is not True:
        return f"an encoder ({kind})"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"no language model ({kind})"
    return None


def _values(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file says, or None where there is none; of a malformed one nothing is known."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
