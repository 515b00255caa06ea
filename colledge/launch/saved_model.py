"""What was trained, on disk: a Hugging Face model folder, or a PEFT adapter folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from colledge.models.lora import peft_config, peft_name
from colledge.parallel import Engine
from colledge.records import write_atomically
from colledge.settings import LoraSettings

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
_OF_THE_MODEL = ("config.json", "generation_config.json")


def save_model(engine: Engine, source: Path, target: Path) -> None:
    """Write the trained model as a Hugging Face folder: the source's configuration and tokenizer, new weights."""
    with _written_beside(target) as folder:
        _copy_texts(source, folder)
        tensors = _tensors(engine, trained_only=False)
        _save_tensors(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_atomically(folder / "config.json", json.dumps(config, indent=2))


def save_adapter(engine: Engine, settings: LoraSettings, base: str, source: Path, target: Path) -> None:
    """Write the trained adapter as a PEFT folder, with the source's tokenizer.

    Args:
        engine: Trained it.
        settings: The adapter's.
        base: The model that it belongs to, as the user named it.
        source: That model's folder.
        target: Where the adapter goes.
    """
    with _written_beside(target) as folder:
        _copy_texts(source, folder)
        for name in _OF_THE_MODEL:
            (folder / name).unlink(missing_ok=True)
        tensors = _tensors(engine, trained_only=True)
        _save_tensors({peft_name(n): t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
        config = peft_config(settings)
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(folder)


def _tensors(engine: Engine, trained_only: bool) -> dict[str, Tensor]:
    layers = engine.state_dict(trained_only).values()
    return {name: tensor.contiguous() for layer in layers for name, tensor in layer.items()}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _copy_texts(source: Path, target: Path) -> None:
    """Copy a model folder's files without its weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


@contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """Give a folder to write to, and rename it to the target once all is written."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
