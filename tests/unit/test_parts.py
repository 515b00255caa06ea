"""Long files, a part at a time: a list in JSON is what `json` reads, or is refused at the same place."""

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from colledge.data.text.reading import parts
from colledge.data.text.reading.parts import entries_of, parts_of
from colledge.errors import DataError


def made(chance: random.Random, depth: int = 0) -> Any:
    """Return a value of JSON."""
    kind = chance.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return chance.choice((None, True, False, chance.randint(-(10**12), 10**12), chance.random() * 1e9))
    if kind < 4:
        return "".join(chance.choices('abc "\\\n\t{}[],:é漢😀', k=chance.randrange(30)))
    if kind == 4:
        return [made(chance, depth + 1) for _ in range(chance.randrange(5))]
    return {str(key): made(chance, depth + 1) for key in range(chance.randrange(5))}


@pytest.mark.parametrize("num_bytes", [1, 7, 64])
def test_a_list_is_read_as_the_library_reads_it_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(parts, "_PART_BYTES", num_bytes)
    path = tmp_path / "a.json"
    for seed in range(60):
        chance = random.Random(seed)
        value = [made(chance) for _ in range(chance.randrange(6))]
        content = json.dumps(value, ensure_ascii=seed % 2 == 0, indent=seed % 3 or None)
        path.write_text(f" {content}\n" if seed % 5 else content, encoding="utf-8")
        assert list(entries_of(path, "")) == value
        assert "".join(part.text for part in parts_of(path)) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("num_bytes", [1, 50])
def test_a_damaged_list_is_refused_where_the_library_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(parts, "_PART_BYTES", num_bytes)
    path = tmp_path / "a.json"
    refused = 0
    for seed in range(300):
        chance = random.Random(seed)
        content = json.dumps([made(chance) for _ in range(1, 6)], indent=chance.choice((None, 1)))
        at = chance.randrange(len(content))
        damaged = (content[:at], content[:at] + content[at + 1 :], content[:at] + "}" + content[at:])[
            seed % 3
        ]
        path.write_text(damaged, encoding="utf-8")
        fault: json.JSONDecodeError | None = None
        try:
            wanted = json.loads(damaged)
        except json.JSONDecodeError as found:
            fault = found
        if fault is None:
            assert list(entries_of(path, "")) == wanted
            continue
        refused += 1
        with pytest.raises(DataError) as ours:
            list(entries_of(path, ""))
        said = re.search(r"line (\d+) column (\d+)", ours.value.message)
        assert said, ours.value.message
        assert abs(int(said[1]) - fault.lineno) <= 1  # newer libraries name the comma, not what follows it
    assert refused > 150


def test_a_long_list_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(20_000):
            file.write(("," if number else "") + json.dumps({"text": f"{number} " * 100}))
        file.write("]")
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    count = sum(1 for _ in entries_of(path, ""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8_000_000  # a few parts of 1 MB
