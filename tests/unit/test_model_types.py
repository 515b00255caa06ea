"""docs/model-types.md: it names every type of the installed transformers, and what it says of some is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "model-types.md").read_text(encoding="utf-8")
STALE = "run `make model-types`"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_types", ROOT / "docs" / "model_types.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model_types = _load()


def _listed(beginning: str) -> list[str]:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(beginning))
    return re.findall(r"`([\w-]+)`", line)


def _rows() -> dict[str, str]:
    rows = (line.split(" | ", 1) for line in PAGE.splitlines() if line.startswith("| `"))
    return {name[3:-1]: why.removesuffix(" |") for name, why in rows}


@pytest.fixture(autouse=True)
def _threads() -> object:
    """Give the threads back that a trial takes away."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_page_names_every_type_of_the_installed_transformers() -> None:
    if transformers.__version__ not in PAGE:
        pytest.skip(f"the page is of another version than {transformers.__version__}")
    named = [*_listed("Exact: "), *_rows(), *_listed("No decoder-only models")]
    assert sorted(named) == model_types.types(), STALE


def test_the_page_counts_what_it_lists() -> None:
    exact, refused = len(_listed("Exact: ")), PAGE.partition("Not counted")[0].count("\n| `")
    assert f"Of the {exact + refused} decoder-only" in PAGE
    assert f"**{exact} ({exact / (exact + refused):.0%})**" in PAGE
    assert exact >= 0.9 * (exact + refused)


@pytest.mark.parametrize(
    "kind", ["falcon_h1", "git", "jetmoe", "longcat_flash", "openai-gpt", "rwkv", "xglm", "xlstm"]
)
def test_what_the_page_calls_exact_is(kind: str) -> None:
    assert kind in _listed("Exact: "), STALE
    assert model_types.outcome(kind) == "exact"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("bart", "an encoder-decoder"),
        ("bert-generation", "an encoder"),
        ("musicgen", "an encoder-decoder"),
        ("trocr", "the decoder of an encoder-decoder"),
    ],
)
def test_what_is_not_decoder_only_is_refused_as_such(kind: str, what: str) -> None:
    assert kind in _listed("No decoder-only models"), STALE
    assert f"is {what} ({kind}); colledge trains decoder-only" in model_types.outcome(kind)


def test_a_type_of_which_the_library_makes_no_model_is_not_counted() -> None:
    said = model_types.outcome("gemma4_assistant")
    assert said.startswith("transformers' defaults make no model (")
    page = model_types.page(
        {"llama": "exact", "gemma4_assistant": said, "zaya": "no", "bert": "decoder-only"}
    )
    assert "Of the 2 decoder-only" in page
    assert "**1 (50%)**" in page


def test_reasons_end_with_a_word() -> None:
    assert model_types._line(ValueError("word | " * 99)).endswith("word / ...")
