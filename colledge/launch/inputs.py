"""What a run reads, checked before any device starts: the model's folder, its tokenizer and the data."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer

from colledge.data import TokenizedText, read_texts, tokenize
from colledge.errors import ModelError
from colledge.launch.run_config import RunConfig

_WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def find_model(name: str) -> Path:
    """Return the folder of a model: a local one, or a hub id's (from the cache, or fetched).

    Raises:
        ModelError: There is neither such a folder nor such a model within reach.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name.startswith((".", "/", "~")):
        raise ModelError(
            f"{path}: no such model directory.", fix="set model to a folder that save_pretrained wrote."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        line = " ".join(str(fault).split())[:200]
        raise ModelError(
            f"model {name!r} is no local directory and cannot be fetched from the hub ({line}).",
            fix="give a local path such as ./my-model, or log in, or unset HF_HUB_OFFLINE.",
        ) from None


def load_data(run: RunConfig, model_folder: Path) -> TokenizedText:
    """Return a run's training data as rows of tokens.

    Raises:
        DataError: The data is malformed; the message names the file, the line and the key.
        ModelError: The model's folder has no usable tokenizer.
    """
    texts = read_texts(run.data.train)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as fault:
        line = " ".join(str(fault).split())[:200]
        raise ModelError(
            f"{model_folder}: no usable tokenizer there ({line}).",
            fix="save the tokenizer beside the model with tokenizer.save_pretrained.",
        ) from None
    return tokenize(texts, tokenizer, run.data.sequence_length)
