"""Damaged files of models: each ends in one clear line, or in what transformers and PEFT make of the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.unit.mutated_files import MODELS, run, same_text, trials, world


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    with world() as folder:
        yield folder


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_traceback_no_unclear_line_no_hang_and_nothing_drawn_at_random(files: Path, seed: int) -> None:
    done = list(trials(files, MODELS, count=320, seed=seed))
    assert not [str(one) for one in done if one.wrong]
    refused = Counter(one.kind.path for one in done if one.refused)
    assert set(refused) == {kind.path for kind in MODELS}


def test_weights_drawn_at_random_are_seen(files: Path) -> None:
    """A command that went through with a weight that is in no file would not pass."""
    path = files / "model" / "model.safetensors"
    whole = path.read_bytes()
    ended = run(files, "generate", "model", "--prompt", "what is 3?", "--max-new-tokens", "3")
    weights = load_file(path)
    try:
        save_file({name: t for name, t in weights.items() if "norm" not in name}, path, {"format": "pt"})
        assert "drawn at random" in str(same_text("model", files, ended))
        save_file({name: t + 1 for name, t in weights.items()}, path, {"format": "pt"})
        assert "transformers" in str(same_text("model", files, ended))
    finally:
        path.write_bytes(whole)
