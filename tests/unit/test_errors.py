"""Lack of memory is said as that, whoever lacks it, and never as a damaged file."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from colledge.errors import ModelError, lack_of_memory, said_by
from colledge.launch.cli import main
from colledge.models import weights
from colledge.models.weights import SafetensorsFiles
from tests.unit.test_weights_on_disk import made


def too_much() -> Exception:
    """Return what PyTorch says where it gets no memory."""
    with pytest.raises(RuntimeError) as said:
        torch.empty(1 << 60, dtype=torch.uint8)
    return said.value


LACKS = (
    too_much(),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory", "model.safetensors"),
    SafetensorError("Cannot allocate memory (os error 12)"),
)


@pytest.mark.parametrize("fault", LACKS, ids=lambda fault: type(fault).__name__)
def test_lack_of_memory_is_no_damaged_file(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("llama", tmp_path / "model")
    (tmp_path / "pool.yaml").write_text("devices: [{id: d0}]\n")
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndata: {{train: x.jsonl}}\npool: pool.yaml\noutput: {tmp_path / 'out'}\n"
    )
    stored = SafetensorsFiles([model / "model.safetensors"])

    def no_memory(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(weights, "safe_open", no_memory)
    with pytest.raises(MemoryError):
        stored.read(["lm_head.weight"])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["colledge", "train", str(tmp_path / "run.yaml"), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("colledge: out of memory")
    assert said.count("\n") == 1
    assert "copy the model" not in said


def test_other_faults_are_no_lack_of_memory() -> None:
    for fault in (
        ValueError("what is this?"),
        ModelError("a file is damaged."),
        OSError(errno.ENOSPC, "full"),
    ):
        assert lack_of_memory(fault) is None
    assert said_by(ValueError("a\nb")) == "a b"
