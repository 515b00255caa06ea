"""Tokens on disk: a data set is tokenised once, whatever runs, rows and processes read it, and never held in memory.

    ~/.cache/colledge/tokens/<key>/      the key is a digest of all that decides which tokens there are
      ids.bin        uint16 or int32, the tokens of all examples
      ends.bin       int64, where each example ends
      learnt.bin     bool, what the loss counts; not there where it counts all
      meta.json      sizes and digests of these files, written last
      lock           held while it is written

A store is written beside its place and renamed into it, so that it is there whole or not at all. One that is damaged,
whose writer was killed, or that has not been used for a month when another is written, is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import Field

from colledge.data.text.reading.examples import Noticed, check_name, iterate_examples, unreadable
from colledge.data.text.rows import Stream
from colledge.data.text.tokens import Tokenizer, Tokens, tokenize
from colledge.errors import ColledgeError, DataError, lack_of_memory
from colledge.records import Record, read_json, write_atomically
from colledge.settings import LossOn

_FORMAT = "2"  # another number where the same data would give other tokens
_CHUNK_BYTES = 1 << 22
_KEPT_S = 30 * 24 * 3600.0
_LINE_EVERY_S = 5.0
_PARTIAL = ".partial-"
_TEMPLATES = "additional_chat_templates"  # a folder in a tokenizer's
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


class StoreMeta(Record):
    """meta.json: bytes and SHA-256 of every file, the type of tokens, the largest, and what readers should hear."""

    schema_tag: Literal["colledge/tokens/1"] = Field(default="colledge/tokens/1", alias="schema")
    sizes: dict[str, int]
    digests: dict[str, str]
    token_type: Literal["uint16", "int32"]
    largest: int
    sentences: tuple[str, ...] = ()


Say = Callable[[str], None]


def stored_tokens(
    files: Sequence[Path],
    tokenizer_folder: Path,
    tokenizer: Tokenizer,
    loss_on: LossOn,
    say: Say | None = None,
) -> tuple[Stream, tuple[str, ...]]:
    """Return the tokens of files, from the store or put into it, and what is to be said of the files.

    Args:
        files: .jsonl, .json, .parquet or .txt, in order.
        tokenizer_folder: Where the tokenizer was loaded from.
        tokenizer: That one.
        loss_on: What the loss counts.
        say: Told now and then how far it is.

    Raises:
        DataError: A file is malformed or holds no text, or the disk is full.
        ModelError: The tokenizer lacks what the examples need.
    """
    before = [_state(path) for path in files]
    place = _home() / _key(files, tokenizer_folder, tokenizer, loss_on)
    found = _opened(place)
    if found is None:
        try:
            _write(place, files, tokenizer, loss_on, say, before)
        except OSError as fault:
            raise DataError(
                f"{place.parent}: tokens cannot be kept there ({fault.strerror or fault}).",
                fix="make room on that disk, or set XDG_CACHE_HOME to another folder.",
            ) from None
        found = _opened(place)
    if found is None:
        raise DataError(f"{place}: the tokens just written are damaged.", fix="look at that disk.")
    return found


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colledge" / "tokens"


def _key(files: Sequence[Path], tokenizer_folder: Path, tokenizer: Tokenizer, loss_on: LossOn) -> str:
    """Return a digest of what decides the tokens: contents, never names or times of files."""
    import jinja2
    import tokenizers
    import transformers

    versions = (tokenizers.__version__, transformers.__version__, jinja2.__version__)
    made = hashlib.sha256(repr((_FORMAT, loss_on, versions)).encode())
    if "strftime_now" in str(getattr(tokenizer, "chat_template", "")):  # such a template writes the day
        made.update(date.today().isoformat().encode())
    inside = [*tokenizer_folder.iterdir(), *tokenizer_folder.glob(f"{_TEMPLATES}/*")]
    for path in sorted(path for path in inside if path.is_file() and path.suffix not in _WEIGHTS):
        made.update(repr((str(path.relative_to(tokenizer_folder)), _digest(path))).encode())
    for path in files:
        check_name(path)
        try:
            made.update(repr((path.suffix.lower(), _digest(path))).encode())
        except OSError as fault:
            raise unreadable(path, fault) from None
    return made.hexdigest()[:40]


def _digest(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            made.update(chunk)
    return made.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------


def _opened(place: Path) -> tuple[Stream, tuple[str, ...]] | None:
    """Return a store, if it is there and as it was written; remove one that is not."""
    if not place.is_dir():
        return None
    try:
        meta = read_json(StoreMeta, place / "meta.json")
        whole = {"ids.bin", "ends.bin"} <= meta.sizes.keys() and all(
            (place / name).stat().st_size == size and _digest(place / name) == meta.digests.get(name)
            for name, size in meta.sizes.items()
        )
        if whole:
            with suppress(OSError):  # another user's, or on a disk that is only read
                os.utime(place / "meta.json")
            return _mapped(place, meta), meta.sentences
    except (ColledgeError, OSError) as fault:
        if lack_of_memory(fault) is not None:  # of which the store knows nothing
            raise
    shutil.rmtree(place, ignore_errors=True)
    return None


def _mapped(place: Path, meta: StoreMeta) -> Stream:
    def array(name: str, dtype: Any) -> Any:
        return (
            np.memmap(place / name, dtype=dtype, mode="r") if meta.sizes[name] else np.zeros(0, dtype=dtype)
        )

    learnt = array("learnt.bin", np.bool_) if "learnt.bin" in meta.sizes else None
    digest = hashlib.sha256(repr(sorted(meta.digests.items())).encode()).hexdigest()
    return Stream(
        array("ids.bin", meta.token_type), array("ends.bin", np.int64), learnt, meta.largest, digest
    )


# -- writing -----------------------------------------------------------------------------------------------------


def _state(path: Path) -> tuple[int, ...]:
    """Return what tells that a file is written to."""
    check_name(path)
    try:
        found = path.stat()
    except OSError as fault:
        raise unreadable(path, fault) from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _write(
    place: Path,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    loss_on: LossOn,
    say: Say | None,
    before: Sequence[tuple[int, ...]],
) -> None:
    """Tokenise files into their place, unless they are no longer as they were `before` their digests were made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    _clean(place.parent)
    with _partial(place.parent) as partial:
        noticed = Noticed()
        examples = iterate_examples(files, noticed=noticed)
        tokens = tokenize(examples, tokenizer, loss_on, noticed=noticed)
        with _Writer(partial, "uint16" if _largest_id(tokenizer) < 1 << 16 else "int32") as writer:
            writer.add_all(tokens, files, say)
        changed = [path for path, state in zip(files, before, strict=True) if _state(path) != state]
        if changed:
            raise DataError(
                f"{changed[0]}: has changed while it was read.", fix="start again when nothing writes to it."
            )
        if writer.num_examples == 0:
            named = ", ".join(map(str, files))
            raise DataError(f"{named}: holds no text.", fix="give a file with at least one row of text.")
        names = [path.name for path in sorted(partial.glob("*.bin"))]
        meta = StoreMeta(
            sizes={name: (partial / name).stat().st_size for name in names},
            digests={name: _digest(partial / name) for name in names},
            token_type=writer.token_type,
            largest=writer.largest,
            sentences=tuple(noticed.sentences()),
        )
        write_atomically(partial / "meta.json", meta.to_json())
        partial.chmod(0o755)
        try:
            os.replace(partial, place)
        except OSError:
            if not place.is_dir():  # else another process was quicker, and wrote the same
                raise


@contextmanager
def _partial(home: Path) -> Iterator[Path]:
    """Make a folder to write in, which is locked, and removed if it still is there at the end."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=home))
        try:
            with (partial / "lock").open("w") as lock:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if (partial / "lock").exists():  # else one who cleans was here before it was locked
                    yield partial
                    return
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _largest_id(tokenizer: Tokenizer) -> int:
    """Return the largest token that there may be; numbers of tokens may have gaps."""
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return max(len(tokenizer) - 1, *vocabulary.values()) if vocabulary else len(tokenizer) - 1


class _Writer:
    """Writes tokens as they come."""

    def __init__(self, folder: Path, token_type: Literal["uint16", "int32"]) -> None:
        self.token_type: Literal["uint16", "int32"] = token_type
        self.num_examples = self.num_tokens = 0
        self.largest = -1
        self._folder = folder
        self._ids, self._ends = (folder / "ids.bin").open("wb"), (folder / "ends.bin").open("wb")
        self._learnt: IO[bytes] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._ids, self._ends, self._learnt):
            if file is not None:
                file.close()

    def add_all(self, tokens: Iterable[Tokens], files: Sequence[Path], say: Say | None) -> None:
        """Write the tokens of all examples, and say how far it is."""
        name = files[0].name if len(files) == 1 else f"{len(files)} files"
        said_s = began_s = time.monotonic()
        for one in tokens:
            self._add(one)
            now_s = time.monotonic()
            if say is not None and now_s - said_s > _LINE_EVERY_S:
                said_s = now_s
                rate = self.num_tokens / (now_s - began_s)
                say(f"tokenising {name}: {self.num_tokens:,} tokens so far ({rate:,.0f}/s)")

    def _add(self, one: Tokens) -> None:
        self.num_examples += not one.goes_on
        if one.learnt is not None and self._learnt is None:
            self._learnt = (self._folder / "learnt.bin").open("wb")
            self._learnt.write(b"\1" * self.num_tokens)
        self.num_tokens += len(one.ids)
        self.largest = max(self.largest, int(one.ids.max(initial=-1)))
        self._ids.write(one.ids.astype(self.token_type).tobytes())
        if not one.goes_on:
            self._ends.write(np.int64(self.num_tokens).tobytes())
        if self._learnt is not None:
            self._learnt.write(one.mask.tobytes())


def _clean(home: Path) -> None:
    """Remove what a killed process left, and stores that nobody has used for long."""
    for folder in home.iterdir():
        with suppress(OSError):
            if folder.name.startswith(_PARTIAL):
                with (folder / "lock").open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            elif time.time() - (folder / "meta.json").stat().st_mtime > _KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
