"""Weights on disk: read one tensor at a time from safetensors files, never the whole model, never pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from colledge.errors import ModelError


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model directory by name; each is read when it is asked for.

    Args:
        directory: Holds `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        ModelError: There are no such files, or they are damaged.
    """

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        try:
            if index.is_file():
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._files = {name: directory / file for name, file in weight_map.items()}
            elif single.is_file():
                with safe_open(single, framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), single)
            else:
                raise ModelError(
                    f"{directory}: no model.safetensors and no model.safetensors.index.json.",
                    fix="give a directory that save_pretrained wrote (safetensors, not pickle).",
                )
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as fault:
            raise ModelError(
                f"{directory}: weights cannot be read ({fault}).", fix="copy the model again."
            ) from None

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            KeyError: There is no such tensor.
            ModelError: Its file is missing or damaged.
        """
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as fault:
            raise ModelError(
                f"{path}: tensor {name!r} cannot be read ({fault}).", fix="copy the model again."
            ) from None

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the tensors."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._files)
