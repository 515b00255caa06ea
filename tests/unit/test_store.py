"""Tokens are made once, lie on the disk, and are the very rows that memory would hold."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from colledge.data import (
    Rows,
    load_tokenizer,
    make_rows,
    read_examples,
    rows_of,
    split_examples,
    split_numbers,
)
from colledge.data.text import store
from colledge.data.text.store import stored_tokens
from colledge.errors import DataError

ENTRIES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"text": st.text(min_size=1, max_size=40)}),
        st.fixed_dictionaries(
            {"prompt": st.text(max_size=20), "completion": st.text(min_size=1, max_size=20)}
        ),
    ),
    min_size=3,
    max_size=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(["what is it?"], vocab_size=270, special_tokens=["</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "colledge" / "tokens"


class Broken:
    """A tokenizer that must not be asked."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 270

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("tokenised again")


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8", errors="surrogatepass"
    )
    return path


def batches(rows: Rows) -> list[dict[str, list[Any]]]:
    each = (rows.batch(torch.tensor([index])) for index in range(rows.num_rows))
    return [{name: tensor.tolist() for name, tensor in {**b.inputs, **b.targets}.items()} for b in each]


def outcome(make: Any) -> Any:
    try:
        rows = make()
    except DataError as fault:
        return fault.message
    return batches(rows), rows.num_cut, rows.num_dropped, rows.num_tokens


@given(ENTRIES, st.integers(2, 30), st.booleans(), st.sampled_from(("all", "answers")), st.integers(0, 9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_those_that_memory_would_hold(
    folder: Path, tmp_path: Path, entries: list[Any], length: int, packing: bool, loss_on: Any, seed: int
) -> None:
    path, tokenizer = write(tmp_path / "data.jsonl", entries), load_tokenizer(folder)
    stream, _ = stored_tokens([path], folder, tokenizer, loss_on)
    examples, end = read_examples(path), tokenizer.eos_token_id
    assert end is not None

    def kept(part: Any) -> Any:
        return outcome(lambda: make_rows(part, tokenizer, length, packing=packing, loss_on=loss_on))

    assert outcome(lambda: rows_of(stream, length, end, packing=packing)) == kept(examples)
    parts = split_examples(examples, 0.4, seed)
    for chosen, part in zip(split_numbers(len(stream.ends), 0.4, seed), parts, strict=True):
        seen = outcome(lambda c=chosen: rows_of(stream, length, end, packing=packing, chosen=c))
        assert seen == kept(part)


def test_what_is_stored_is_not_tokenised_again(folder: Path, tmp_path: Path, cache: Path) -> None:
    path, tokenizer = (
        write(tmp_path / "a.jsonl", [{"text": "what"}, {"text": "it", "id": 1}]),
        load_tokenizer(folder),
    )
    first, sentences = stored_tokens([path], folder, tokenizer, "all")
    assert sentences == ("Keys that are not read: id (1).",)
    renamed = path.rename(tmp_path / "b.jsonl")
    again, said = stored_tokens([renamed], folder, Broken(), "all")  # type: ignore[arg-type]
    assert (again.digest, said) == (first.digest, sentences)
    assert isinstance(again.ids, np.memmap)
    assert len(list(cache.iterdir())) == 1
    write(renamed, [{"text": "what"}, {"text": "is"}])
    other, _ = stored_tokens([renamed], folder, tokenizer, "all")
    assert other.digest != first.digest
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    for place, loss_on in ((changed, "all"), (folder, "answers")):
        with pytest.raises(AssertionError, match="tokenised again"):
            stored_tokens([renamed], place, Broken(), loss_on)  # type: ignore[arg-type]
    assert not list(cache.glob(".partial*"))  # nothing is left of what failed


@pytest.mark.parametrize("damage", ["cut", "flipped", "meta", "missing", "empty"])
def test_a_damaged_store_is_made_again(damage: str, folder: Path, tmp_path: Path, cache: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", [{"text": "what is it? " * 9}]), load_tokenizer(folder)
    first, _ = stored_tokens([path], folder, tokenizer, "all")
    wanted = first.ids.tolist()
    (place,) = cache.iterdir()
    ids = place / "ids.bin"
    match damage:
        case "cut":
            os.truncate(ids, ids.stat().st_size - 2)
        case "flipped":
            content = bytearray(ids.read_bytes())
            content[6] ^= 1
            ids.write_bytes(content)
        case "meta":
            (place / "meta.json").write_text("{}")
        case "missing":
            (place / "ends.bin").unlink()
        case "empty":
            shutil.rmtree(place)
            place.mkdir()
    again, _ = stored_tokens([path], folder, tokenizer, "all")
    assert again.ids.tolist() == wanted


def test_what_is_left_and_what_is_old_goes(folder: Path, tmp_path: Path, cache: Path) -> None:
    tokenizer = load_tokenizer(folder)
    stored_tokens([write(tmp_path / "a.jsonl", [{"text": "what"}])], folder, tokenizer, "all")
    (old,) = cache.iterdir()
    os.utime(old / "meta.json", (0, 0))
    left, busy = cache / ".partial-killed", cache / ".partial-busy"
    for partial in (left, busy):
        partial.mkdir()
        (partial / "ids.bin").write_bytes(b"12")
    (left / "lock").touch()
    with (busy / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stored_tokens([write(tmp_path / "a.jsonl", [{"text": "is"}])], folder, tokenizer, "all")
    assert not old.exists()
    assert not left.exists()
    assert len(list(cache.iterdir())) == 2
    assert busy.exists()


def test_two_that_write_the_same_at_once_both_have_it(folder: Path, tmp_path: Path, cache: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", [{"text": "what is it?"}]), load_tokenizer(folder)
    found = []

    class Slow:
        """A tokenizer in whose first call another process comes and is quicker."""

        eos_token_id = tokenizer.eos_token_id
        chat_template = None

        def __len__(self) -> int:
            return len(tokenizer)

        def __call__(self, *texts: Any, **options: Any) -> Any:
            if not found:
                found.append(stored_tokens([path], folder, tokenizer, "all")[0])
            return tokenizer(*texts, **options)

    slow, _ = stored_tokens([path], folder, Slow(), "all")  # type: ignore[arg-type]
    assert slow.ids.tolist() == found[0].ids.tolist()
    assert len(list(cache.iterdir())) == 1


def test_who_cleans_before_a_folder_is_locked_costs_nothing(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, flock, others = load_tokenizer(folder), fcntl.flock, ["it", "is"]

    def late(lock: Any, how: int) -> None:
        if others and how == fcntl.LOCK_EX:  # another process comes and cleans
            text = others.pop()
            stored_tokens([write(tmp_path / f"{text}.jsonl", [{"text": text}])], folder, tokenizer, "all")
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    stream, _ = stored_tokens([write(tmp_path / "a.jsonl", [{"text": "what"}])], folder, tokenizer, "all")
    assert stream.ids.tolist() == [*tokenizer(["what"])["input_ids"][0], tokenizer.eos_token_id]
    assert len(list(cache.iterdir())) == 3


def test_a_file_that_is_written_to_while_it_is_read_is_refused(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data = load_tokenizer(folder), write(tmp_path / "a.jsonl", [{"text": "what"}])
    read = store.iterate_examples

    def other(*arguments: Any, **options: Any) -> Any:
        write(data, [{"text": "else"}])
        os.utime(data, ns=(1, 1))
        return read(*arguments, **options)

    monkeypatch.setattr(store, "iterate_examples", other)
    with pytest.raises(DataError, match="has changed while it was read"):
        stored_tokens([data], folder, tokenizer, "all")
    assert not list(cache.glob("*/*.bin"))


def test_what_lies_below_a_model_is_not_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", [{"text": "what"}]), load_tokenizer(folder)
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    stored_tokens([path], place, tokenizer, "all")
    (place / "runs").mkdir()
    (place / "runs" / "metrics.json").write_text("1")
    (place / "model.safetensors").write_bytes(b"weights")
    stored_tokens([path], place, Broken(), "all")  # type: ignore[arg-type]
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    for name in ("additional_chat_templates/short.jinja", "words.tiktoken"):
        (place / name).write_text("other")
        with pytest.raises(AssertionError, match="tokenised again"):
            stored_tokens([path], place, Broken(), "all")  # type: ignore[arg-type]
        (place / name).unlink()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_what_was_read_is_not_kept_in_memory(folder: Path, tmp_path: Path) -> None:
    entries = [{"prompt": "what", "completion": "is it? " * 50} for _ in range(50)]
    path, tokenizer = write(tmp_path / "a.jsonl", entries), load_tokenizer(folder)
    stream, _ = stored_tokens([path], folder, tokenizer, "answers")
    for packing in (True, False):
        rows = rows_of(stream, 16, 0, packing=packing)
        rows.batch(torch.arange(rows.num_rows))
    maps = Path("/proc/self/smaps").read_text().split("VmFlags")
    ours = [one for one in maps if str(tmp_path) in one]
    assert len(ours) == 3
    assert all("\nRss:                   0 kB" in one for one in ours)


def test_what_cannot_be_stored_is_one_line(folder: Path, tmp_path: Path, cache: Path) -> None:
    tokenizer, path = load_tokenizer(folder), write(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl: holds no text"):
        stored_tokens([path], folder, tokenizer, "all")
    with pytest.raises(DataError, match="no such file"):
        stored_tokens([tmp_path / "b.jsonl"], folder, tokenizer, "all")
    write(path, [{"text": "a"}])
    shutil.rmtree(cache)
    cache.write_text("a file")
    with pytest.raises(DataError, match=r"tokens cannot be kept there .* XDG_CACHE_HOME"):
        stored_tokens([path], folder, tokenizer, "all")
