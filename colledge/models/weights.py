"""Weights on disk: safetensors files, read a tensor at a time and written some layers at a time, never pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colledge.errors import ModelError
from colledge.records import write_atomically

_MOST_BYTES = 2 * 1024**3  # of one file


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model directory by name; each is read when it is asked for.

    Args:
        directory: Holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        stem: What the files are called instead of `model`.

    Raises:
        ModelError: There are no such files, or they are damaged.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        index = directory / f"{stem}.safetensors.index.json"
        single = directory / f"{stem}.safetensors"
        try:
            if index.is_file():
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._files = {name: directory / file for name, file in weight_map.items()}
            elif single.is_file():
                with safe_open(single, framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), single)
            else:
                raise ModelError(
                    f"{directory}: no {single.name} and no {index.name}.",
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


class WeightWriter:
    """Writes tensors as transformers and PEFT read them: one file, or several and an index that says what is where.

    Args:
        folder: Where the files go.
        stem: What they are called.
        most_bytes: Of one file; None is no limit. Memory holds no more than one file's tensors.
    """

    def __init__(self, folder: Path, stem: str = "model", most_bytes: int | None = _MOST_BYTES) -> None:
        self.dtype = torch.float32  # of the last tensor
        self._folder, self._stem, self._most_bytes = folder, stem, most_bytes
        self._held: dict[str, Tensor] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, and write a file where those that are held become too large for one."""
        for name, tensor in tensors.items():
            held_bytes = sum(one.nbytes for one in self._held.values())
            if self._held and self._most_bytes is not None and held_bytes + tensor.nbytes > self._most_bytes:
                self._write()
            self._held[name] = tensor.contiguous()
            self._total_bytes += tensor.nbytes
            self.dtype = tensor.dtype

    def finish(self) -> None:
        """Write what is left, and give the files their names."""
        self._write()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / f"{self._stem}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, start=1):
            final = f"{self._stem}-{number:05d}-of-{len(self._files):05d}.safetensors"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_atomically(self._folder / f"{self._stem}.safetensors.index.json", json.dumps(index, indent=2))

    def _write(self) -> None:
        path = self._folder / f".{self._stem}-{len(self._files)}.safetensors"
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._files.append((path, list(self._held)))
        self._held = {}
