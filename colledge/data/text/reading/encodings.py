"""Bytes to text: UTF-8 alone is read; of other encodings, and of packed files, the cure is named."""

from __future__ import annotations

from pathlib import Path

from colledge.errors import DataError

_SAMPLE_BYTES = 1 << 16  # enough to tell an encoding by
_TYPOGRAPHY = "\u201c\u201d\u2018\u2019\u201e\u2013\u2014\u2026\u20ac\xa0\xab\xbb\xb0\xa7\xa3\xbf\xa1\xbd"
UTF8_MARK = b"\xef\xbb\xbf"
_MARKS = {  # UTF-32's little-endian mark begins with UTF-16's
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -c"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "zstd -dc"),
    **{b"BZh%d1AY&SY" % level: ("bzip2", "bunzip2 -c") for level in range(1, 10)},
    b"\xfd7zXZ\x00": ("xz", "xz -dc"),
    b"PK\x03\x04": ("zip", "unzip -p"),
    b"PAR1\x15": ("parquet", None),
    b"SQLite format 3\x00": ("SQLite", None),
    b"\x89PNG": ("PNG", None),
    b"%PDF": ("PDF", None),
}


def check_beginning(path: Path, beginning: bytes) -> bytes:
    """Return the first bytes of a text file without UTF-8's byte order mark.

    Raises:
        DataError: They are of another encoding, or of no text; the fix names the command that converts the file.
    """
    for magic, (kind, unpack) in _PACKED.items():
        if beginning.startswith(magic):
            fix = "name the file by what it holds, or give text."
            if unpack is not None:
                fix = f"unpack it, such as with `{unpack} {path.name} > unpacked{_inner_suffix(path)}`."
            raise DataError(f"{path}: is a {kind} file, wanted text.", fix=fix)
    for mark, encoding in _MARKS.items():
        if beginning.startswith(mark):
            raise _not_utf8(path, f"begins as {encoding.upper()} does", encoding)
    if b"\x00" in beginning:
        wide = _wide_encoding(beginning)
        if wide is not None:
            raise _not_utf8(path, f"looks like {wide.upper()}", wide)
    return check_zeros(path, beginning).removeprefix(UTF8_MARK)


def check_zeros(path: Path, content: bytes, line: int = 1) -> bytes:
    """Return a part of a text file.

    Raises:
        DataError: There is a zero byte in it; the message names its line; the part begins in `line`.
    """
    if b"\x00" in content:
        line += content.count(b"\n", 0, content.index(b"\x00"))
        raise DataError(
            f"{path}, line {line}: holds a zero byte, which is in no text.",
            fix="give text; a file that was cut off by a crash often ends in zeros: take them out.",
        )
    return content


def decode(path: Path, content: bytes, line: int = 1) -> str:
    """Return a part of a file as text.

    Args:
        path: Of the file, for messages.
        content: The part.
        line: In which it begins.

    Raises:
        DataError: It is not UTF-8; the message names the byte and its line, the fix the encoding that it looks like.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        line += content.count(b"\n", 0, fault.start)
        if len(content) - fault.start < 4 and fault.reason == "unexpected end of data":
            raise DataError(
                f"{path}, line {line}: ends within a character: the file was cut off.",
                fix="copy the file again, or take out its last character.",
            ) from None
        if _is_mostly_utf8(content):
            raise DataError(
                f"{path}, line {line}: byte {content[fault.start]:#04x} is not UTF-8, and what is around it is.",
                fix="mend that character; `iconv -c -f utf-8 -t utf-8` leaves out all such.",
            ) from None
        seen = f"byte {content[fault.start]:#04x} is not UTF-8"
        raise _not_utf8(path, seen, _guess(content, fault.start), line) from None


def _is_mostly_utf8(content: bytes) -> bool:
    """Return whether a text has more characters of several bytes that are UTF-8 than bytes that are not."""
    text = content.decode("utf-8", errors="replace")
    wrong = text.count("\ufffd")
    return sum(ord(char) > 127 for char in text) - wrong > 4 * wrong


def _guess(content: bytes, at: int) -> str:
    """Return which encoding a text looks like, by what surrounds a byte that is not UTF-8."""
    around = content[max(0, at - _SAMPLE_BYTES // 2) : at + _SAMPLE_BYTES // 2]
    strange = around.decode("cp1252", errors="replace").encode("ascii", errors="ignore")
    letters = [c for c in around.decode("cp1252", errors="replace") if ord(c) > 127]
    few = len(letters) < len(strange) / 2 and all(c.isalpha() or c in _TYPOGRAPHY for c in letters)
    if few:
        return "cp1252"  # what Western Windows writes; latin1 but for control characters that text has not
    from charset_normalizer import from_bytes  # no worker needs it

    best = from_bytes(around).best()
    if best is None or best.encoding.startswith("utf"):
        return "cp1252"
    return best.encoding.replace("_", "-")


def _wide_encoding(beginning: bytes) -> str | None:
    """Return which UTF-16 or UTF-32 a text with zero bytes and no mark is, by where they are; None: neither."""
    quarter = max(1, len(beginning) // 4)
    zeros = [beginning[start::4].count(0) / quarter for start in range(4)]
    wide = (
        ("utf-32-be", zeros[:3], zeros[3:]),
        ("utf-32-le", zeros[1:], zeros[:1]),
        ("utf-16-be", zeros[::2], zeros[1::2]),
        ("utf-16-le", zeros[1::2], zeros[::2]),
    )
    return next((name for name, high, low in wide if min(high) > 0.5 and max(low) < 0.1), None)


def _not_utf8(path: Path, seen: str, encoding: str, line: int | None = None) -> DataError:
    where = f"{path}, line {line}" if line is not None else f"{path}"
    convert = f"iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}"
    return DataError(
        f"{where}: {seen}, wanted UTF-8.", fix=f"convert the file, such as with `{convert}`, and look at it."
    )


def _inner_suffix(path: Path) -> str:
    """Return the suffix of what a packed file holds: .jsonl for a.jsonl.gz, .txt where the name does not say."""
    inner = path.suffixes[-2:-1]
    return inner[0] if inner and inner[0].lower() in (".jsonl", ".json", ".txt") else path.suffix or ".txt"
