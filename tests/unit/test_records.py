from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from colledge.errors import ConfigError, PlanError
from colledge.records import Record, parse_json, parse_record, read_json, read_yaml_mapping, write_atomically
from colledge.units import (
    format_bytes,
    format_joules,
    format_seconds,
    parse_bytes,
    parse_bytes_per_s,
    parse_seconds,
)


class Inner(Record):
    watts: float


class Outer(Record):
    name: str
    inner: Inner | None = None
    rows: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": "a", "nmae": "b"}, ["unknown key 'nmae'", "top-level keys are name, inner, rows"]),
        (
            {"name": "a", "inner": {"wats": 1, "watts": 1}},
            ["unknown key 'inner.wats'", "Fix: take that key out"],
        ),
        (
            {"name": "a", "rows": [{"watts": 1}, {}]},
            ["key 'rows[1].watts' is missing", "Fix: add that value"],
        ),
        ({"name": 3}, ["name", "string", "saw 3", "Fix: change that value"]),
        ({"name": "a", "inner": {"watts": math.nan}}, ["inner.watts", "finite"]),
        ({}, ["key 'name' is missing"]),
        ({"nmae": 1}, ["and 1 more"]),
        ([], ["saw list", "mapping"]),
    ],
)
def test_a_fault_is_named_in_one_line(value: object, words: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        parse_record(Outer, value, "some.json", PlanError)
    assert str(error.value).startswith("some.json: ")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_records_are_frozen() -> None:
    record = Outer(name="a")
    with pytest.raises(ValueError, match="frozen"):
        record.name = "b"  # type: ignore[misc]


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    record = Outer(name="ä", rows=(Inner(watts=0.1),))
    write_atomically(tmp_path / "new" / "a.json", record.to_json())
    assert read_json(Outer, tmp_path / "new" / "a.json") == record
    assert "inner" not in record.to_json()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "UTF-8"),
        (b"3", "saw int, wanted a mapping"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        read_json(Outer, path)
    assert "a.json" in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: no such file"):
        read_json(Outer, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="is a directory"):
        read_yaml_mapping(tmp_path)


# Units


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4 GB", 4e9), ("512MiB", 512 * 2**20), ("1.5 kB", 1500), (7, 7), ("1e3 B", 1000), ("2 TiB", 2 * 2**40)],
)
def test_sizes(text: object, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("100 Mbit/s", 12.5e6), ("12 MB/s", 12e6), ("1 Gbit/s", 125e6), (5.5, 5.5)]
)
def test_rates(text: object, expected: float) -> None:
    assert parse_bytes_per_s(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2 ms", 2e-3), ("8h", 28800), ("1.5 min", 90), ("3 us", 3e-6), ("2d", 172800), (4, 4)],
)
def test_durations(text: object, expected: float) -> None:
    assert parse_seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["4 gb", "GB", "", "-1 GB", "4 GB/s", True, None, [1]])
def test_what_is_no_size_says_what_would_be(text: object) -> None:
    with pytest.raises(ValueError, match="4 GB"):
        parse_bytes(text)


@pytest.mark.parametrize("num_bytes", [1, 999, 1000, 123_456, 4 * 10**9, 7 * 10**12])
def test_sizes_survive_being_printed(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=5e-3)


@pytest.mark.parametrize("seconds", [3e-6, 8.5e-4, 0.0123, 0.5, 4.56, 59.0])
def test_durations_survive_being_printed(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=5e-3)


def test_long_durations_and_energies_read_well() -> None:
    assert format_seconds(200) == "3 min 20 s"
    assert format_seconds(7500) == "2 h 05 min"
    assert [format_joules(j) for j in (9.1, 1860, 4.2e6)] == ["9.1 J", "1.86 kJ", "4.2 MJ"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.yaml", "steps: 1\nx: {y: 1, y: 2}\n", "key 'y' stands there twice"),
        ("a.yaml", "x: &a {y: 1}\nz: {<<: *a, y: 2}\n", ""),
        ("a.yaml", "x: &a [*a]\n", "not YAML"),
        ("a.yaml", 'x: "\\ud800"\n', "half a character"),
        ("a.yaml", "", "saw nothing, wanted a mapping"),
    ],
)
def test_yaml_that_readers_would_take_in_two_ways_is_refused(
    tmp_path: Path, name: str, text: str, line: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    if not line:
        assert read_yaml_mapping(path)["z"] == {"y": 2}
        return
    with pytest.raises(ConfigError, match=line):
        read_yaml_mapping(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands there twice"),
        ('{"a": "\\ud800"}', "half a character"),
    ],
)
def test_json_that_readers_would_take_in_two_ways_is_refused(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        parse_json(text)
