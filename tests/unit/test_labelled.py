from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colledge.data import Labelled, SplitSettings, deal, load_text, make_rows, read_examples
from colledge.errors import DataError
from tests.unit.test_data import ByteTokenizer


def three_rows() -> Labelled:
    return Labelled({"pixels": torch.arange(12.0).reshape(3, 1, 2, 2)}, torch.tensor([5, 6, 7]), 10)


def test_take_gives_rows_in_the_order_asked_for() -> None:
    taken = three_rows().take(torch.tensor([2, 0]))
    assert taken.labels.tolist() == [7, 5]
    assert taken.inputs["pixels"][:, 0, 0, 0].tolist() == [8.0, 0.0]
    assert (taken.num_rows, taken.num_classes) == (2, 10)


def test_take_copies_so_that_the_whole_can_be_freed() -> None:
    whole = three_rows()
    taken = whole.take(torch.tensor([0, 1]))
    whole.inputs["pixels"].zero_()
    assert taken.inputs["pixels"][1, 0, 1, 1] == 7.0
    assert taken.inputs["pixels"].untyped_storage().nbytes() == 2 * 4 * 4


def test_unequal_rows_are_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match=r"equal rows, saw \[2, 3\]"):
        Labelled({"pixels": torch.zeros(3, 1, 2, 2)}, torch.zeros(2, dtype=torch.int64), 10)


# -- text ----------------------------------------------------------------------------------------------------------


def text_folder(folder: Path) -> Path:
    (folder / "b").mkdir()
    (folder / "b" / "second.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    (folder / "a.txt").write_text("first document")
    (folder / "c.py").write_text("print('no text of ours')")
    return folder


def test_text_of_a_folder_is_packed_in_the_order_of_its_paths(tmp_path: Path) -> None:
    data = load_text(text_folder(tmp_path), ByteTokenizer(), 8)
    assert data.num_classes == 257
    ids, labels = data.inputs["input_ids"], data.labels
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.shape == labels.shape == (3, 8)
    tokens = [*b"first document", 256, *b"1+1=2", 256]
    assert ids.flatten()[: len(tokens)].tolist() == tokens
    assert labels.flatten().tolist() == tokens + [-100] * 3
    assert set(data.inputs) == {"input_ids"}


def test_what_of_a_folder_is_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = text_folder(tmp_path)
    (folder / "d.jsonl").write_text('{"text": "more", "score": 3}\n{"text": ""}\n')
    (folder / "linked").symlink_to(folder / "b")
    load_text(folder, ByteTokenizer(), 8)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: not read: 1 .py file(s) and 1 linked folder(s).",
        f"{folder}: Keys that are not read: score (1).",
        f"{folder}: 1 example(s) hold no text and were left out.",
    ]


def test_text_of_a_file_gives_the_rows_of_training(tmp_path: Path) -> None:
    path = text_folder(tmp_path) / "a.txt"
    rows = make_rows(read_examples(path), ByteTokenizer(), 5)
    data = load_text(path, ByteTokenizer(), 5)
    assert torch.equal(data.inputs["input_ids"], rows.batch(torch.arange(rows.num_rows)).inputs["input_ids"])
    assert torch.equal(data.labels, rows.batch(torch.arange(rows.num_rows)).targets["labels"])


def test_the_loss_needs_no_attention_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).double()
    data = load_text(text_folder(tmp_path), ByteTokenizer(), 8)
    ids, labels = data.inputs["input_ids"], data.labels
    mask = (labels != -100).long()
    assert not mask.all()
    with torch.no_grad():
        plain, masked = (model(ids, attention_mask=one, labels=labels).loss for one in (None, mask))
    assert float(plain) == pytest.approx(float(masked), rel=1e-12)


def test_a_folder_without_text_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file of \.jsonl, \.json, \.parquet, \.txt"):
        load_text(tmp_path, ByteTokenizer(), 8)
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        load_text(tmp_path / "gone.txt", ByteTokenizer(), 8)


def test_text_is_dealt_and_taken(tmp_path: Path) -> None:
    data = load_text(text_folder(tmp_path), ByteTokenizer(), 8)
    parts = [data.take(rows) for rows in deal(data.labels, 2, SplitSettings(iid=True), 0)]
    assert sorted(part.num_rows for part in parts) == [1, 2]
    assert all(part.inputs["input_ids"].shape == part.labels.shape for part in parts)
