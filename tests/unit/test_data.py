from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colledge.data import (
    Batch,
    Example,
    Rows,
    make_rows,
    read_examples,
    rows_for_step,
    split_examples,
    tokenize,
)
from colledge.errors import DataError, ModelError

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


class ByteTokenizer:
    """A token a byte; 256 ends a document."""

    eos_token_id: int | None = 256
    chat_template: str | None = CHATML

    def __len__(self) -> int:
        return 257

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, Any]:
        places = [[(i, i + 1) for i, char in enumerate(one) for _ in char.encode()] for one in text]
        return {"input_ids": [list(one.encode()) for one in text], "offset_mapping": places}

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token for token in token_ids if token < 256).decode()

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: bool) -> Any:
        def refuse(why: str) -> None:
            raise jinja2.TemplateError(why)

        assert self.chat_template is not None
        template = jinja2.Template(self.chat_template)
        prompting = options.get("add_generation_prompt", False)
        return template.render(messages=conversation, add_generation_prompt=prompting, raise_exception=refuse)


def document(text: str) -> Example:
    return Example("here", "text", (("text", text),))


def completion(prompt: str, answer: str) -> Example:
    return Example("here", "completion", (("prompt", prompt), ("completion", answer)))


def chat(*contents: str, first: str = "user") -> Example:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    parts = tuple((roles[i % 2], text) for i, text in enumerate(contents))
    return Example("here", "chat", parts, tuple({"role": role, "content": text} for role, text in parts))


def pack(texts: list[str], sequence_length: int) -> Rows:
    return make_rows([document(text) for text in texts], ByteTokenizer(), sequence_length)


def ids_of(rows: Rows) -> torch.Tensor:
    return rows.batch(torch.arange(rows.num_rows)).inputs["input_ids"]


def learnt_text(example: Example, loss_on: Any = "answers", tokenizer: Any = None) -> tuple[str, str]:
    """Return an example's tokens as text, and those that the loss counts."""
    tokenizer = tokenizer or ByteTokenizer()
    (one,) = tokenize([example], tokenizer, loss_on)
    ids = one.ids if one.learnt is None else one.ids[one.learnt]
    return tokenizer.decode(one.ids.tolist()), tokenizer.decode(ids.tolist())


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
    assert [e.parts for e in read_examples(write(tmp_path, content))] == [(("text", t),) for t in texts[:3]]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path, "one\n\ntwo\n", "corpus.txt"))
    assert example.parts == (("text", "one\n\ntwo\n"),)


MIXED: list[dict[str, Any]] = [
    {"text": "a document", "id": 3},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "x": 1}]},
]


def test_every_kind_of_example_in_every_kind_of_file(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    lines = write(tmp_path, "\n".join(json.dumps(one) for one in MIXED))
    wanted = [(e.kind, e.parts) for e in read_examples(lines)]
    assert wanted == [
        ("text", (("text", "a document"),)),
        ("completion", (("prompt", "2 + 2 = "), ("completion", "4"))),
        ("chat", (("user", "hi"), ("assistant", "ho"))),
    ]
    listed = read_examples(write(tmp_path, json.dumps(MIXED, indent=1), "corpus.json"))
    assert [(e.kind, e.parts) for e in listed] == wanted
    assert [e.where for e in listed] == [f"{tmp_path}/corpus.json, entry {n}" for n in (1, 2, 3)]
    for number, one in enumerate(MIXED):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([one, one]), path)
        rows = read_examples(path)
        assert [(e.kind, e.parts) for e in rows] == [wanted[number]] * 2
        assert rows[1].where == f"{path}, row 2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no text"]),
        ('{"text": ""}\n\n', ["holds no text"]),
        ('{"text": "a"}\n{"text": "b"\n', ["line 2", "not JSON"]),
        ('{"text": "a"}\n\n{"content": "b", "id": 3}\n', ["line 3", "'text' is missing", "'content', 'id'"]),
        ('{"text": 5}\n', ["line 1", "'text'", "int", "string"]),
        ('{"text": null}\n', ["holds no text"]),
        ('["a"]\n', ["line 1", "list", '{"text": ...}']),
        ('{"text": "\\ud800"}\n', ["line 1", "'text'", "surrogate"]),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ["line 2", "0xe9", "UTF-8", "iconv"]),
        ('{"prompt": "a"}\n', ["line 1", "'completion' is missing"]),
        ('{"completion": "a", "prompt": ["b"]}\n', ["line 1", "'prompt'", "list", "string"]),
        ('{"messages": "a"}\n', ["line 1", "'messages'", "str", "list of messages"]),
        ('{"messages": []}\n', ["line 1", "'messages'", "an empty list"]),
        ('{"messages": ["a"]}\n', ["line 1, messages[0]", "str", "role and content"]),
        ('{"messages": [{"role": "user"}]}\n', ["line 1, messages[0]", "'content' is missing", "'role'"]),
        (
            '{"messages": [{"role": "user", "content": [1]}]}\n',
            ["messages[0]", "'content'", "list with int", "string"],
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    with pytest.raises(DataError) as error:
        read_examples(write(tmp_path, content))
    for word in ["corpus.jsonl", *words]:
        assert word in str(error.value)


def test_every_fault_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    faults: list[DataError] = []
    content = '{"text": "a"}\nnot json\n{"txt": 1}\n{"prompt": "a", "completion": "b"}\n\xff'
    found = read_examples(write(tmp_path, content.encode("latin1")), faults.append)
    assert [e.kind for e in found] == ["text", "completion"]
    assert [str(fault).split(": ")[0].rpartition(" ")[2] for fault in faults] == ["2", "3", "5"]


def test_bad_bytes_of_a_text_file_are_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.txt, line 3: byte 0xff"):
        read_examples(write(tmp_path, b"one\ntwo\n\xff", "corpus.txt"))


def test_missing_files_folders_and_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "folder.txt")
    with pytest.raises(DataError, match="saw a name without a suffix"):
        read_examples(write(tmp_path, "a", "corpus"))
    with pytest.raises(DataError, match=r"saw a \.csv file, wanted \.jsonl, \.json, \.parquet, \.txt"):
        read_examples(write(tmp_path, "a", "corpus.csv"))
    with pytest.raises(DataError, match="saw dict, wanted a list"):
        read_examples(write(tmp_path, '{"text": "a"}', "corpus.json"))
    with pytest.raises(DataError, match=r"corpus\.parquet: not parquet"):
        read_examples(write(tmp_path, "no table", "corpus.parquet"))


def test_a_split_is_decided_by_the_seed_and_loses_nothing() -> None:
    examples = [document(str(n)) for n in range(50)]
    train, held = split_examples(examples, 0.1, seed=3)
    assert len(held) == 5
    assert sorted((*train, *held), key=examples.index) == examples
    assert split_examples(examples, 0.1, seed=3) == (train, held)
    assert split_examples(examples, 0.1, seed=4)[1] != held
    assert len(split_examples(examples[:2], 0.01, seed=0)[1]) == 1
    with pytest.raises(DataError, match="leave none to train on"):
        split_examples(examples[:1], 0.5, seed=0)


# What the loss counts


def test_all_of_a_document_and_of_an_example_counts_unless_answers_are_asked_for() -> None:
    assert learnt_text(document("abc")) == ("abc", "abc")
    assert learnt_text(completion("2+2=", "4"), "all") == ("2+2=4", "2+2=4")
    whole = "<user>hi</s><assistant>ho</s>"
    assert learnt_text(chat("hi", "ho"), "all") == (whole, whole)


def test_answers_are_completions_and_what_the_assistant_says() -> None:
    assert learnt_text(completion("2+2=", "4")) == ("2+2=4", "4")
    (one,) = tokenize([completion("2+2=", "4")], ByteTokenizer(), "answers")
    assert (one.ids[-1], one.num_learnt) == (256, 2)  # its end is learnt too
    text, learnt = learnt_text(chat("hi", "ho", "and?", "no"))
    assert text == "<user>hi</s><assistant>ho</s><user>and?</s><assistant>no</s>"
    assert learnt == "ho</s>no</s>"


def test_chats_that_cannot_be_rendered_are_named() -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(DataError, match=r"here: no message is the assistant's"):
        list(tokenize([chat("hi")], tokenizer, "answers"))
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(DataError, match=r"here: the chat template refuses .*roles must alternate"):
        list(tokenize([chat("ho", "hi", first="assistant")], tokenizer))
    tokenizer.chat_template = "{{ messages | length }}{{ messages | join(' ', attribute='content') }}"
    with pytest.raises(DataError, match=r"changes earlier messages .* messages\[1\]"):
        list(tokenize([chat("hi", "ho")], tokenizer, "answers"))
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has messages and the tokenizer has no chat template"):
        list(tokenize([chat("hi", "ho")], tokenizer))


@given(
    st.lists(st.tuples(st.sampled_from(("text", "completion", "chat")), st.text(max_size=9)), min_size=1),
    st.integers(2, 9),
    st.sampled_from(("all", "answers")),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_no_token_is_lost_or_learnt_twice(
    kinds: list[tuple[str, str]], length: int, loss_on: Any, packing: bool
) -> None:
    """Rows hold the examples' tokens in order, and their labels are exactly those that the examples say."""
    tokenizer = ByteTokenizer()
    made = {"text": document, "completion": lambda t: completion(t, t), "chat": lambda t: chat(t, t)}
    examples = [made[kind](text) for kind, text in kinds]
    tokens = list(tokenize(examples, tokenizer, loss_on))
    flags = [np.ones(len(t.ids), bool) if t.learnt is None else t.learnt for t in tokens]
    if packing:
        pieces = list(pairwise(range(0, sum(len(t.ids) for t in tokens) + length, length)))
        stream, told = np.concatenate([t.ids for t in tokens]), np.concatenate(flags)
        wanted = [(stream[a:b], told[a:b]) for a, b in pieces]
    else:
        wanted = [(t.ids[:length], f[:length]) for t, f in zip(tokens, flags, strict=True)]
    wanted = [(i, f) for i, f in wanted if len(i) > 1 and f[1:].any()]
    if not wanted:
        with pytest.raises(DataError, match="nothing to learn"):
            make_rows(examples, tokenizer, length, packing=packing, loss_on=loss_on)
        return
    rows = make_rows(examples, tokenizer, length, packing=packing, loss_on=loss_on)
    batch = rows.batch(torch.arange(rows.num_rows))
    ids, labels = batch.inputs["input_ids"], batch.targets["labels"]
    seen = batch.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    learnt = labels != -100
    assert torch.equal(labels[learnt], ids[learnt])
    assert not (learnt & ~seen).any()
    assert rows.num_rows == len(wanted)
    for row, (row_ids, row_flags) in enumerate(wanted):
        assert ids[row][seen[row]].tolist() == row_ids.tolist()
        assert learnt[row][seen[row]].tolist() == row_flags.tolist()


# Packing


def test_documents_are_joined_with_their_end_and_packed() -> None:
    text = pack(["ab", "cde"], 3)
    assert (
        ids_of(text).tolist() == [[97, 98, 256], [99, 100, 101], [256, 256, 256]][:2]
    )  # a lone end is dropped
    assert (text.num_rows, text.num_tokens, text.sequence_length) == (2, 6, 3)
    assert ids_of(text).dtype == torch.int64


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


def test_without_packing_examples_are_padded_or_cut_and_said_to_be() -> None:
    examples = [completion("ab", "c"), completion("abcdefgh", "i"), completion("a", "bcdefgh")]
    rows = make_rows(examples, ByteTokenizer(), 5, packing=False, loss_on="answers")
    assert ids_of(rows).tolist() == [[97, 98, 99, 256, 256], [97, 98, 99, 100, 101]]
    assert (rows.num_cut, rows.num_dropped) == (2, 1)  # the second's answer is beyond the row
    labels = rows.batch(torch.arange(2)).targets["labels"].tolist()
    assert labels == [[-100, -100, 99, 256, -100], [-100, 98, 99, 100, 101]]


def test_long_documents_are_tokenised_in_pieces_without_loss() -> None:
    document = "\n".join(f"line {n}" for n in range(30_000)) + "x" * 200_000
    rows = pack([document, "end"], 1000)
    stream = ids_of(rows).reshape(-1)[: rows.num_tokens]
    assert bytes(stream[stream != 256].tolist()).decode() == document + "end"
    assert int((stream == 256).sum()) == 2


def test_too_little_text_is_refused() -> None:
    class Deaf(ByteTokenizer):
        def __call__(self, text: list[str], **_: bool) -> Mapping[str, Any]:
            return {"input_ids": [[] for _ in text]}

    with pytest.raises(DataError, match="nothing to learn"):
        make_rows([document("a")], Deaf(), 8)
    assert pack(["a"], 8).num_tokens == 2


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        make_rows([document("a")], tokenizer, 8)


def hugging_face_tokenizer(chat_template: str = CHATML) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.ByteLevelBPETokenizer()
    learn = ["some text to learn from", "<user>some text</s><assistant>more</s>"]
    backend.train_from_iterator(learn, vocab_size=300, special_tokens=["<end>", "</s>"], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<end>")
    fast.chat_template = chat_template
    return fast


def test_a_hugging_face_tokenizer_fits() -> None:
    fast = hugging_face_tokenizer()
    rows = make_rows([document("some text"), document("more")], fast, 64)
    stream = ids_of(rows).reshape(-1)[: rows.num_tokens]
    assert fast.decode(stream.tolist()) == "some text<end>more<end>"
    assert learnt_text(completion("some", " text"), "answers", fast)[1] == " text<end>"
    assert (
        learnt_text(completion("some ", "text"), "answers", fast)[1] == " text<end>"
    )  # one token with its space


GENERATION = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_answers_in_a_hugging_face_template_marked_or_not(template: str) -> None:
    fast = hugging_face_tokenizer(template)
    text, learnt = learnt_text(chat("some text", "more", "text", "tö from"), "answers", fast)
    assert text == "<user>some text</s><assistant>more</s><user>text</s><assistant>tö from</s>"
    assert learnt == "more</s>tö from</s>"


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
