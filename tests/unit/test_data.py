from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from colledge.data import Batch, TokenizedText, read_texts, rows_for_step, tokenize
from colledge.errors import DataError, ModelError


class ByteTokenizer:
    """A token a byte; 256 ends a document."""

    eos_token_id: int | None = 256

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [list(one.encode()) for one in text]}


def pack(texts: list[str], sequence_length: int) -> TokenizedText:
    return tokenize(texts, ByteTokenizer(), sequence_length)


def write(folder: Path, content: str | bytes, name: str = "corpus.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Reading


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    texts = ["one", "two\u2028still two", "dreí", ""]
    content = (
        "\ufeff" + "\r\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts) + "\n\n"
    )
    assert read_texts(write(tmp_path, content)) == texts[:3]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path, "one\n\ntwo\n", "corpus.txt")) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no text"]),
        ('{"text": ""}\n\n', ["holds no text"]),
        ('{"text": "a"}\n{"text": "b"\n', ["line 2", "not JSON"]),
        ('{"text": "a"}\n\n{"content": "b", "id": 3}\n', ["line 3", "'text' is missing", "'content', 'id'"]),
        ('{"text": 5}\n', ["line 1", "'text'", "int", "string"]),
        ('{"text": null}\n', ["line 1", "'text'", "NoneType"]),
        ('["a"]\n', ["line 1", "list", '{"text": ...}']),
        ('{"text": "\\ud800"}\n', ["line 1", "'text'", "surrogate"]),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ["line 2", "0xe9", "UTF-8", "iconv"]),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        read_texts(write(tmp_path, content))
    for word in ["corpus.jsonl", *words]:
        assert word in str(error.value)


def test_bad_bytes_of_a_text_file_are_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.txt, line 3: byte 0xff"):
        read_texts(write(tmp_path, b"one\ntwo\n\xff", "corpus.txt"))


def test_missing_files_folders_and_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_texts(tmp_path / "none.jsonl")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "folder.txt")
    with pytest.raises(DataError, match=r"saw a \.csv file, wanted \.jsonl or \.txt"):
        read_texts(write(tmp_path, "a", "corpus.csv"))


# Packing


def test_documents_are_joined_with_their_end_and_packed() -> None:
    text = pack(["ab", "cde"], 3)
    assert text.rows.tolist() == [[97, 98, 256], [99, 100, 101], [256, 256, 256]][:2]  # a lone end is dropped
    assert (text.num_rows, text.num_tokens, text.sequence_length) == (2, 6, 3)
    assert text.rows.dtype == torch.int64


def test_the_last_row_is_padded_and_only_its_batches_carry_a_mask() -> None:
    text = pack(["abcdef"], 5)  # six bytes and the end: 5 + 2
    assert text.num_tokens == 7
    whole = text.batch(torch.tensor([0, 0]))
    assert set(whole.inputs) == {"input_ids"}
    assert torch.equal(whole.targets["labels"], whole.inputs["input_ids"])
    padded = text.batch(torch.tensor([1, 0]))
    assert padded.inputs["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert padded.targets["labels"].tolist() == [[102, 256, -100, -100, -100], [97, 98, 99, 100, 101]]
    assert padded.inputs["input_ids"].tolist()[0][:2] == [102, 256]
    tensors = [*padded.inputs.values(), *padded.targets.values()]
    assert all(tensor.dtype == torch.int64 for tensor in tensors)
    assert padded.num_rows == 2


def test_text_that_fills_its_rows_has_no_padding() -> None:
    text = pack(["abcd", "efgh"], 5)
    assert text.num_rows == 2
    assert set(text.batch(torch.arange(2)).inputs) == {"input_ids"}


def test_long_documents_are_tokenised_in_pieces_without_loss() -> None:
    document = "\n".join(f"line {n}" for n in range(30_000)) + "x" * 200_000
    rows = pack([document, "end"], 1000)
    stream = rows.rows.reshape(-1)[: rows.num_tokens]
    assert bytes(stream[stream != 256].tolist()).decode() == document + "end"
    assert int((stream == 256).sum()) == 2


def test_too_little_text_is_refused() -> None:
    class Deaf(ByteTokenizer):
        def __call__(self, text: list[str], **_: bool) -> Mapping[str, list[list[int]]]:  # type: ignore[override]
            return {"input_ids": [[] for _ in text]}

    with pytest.raises(DataError, match="1 token"):
        tokenize(["a"], Deaf(), 8)
    assert pack(["a"], 8).num_tokens == 2


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        tokenize(["a"], tokenizer, 8)


def test_a_hugging_face_tokenizer_fits() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(
        ["some text to learn from"], vocab_size=300, special_tokens=["<end>"], show_progress=False
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<end>")
    rows = tokenize(["some text", "more"], fast, 64)
    stream = rows.rows.reshape(-1)[: rows.num_tokens]
    assert fast.decode(stream.tolist()) == "some text<end>more<end>"


def test_a_batch_has_equal_rows() -> None:
    with pytest.raises(AssertionError, match=r"\[2, 3\]"):
        Batch({"input_ids": torch.zeros(2, 4)}, {"labels": torch.zeros(3, 4)})


# Sampling


def test_an_epoch_sees_every_row_once_and_then_another_order() -> None:
    rows = torch.cat([rows_for_step(10, 4, seed=7, step=step) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_the_rows_are_a_function_of_seed_and_step_alone() -> None:
    before = rows_for_step(100, 16, seed=3, step=11)
    torch.manual_seed(999)
    torch.rand(5)
    assert torch.equal(rows_for_step(100, 16, seed=3, step=11), before)
    assert not torch.equal(rows_for_step(100, 16, seed=4, step=11), before)
    # Half the batch twice as often is the same order of rows.
    halves = [rows_for_step(100, 8, seed=3, step=step) for step in (22, 23)]
    assert torch.equal(torch.cat(halves), before)


def test_a_batch_may_be_larger_than_the_data() -> None:
    rows = rows_for_step(3, 8, seed=0, step=0)
    assert len(rows) == 8
    assert sorted(rows[:3].tolist()) == sorted(rows[3:6].tolist()) == [0, 1, 2]


def test_seeds_and_epochs_do_not_meet() -> None:
    assert not torch.equal(rows_for_step(50, 50, seed=0, step=1), rows_for_step(50, 50, seed=1, step=0))
