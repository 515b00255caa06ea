"""docs/federation.md: its commands run as they stand there, each in a process of its own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from itertools import groupby
from pathlib import Path

import yaml

from tests import forked
from tests.federation.nodes import free_port

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "federation.md").read_text(encoding="utf-8")


def run_script(script: str, folder: Path) -> str:
    """Run a script of bash whose commands of colledge are forked, which begin at once; return what these print."""
    said, beside = "", []
    for ours, lines in groupby(
        script.splitlines(), lambda line: line.startswith("colledge ") or line == "wait"
    ):
        if not ours:
            subprocess.run(["bash", "-e", "-c", "\n".join(lines)], cwd=folder, timeout=60, check=True)
            continue
        for line in lines:
            words = shlex.split(line.removesuffix("&"))
            if line != "wait":
                beside.append(forked.Forked(forked.colledge, *words[1:], cwd=folder))
            if not line.endswith("&"):
                for process in beside:
                    output, errors = process.communicate(timeout=200)
                    assert process.returncode == 0, said + output + errors
                    said += output
                beside.clear()
    return said


def test_commands_of_the_guide_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "federation", tmp_path / "examples" / "federation")
    example = tmp_path / "examples" / "federation" / "federation.yaml"
    text = example.read_text(encoding="utf-8")
    for port in ("8700", "8701"):  # others may run this suite beside
        text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}")
    example.write_text(text.replace("count: 5,", "count: 2,"), encoding="utf-8")
    assert yaml.safe_load(text)["rounds"]["count"] == 5
    commands = "".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.S))
    assert commands.count("colledge federate join") == 4
    said = run_script(commands, tmp_path)
    for wanted in (
        "fedeec: 2 rounds",
        "fedeec: 5 rounds",
        "Logits on the root's public rows leave a node",
        "accuracy 0.7:",
        "end-2: copy federation.yaml",
        "finished, round 2",
    ):
        assert wanted in said, said
    simulated, real = ((tmp_path / name / "federation.jsonl").read_text() for name in ("out", "real"))
    losses = [re.findall(r'"node":"cloud".*?"loss":([0-9.e-]+)', lines) for lines in (simulated, real)]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
