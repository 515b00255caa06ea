"""What a frozen prefix of layers gave for rows of the data, on a device's disk: computed once, read in every epoch.

    <folder>/activations    row 7 | row 2 | row 9 | ...      raw, one after another as they came
    <folder>/index          (7, CRC-32) (2, ...) (9, ...)    an entry for every whole row

An entry is written after its row; so a crash loses rows, and never leaves one that looks whole and is not.
After PAC (Ouyang et al., arXiv 2408.10746), which caches what the frozen backbone gives to parallel adapters.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from colledge.errors import ConfigError, DeviceError
from colledge.models.layered import DTYPES
from colledge.parallel.wire import Message, Wire

Forwards = Callable[[Message], tuple[Tensor | None, dict[str, float]]]

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_TAG = 20  # of rows between devices
_ENTRY = struct.Struct("<qI")  # row, checksum of its bytes


def cache_folder(key: str, device: str) -> Path:
    """Return where a device keeps the activations of a key: under XDG_CACHE_HOME, by default ~/.cache.

    Raises:
        DeviceError: One of them could lead out of that folder.
    """
    for name in (key, device):
        if not _NAME.match(name):
            raise DeviceError(f"{name!r} cannot name a folder of cached activations.")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "colledge" / "activations" / key / device


class ActivationCache:
    """Rows of activations on disk.

    Args:
        folder: Made where it is not there; what an earlier run left in it is used.
        row_shape: Of the activations of one row.
        dtype: Of the activations.

    Raises:
        ConfigError: Another run holds the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self._row_shape, self._dtype = folder, row_shape, dtype
        self._row_bytes = torch.Size(row_shape).numel() * dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._data = os.fdopen(os.open(folder / "activations", os.O_RDWR | os.O_CREAT, 0o600), "r+b")
            self._index = os.fdopen(os.open(folder / "index", os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        except OSError as fault:
            raise ConfigError(
                f"{folder} cannot hold activations ({fault.strerror}).",
                fix="set XDG_CACHE_HOME on that device to a folder that can be written.",
            ) from None
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            self.close()
            raise ConfigError(
                f"the activations in {folder} are in use by another run, or cannot be locked ({fault.strerror}).",
                fix="wait for that run to end, or set XDG_CACHE_HOME to a disk of the device's own.",
            ) from None
        self._entries = self._read_index()  # row -> (slot, checksum)

    def _read_index(self) -> dict[int, tuple[int, int]]:
        """Return the rows that are whole, and forget the torn end of a crash."""
        raw = self._index.read()
        slots = min(len(raw) // _ENTRY.size, os.fstat(self._data.fileno()).st_size // self._row_bytes)
        self._index.truncate(slots * _ENTRY.size)
        self._data.truncate(slots * self._row_bytes)
        entries = _ENTRY.iter_unpack(raw[: slots * _ENTRY.size])
        self._num_slots = slots
        return {row: (slot, checksum) for slot, (row, checksum) in enumerate(entries)}

    @property
    def held_bytes(self) -> int:
        """What the cache takes on its disk, rows that an earlier run wanted included."""
        return self._num_slots * self._row_bytes

    @property
    def free_bytes(self) -> int:
        """What the disk has left."""
        return shutil.disk_usage(self.folder).free

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Return those of some rows that are not there, or not as they were written; reads them all."""
        return [row for row in rows if self._read(row) is None]

    def write(self, rows: Sequence[int], activations: Tensor) -> None:
        """Add rows.

        Args:
            rows: Their numbers in the data.
            activations: [len(rows), *row_shape], of the cache's dtype.

        Raises:
            DeviceError: The disk is full, or cannot be written to.
        """
        checksums = []
        try:
            self._data.seek(self._num_slots * self._row_bytes)
            for one in activations.detach().cpu().contiguous():
                raw = one.reshape(-1).view(torch.uint8).numpy().tobytes()
                checksums.append(zlib.crc32(raw))
                self._data.write(raw)
            self._data.flush()
            self._index.seek(self._num_slots * _ENTRY.size)
            self._index.write(b"".join(map(_ENTRY.pack, rows, checksums)))
            self._index.flush()
        except OSError as fault:
            raise DeviceError(
                f"the activation cache in {self.folder} cannot be written ({fault.strerror}).",
                fix="make room on that disk, or take activation_cache out of run.yaml.",
            ) from None
        for row, checksum in zip(rows, checksums, strict=True):
            self._entries[row] = (self._num_slots, checksum)
            self._num_slots += 1

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return rows as they were written, [len(rows), *row_shape].

        Raises:
            DeviceError: A row is not there, or its bytes have changed.
        """
        found = []
        for row in rows:
            raw = self._read(row)
            if raw is None:
                raise DeviceError(
                    f"row {row} of the activation cache in {self.folder} is missing or damaged.",
                    fix="train with --resume auto: damaged rows are computed anew.",
                )
            found.append(raw)
        whole = torch.frombuffer(bytearray(b"".join(found)), dtype=self._dtype)
        return whole.view(len(rows), *self._row_shape)

    def _read(self, row: int) -> bytes | None:
        if row not in self._entries:
            return None
        slot, checksum = self._entries[row]
        self._data.seek(slot * self._row_bytes)
        raw = self._data.read(self._row_bytes)
        return raw if len(raw) == self._row_bytes and zlib.crc32(raw) == checksum else None

    def close(self) -> None:
        """Leave the rows for another time."""
        self._data.close()
        self._index.close()

    def remove(self) -> None:
        """Delete the rows."""
        for name in ("activations", "index"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.folder, *self.folder.parents[:2]):  # the device's, the key's, that of all keys
            try:
                folder.rmdir()
            except OSError:  # others are there
                break
        self.close()


class DeviceCache:
    """A device's side: answers the coordinator's commands about the one cache that is open."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._open: ActivationCache | None = None

    @property
    def _cache(self) -> ActivationCache:
        if self._open is None:
            raise DeviceError("cached activations are wanted before a cache was opened.")
        return self._open

    def open(self, message: Message) -> Message:
        """Open the cache of a key, emptied where that is asked; answer with its bytes and what the disk has left."""
        fields = message.fields
        self._wire.timeout_s = fields["timeout_s"]
        folder = cache_folder(fields["key"], fields["device"])
        shape, dtype = tuple(fields["row_shape"]), DTYPES[fields["precision"]]
        if fields["empty"]:
            self._cache.remove()
        self._open = ActivationCache(folder, shape, dtype)
        return Message({"held_bytes": self._open.held_bytes, "free_bytes": self._open.free_bytes})

    def find_missing(self, message: Message) -> Message:
        """Answer with those of some rows that are not there or damaged."""
        rows = message.tensors["rows"].tolist()
        return Message({}, {"rows": torch.tensor(self._cache.missing(rows), dtype=torch.int64)})

    def fill(self, message: Message, forwards: Forwards | None) -> Message:
        """Compute this device's part of some rows, and pass them on to, or take them for, those who read them."""
        fields, tensors = message.fields, message.tensors
        wanted = {int(rank): tensors.pop(f"take/{rank}") for rank in fields["take"]}
        given = {int(rank): tensors.pop(f"give/{rank}") for rank in fields["give"]}
        shape, dtype = tuple(fields["boundary"]), DTYPES[fields["precision"]]
        arriving = {}
        for rank, rows in wanted.items():
            if rank != fields["rank"]:
                buffer = torch.empty((len(rows), *shape), dtype=dtype)
                arriving[rank] = (buffer, self._wire.receive(buffer, rank, _TAG))
        figures = {"compute_s": 0.0, "communicate_s": 0.0, "peak_memory_bytes": 0}
        computed: Tensor | None = None
        if forwards is not None:
            computed, figures = forwards(message)
        leaving = []
        for rank, positions in given.items():
            assert computed is not None
            part = computed[positions].cpu().contiguous()
            if rank == fields["rank"]:
                self._cache.write(wanted[rank].tolist(), part)
            else:
                leaving.append(self._wire.send(part, rank, _TAG))
        for rank, (buffer, transfer) in arriving.items():
            waited_s = transfer.wait("filling the activation cache")
            figures["communicate_s"] += min(waited_s, fields["expected_s"].get(str(rank), waited_s))
            self._cache.write(wanted[rank].tolist(), buffer)
        for transfer in leaving:
            transfer.wait("filling the activation cache")
        return Message(figures)

    def read(self, rows: Tensor) -> Tensor:
        """Return the activations of rows, [len(rows), *row_shape]."""
        return self._cache.read(rows.tolist())

    def close(self, message: Message) -> Message:
        """Close the cache, and delete it where that is asked, also one that an earlier part of the run left."""
        fields = message.fields
        if self._open is None and fields["remove"] and cache_folder(fields["key"], fields["device"]).is_dir():
            self._open = ActivationCache(cache_folder(fields["key"], fields["device"]), (1,), torch.uint8)
        if self._open is not None:
            self._open.remove() if fields["remove"] else self._open.close()
        self._open = None
        return Message({})
