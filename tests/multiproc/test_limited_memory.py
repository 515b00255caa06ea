"""A model larger than any device trains: each device is given its own layers only. Kernels enforce the limits."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from colledge.models import HuggingFaceCausalLM
from tests import forked
from tests.multiproc.limited_memory import CONFIG, cgroups_can_limit, main, write_weights

LIMIT_BYTES = 850_000_000


def train(folder: Path, num_devices: int, timeout_s: float) -> subprocess.CompletedProcess[str]:
    return forked.run(main, folder, LIMIT_BYTES, num_devices, timeout_s, timeout_s=120)


@pytest.mark.skipif(not cgroups_can_limit(), reason="needs root and cgroups that limit memory")
def test_a_model_larger_than_any_device_trains_within_what_was_planned(tmp_path: Path) -> None:
    model_bytes = write_weights(HuggingFaceCausalLM(CONFIG.to_dict()), tmp_path)
    assert model_bytes > LIMIT_BYTES
    ran = train(tmp_path, 3, 40)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["modelled_bytes"] < LIMIT_BYTES, row
        assert row["measured_bytes"] < 1.05 * row["modelled_bytes"], row
        assert row["losses"][1] < row["losses"][0], row
    alone = train(tmp_path, 1, 5)  # the limits are real: they kill or freeze one device with all layers
    assert alone.returncode != 0
    assert re.search(
        "DeviceError: lost the connection to device 'd0'|DeadlineError: device 'd0'", alone.stderr
    )
