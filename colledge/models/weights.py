"""Weights on disk: safetensors files, read some tensors at a time and written some layers at a time, never pickle."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colledge.errors import ModelError, said_by
from colledge.records import write_atomically

_MOST_BYTES = 2 * 1024**3  # of one file
_COPY = "copy the model again."
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NOT_READ = {  # by the end of a file's name
    ".gguf": "GGUF files, which are for llama.cpp",
    ".bin": "pickled files",
    ".pt": "pickled files",
    ".pth": "pickled files",
    ".h5": "TensorFlow files",
    ".msgpack": "Flax files",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it; `dtype` is None for a type that no weight has."""

    path: Path
    shape: tuple[int, ...]
    stored: str
    dtype: torch.dtype | None

    @property
    def num_bytes(self) -> int:
        """The bytes of its values, where the type is known."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype is not None else 1)


def has_weights(directory: Path, stem: str = "model") -> bool:
    """Return whether a folder holds weights that can be read, in files that are called so."""
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    return any((directory / name).is_file() for name in names)


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of safetensors files by their names there; each is read when it is asked for, and must be finite.

    `headers` says of each what its file says, which is read at once.

    Args:
        paths: The files; of a name that several hold, the last one's tensor counts.

    Raises:
        ModelError: A file is missing or damaged.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.headers: dict[str, StoredTensor] = {}
        for path in paths:
            self.headers |= _header(path)

    def only(self, names: Iterable[str]) -> SafetensorsFiles:
        """Return some of the tensors, not yet read."""
        some = SafetensorsFiles(())
        some.headers = {name: self.headers[name] for name in names}
        return some

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return some tensors; each file is opened once.

        Raises:
            KeyError: There is no such tensor.
            ModelError: A file is missing or damaged, or a tensor holds a number that is none.
        """
        by_file = defaultdict(list)
        for name in names:
            by_file[self.headers[name].path].append(name)
        tensors: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in inside}
            except (SafetensorError, OSError, RuntimeError, ValueError) as fault:
                raise ModelError(f"{path}: cannot be read ({said_by(fault)}).", fix=_COPY) from None
            for name in inside:
                check_finite(f"{path}: {name!r}", tensors[name])
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            KeyError: There is no such tensor.
            ModelError: Its file is missing or damaged, or it holds a number that is none.
        """
        return self.read([name])[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a tensor, without reading it."""
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the tensors."""
        return iter(self.headers)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.headers)


class SafetensorsDirectory(SafetensorsFiles):
    """The tensors of a Hugging Face model directory, or of PEFT's, by their names on disk.

    Args:
        directory: Holds `model.safetensors`, or else shards with `model.safetensors.index.json`.
        stem: What the files are called instead of `model`.

    Raises:
        ModelError: There are no such files, or they are damaged.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        super().__init__(_files(directory, stem))


def check_finite(what: str, tensor: Tensor) -> None:
    """Check that a tensor holds nothing but numbers.

    Raises:
        ModelError: It holds a NaN or an infinity.
    """
    if tensor.dtype not in _FLOATING or tensor.numel() == 0:
        return
    least, most = torch.aminmax(tensor)  # either is NaN where one value is; makes no copy, as isfinite would
    if not (math.isfinite(least.item()) and math.isfinite(most.item())):
        seen = "NaN" if math.isnan(least.item()) else "infinity"
        raise ModelError(f"{what} holds {seen}: it is damaged.", fix="copy it again, or train it again.")


def _files(directory: Path, stem: str) -> list[Path]:
    """Return the files that hold the weights, as from_pretrained chooses and orders them."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [directory / name for name in _names_in(index)]
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    kinds = {what for path in directory.glob("*") if (what := _NOT_READ.get(path.suffix))}
    seen = f"; it holds {', '.join(others[:3])}" if others else ""
    seen += f"; it holds {', '.join(sorted(kinds))}" if kinds else ""
    raise ModelError(
        f"{directory}: no {single.name} and no {index.name}{seen}.",
        fix="give a directory that save_pretrained wrote (safetensors, not pickle).",
    )


def _names_in(index: Path) -> list[str]:
    """Return the names of the files that an index names, each of which is there."""
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as fault:
        raise ModelError(f"{index}: cannot be read ({said_by(fault)}).", fix=_COPY) from None
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: has no weight_map from names of weights to names of files.", fix=_COPY)
    if not isinstance(value.get("metadata", {}), dict):
        raise ModelError(f"{index}: its metadata is no mapping.", fix=_COPY)
    names = sorted(set(weight_map.values()))
    paths = [PurePosixPath(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors" or len(name) > 255:
            raise ModelError(
                f"{index}: names the file {name[:80]!r}, which is no .safetensors inside the folder.",
                fix=_COPY,
            )
        if not (index.parent / name).is_file():
            raise ModelError(
                f"{index.parent / name}: is not there, and {index.name} names it.",
                fix="fetch the missing file, or copy the model again.",
            )
    if not names:
        raise ModelError(f"{index}: names no file.", fix=_COPY)
    return names


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        found = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 # it is no mapping
                part = file.get_slice(name)
                stored = str(part.get_dtype())
                found[name] = StoredTensor(path, tuple(part.get_shape()), stored, _DTYPES.get(stored))
        return found
    except (SafetensorError, OSError, RuntimeError, ValueError) as fault:
        raise ModelError(f"{path}: cannot be read ({said_by(fault)}).", fix=_COPY) from None


class WeightWriter:
    """Writes tensors as transformers and PEFT read them: one file, or several and an index that says what is where.

    `dtype` is the type that holds every number of those written.

    Args:
        folder: Where the files go.
        stem: What they are called.
        most_bytes: Of one file; None is no limit. Memory holds no more than one file's tensors.
    """

    def __init__(self, folder: Path, stem: str = "model", most_bytes: int | None = _MOST_BYTES) -> None:
        self.dtype: torch.dtype | None = None
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
            if tensor.is_floating_point():
                self.dtype = torch.promote_types(self.dtype or tensor.dtype, tensor.dtype)

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
