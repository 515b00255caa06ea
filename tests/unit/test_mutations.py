"""Damaged files of colledge's own, and of data: each ends in one clear line, or in what the file says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from colledge.launch.cli import main
from tests.unit import mutated_world
from tests.unit.mutated_files import RECORDS, Ended, judge, run, trials, whole_or_said, world

assert main  # torch and transformers are imported before the first deadline begins


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    with world() as folder:
        yield folder


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_traceback_no_unclear_line_no_hang_and_no_silent_fallback(files: Path, seed: int) -> None:
    done = list(trials(files, RECORDS, count=360, seed=seed))
    assert not [str(one) for one in done if one.wrong]
    refused = Counter(one.kind.path for one in done if one.refused)
    passed_over = {kind.path for kind in RECORDS if kind.check is whole_or_said}
    assert set(refused) | passed_over == {kind.path for kind in RECORDS}  # every kind of file is read


RUN_FILE = RECORDS[0]


@pytest.mark.parametrize(
    ("errors", "seen"),
    [
        ("Traceback (most recent call last):\n  ...\nKeyError: 'x'\n", "Traceback"),
        ("colledge: run.yaml: 'NoneType' object has no attribute 'x'. Fix: mend it.\n", "NoneType"),
        ("colledge: run.yaml: is strange.\n", "no clear line"),
        ("colledge: run.yaml: is strange. Fix: a.\ncolledge: run.yaml: again. Fix: b.\n", "no clear line"),
        ("colledge: something is strange. Fix: mend it.\n", "names none of"),
    ],
)
def test_an_unclear_end_is_seen(tmp_path: Path, errors: str, seen: str) -> None:
    assert seen in str(judge(RUN_FILE, tmp_path, Ended(2, "", errors)))
    assert (
        judge(RUN_FILE, tmp_path, Ended(2, "", "colledge: run.yaml: steps is 0. Fix: give some.\n")) is None
    )


def test_a_key_that_stands_twice_and_went_through_is_seen(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 1\nsteps: 2\n")
    assert "twice" in str(judge(RUN_FILE, tmp_path, Ended(0, "", "")))


def test_a_command_that_takes_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forever() -> None:
        while True:
            pass

    monkeypatch.setattr(mutated_world, "_HANG_S", 0.1)
    monkeypatch.setattr(mutated_world, "main", forever)
    assert "Hang" in run(tmp_path, "report", "x").errors
