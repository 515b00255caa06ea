"""The memory that the planner reckons with, against the peaks of real processes (benchmarks/memory.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.parametrize(("case", "devices"), [("hybrid", 3), ("zero", 2)])
def test_processes_take_the_memory_that_the_planner_says(case: str, devices: int) -> None:
    ran = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", "--case", case],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(rows) == devices
    for row in rows:
        assert 0.95 < row["modelled_bytes"] / row["measured_bytes"] < 1.1, row
