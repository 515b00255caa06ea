"""Which files a source of text names: a file, a folder or a pattern; what of a folder is not read is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from colledge.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_WILD = frozenset("*?[")
_OF_AN_ARCHIVER = "__MACOSX"  # beside the files that macOS zips


@dataclass(frozen=True)
class Found:
    """The files of some sources, and in words what of their folders is not read."""

    files: tuple[Path, ...]
    left_out: tuple[str, ...] = ()


def find_files(sources: Iterable[Path]) -> Found:
    """Return the files that sources name, those of a folder or a pattern in the order of their paths.

    Args:
        sources: Files, folders (with all that is below them) or patterns such as `data/*.jsonl`. Hidden files, and what
            is in hidden folders, are read only where they are named themselves.

    Raises:
        DataError: There is no such file, a link leads nowhere, a folder or pattern has none that can be read, or one is
            named twice.
    """
    files: list[Path] = []
    left_out: list[str] = []
    for source in sources:
        if source.is_dir():
            found, sentence = _below(source)
            files += found
            left_out += [sentence] if sentence else []
        elif source.exists() or not _WILD & set(str(source)):
            files.append(source)
        else:
            files += _matching(source)
    twice = [path for path, count in Counter(path.resolve() for path in files).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]}: is named twice.", fix="name every file once.")
    return Found(tuple(files), tuple(left_out))


def _below(folder: Path) -> tuple[list[Path], str | None]:
    paths = sorted(folder.rglob("*"))
    _refuse_dead_links(paths, folder)
    inside = [path for path in paths if path.is_file()]
    linked = sum(path.is_symlink() and path.is_dir() for path in paths)
    seen = [path for path in inside if not _is_hidden(path.relative_to(folder))]
    files = [path for path in seen if path.suffix.lower() in SUFFIXES]
    read = set(files)
    counts = Counter(path.suffix.lower() or "without a suffix" for path in seen if path not in read)
    kinds = [f"{count} {suffix}" for suffix, count in sorted(counts.items())]
    kinds += [f"{len(inside) - len(seen)} hidden"] if len(seen) < len(inside) else []
    said = f"{', '.join(kinds)} file(s)" if kinds else ""
    said += " and " * bool(kinds and linked) + (f"{linked} linked folder(s)" if linked else "")
    if not files:
        others = f" (but {said})" if said else ""
        raise DataError(
            f"{folder}: holds no file of {', '.join(SUFFIXES)}{others}.",
            fix="give a folder with text in such files.",
        )
    return files, f"{folder}: not read: {said}." if said else None


def _refuse_dead_links(paths: Iterable[Path], folder: Path) -> None:
    """Refuse a file that would be read, were it there."""
    for path in paths:
        named = path.suffix.lower() in SUFFIXES and not _is_hidden(path.relative_to(folder))
        if named and path.is_symlink() and not path.exists():
            raise DataError(
                f"{path}: is a link to {path.readlink()}, which is not there.",
                fix="fetch that file again, or take the link out.",
            )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == _OF_AN_ARCHIVER for part in path.parts)


def _matching(pattern: Path) -> list[Path]:
    fixed = next(parent for parent in pattern.parents if not _WILD & set(str(parent)))
    try:
        found = sorted(fixed.glob(str(pattern.relative_to(fixed))))
    except (ValueError, NotImplementedError, IndexError):
        found = []
    _refuse_dead_links(found, fixed)
    files = [path for path in found if path.is_file() and not _is_hidden(path.relative_to(fixed))]
    if not files:
        raise DataError(f"{pattern}: no file is called so.", fix="mend the pattern, or name the files.")
    return files
