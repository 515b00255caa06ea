"""What was trained, on disk: a Hugging Face model folder, or a PEFT adapter folder; written layer by layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from colledge.models import ModelWeights, WeightWriter
from colledge.models.lora import peft_config, peft_name, targets_of, with_names
from colledge.records import write_atomically
from colledge.settings import LoraSettings

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
_OF_THE_MODEL = ("config.json", "generation_config.json")


def write_model(layers: Iterable[Mapping[str, Tensor]], source: ModelWeights, target: Path) -> None:
    """Write a Hugging Face folder: the source's configuration and tokenizer, new weights under its names on disk.

    Args:
        layers: The weights of one layer after another, by parameter name.
        source: The model that was trained.
        target: Where the new one goes.
    """
    with _written_beside(target) as folder:
        _copy_texts(source.directory, folder)
        writer = WeightWriter(folder)
        written: set[str] = set()
        for tensors in layers:
            writer.add(source.on_disk(tensors))
            written |= tensors.keys()
        for tensors in source.rest(written):  # of parts that no layer has
            writer.add(source.on_disk(tensors))
        writer.finish()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key in {"dtype", *config} & {"dtype", "torch_dtype"}:  # as older files call it
            config[key] = str(writer.dtype).removeprefix("torch.")
        config.pop("transformers_weights", None)  # the name of another file
        if not source.ties:  # config.json may say so where the files hold two values
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part["tie_word_embeddings"] = False
        write_atomically(folder / "config.json", json.dumps(config, indent=2))


def write_adapter(
    layers: Iterable[Mapping[str, Tensor]], settings: LoraSettings, base: str, source: Path, target: Path
) -> None:
    """Write a PEFT folder, with the source's tokenizer.

    Args:
        layers: What was trained of one layer after another, by parameter name.
        settings: The adapter's.
        base: The model that it belongs to, as the user named it.
        source: That model's folder.
        target: Where the adapter goes.
    """
    with _written_beside(target) as folder:
        _copy_texts(source, folder)
        for name in _OF_THE_MODEL:
            (folder / name).unlink(missing_ok=True)
        writer = WeightWriter(folder, "adapter_model", most_bytes=None)
        linears: set[str] = set()
        for tensors in layers:
            linears |= targets_of(tensors)
            writer.add({peft_name(name): tensor for name, tensor in tensors.items()})
        writer.finish()
        config = peft_config(with_names(settings, linears))
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(folder)


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
