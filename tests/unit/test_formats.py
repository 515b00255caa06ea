"""What people bring: other trainers' shapes, other encodings, folders; read and said, or named as what it is."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from colledge.data import Example, find_files, read_examples
from colledge.data.text.reading.examples import Noticed
from colledge.errors import DataError
from colledge.launch.run_config import load_run


def read(folder: Path, *entries: Any, seen: Noticed | None = None) -> list[Example]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return read_examples(path, noticed=seen)


def test_sharegpt_is_read_as_messages_and_said(tmp_path: Path) -> None:
    call = json.dumps({"name": "weather", "arguments": {"place": "Bergen"}, "id": "call-1"})
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains.", "weight": 1},
    ]
    seen = Noticed()
    (one,) = read(tmp_path, {"conversations": turns, "system": "be kind", "tools": "[]", "id": 7}, seen=seen)
    assert [role for role, _ in one.parts] == ["system", "user", "assistant", "tool", "assistant"]
    (called,) = one.messages[2]["tool_calls"]
    assert {**called["function"], "id": called["id"]} == json.loads(call)
    assert one.messages[4] == {"role": "assistant", "content": "It rains.", "weight": 1}
    assert one.columns == {"id": 7}  # a list of no tools says nothing
    assert seen.sentences() == ["1 example(s) were read as ShareGPT."]
    (other,) = read(
        tmp_path, {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    )
    assert other.parts == (("user", "a"), ("assistant", "b"))
    (named,) = read(
        tmp_path, {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}
    )
    assert named.parts == other.parts


def test_alpaca_is_read_in_its_own_wording(tmp_path: Path) -> None:
    seen = Noticed()
    with_input, without = read(
        tmp_path,
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "text": "all of it"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        seen=seen,
    )
    assert with_input.parts == (
        (
            "prompt",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
            "### Input:\n2 and 2\n\n"
            "### Response:\n",
        ),
        ("completion", "4"),
    )
    assert without.parts[0][1].startswith("Below is an instruction that describes a task. Write")
    assert "### Input" not in without.parts[0][1]
    assert seen.read_as == {"Alpaca": 2}


def test_a_prompt_and_a_completion_of_messages_are_a_chat_of_which_the_prompt_is_not_learnt(
    tmp_path: Path,
) -> None:
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (one,) = read(tmp_path, {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert one.parts == (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert one.prompting == 3


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            ["preference data (chosen, rejected) are not read yet"],
        ),
        (
            {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []},
            ["preference data"],
        ),
        ({"prompt": "a", "completion": "b", "label": False}, ["KTO's data", "not read yet"]),
        ({"prompt": "a", "completion": "b", "label": 1}, ["KTO's data", "not read yet"]),
        ({"messages": [{"role": "user", "content": "a"}], "label": True}, ["KTO's data"]),
        (
            {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
            ["preference data", "chosen_response"],
        ),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, ["'prompt'", "both as messages"]),
        ({"instruction": "a", "input": "", "output": None}, ["'output' holds nothing"]),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, ["several completions"]),
        ({"input_ids": [1, 2], "labels": [1, 2]}, ["tokens (input_ids) are not read"]),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            ["conversations[0]", "'alien'", "human", "gpt"],
        ),
        ({"conversations": []}, ["'conversations'", "an empty list"]),
        ({"prompt": "a", "completion": "b", "label": 0}, ["KTO's data"]),
        ({"conversations": [{"from": "gpt", "value": "a"}], "messages": []}, ["messages and conversations"]),
        ({"conversations": [{"from": "system", "value": "a"}], "system": "b"}, ["'system' and a first turn"]),
        ({"conversations": [{"from": "function_call", "value": "no JSON"}]}, ["no call of a tool"]),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, ["Alpaca", "'history'"]),
        ({"instruction": "a", "output": "b", "completion": "c"}, ["'output' and 'completion'", "lost"]),
        (
            {"conversations": [{"from": "human", "value": "a", "content": "b"}]},
            ["conversations[0]", "'content'", "lost"],
        ),
        ({"conversations": [{"from": "gpt", "value": "a", "role": "user"}]}, ["'role' too", "lost"]),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f"}', "content": "b"}]},
            ["'content' too", "lost"],
        ),
        (
            {
                "conversations": [
                    {
                        "from": "function_call",
                        "value": '{"name": "f", "arguments": {}, "parameters": {"a": 1}}',
                    }
                ]
            },
            ["'arguments' and 'parameters'", "lost"],
        ),
    ],
)
def test_what_is_not_read_is_called_what_it_is(
    entry: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, entry)
    assert all(word in str(error.value) for word in ["line 1", *words])
    assert "name the key `text`" not in str(error.value)


def test_null_is_a_key_that_is_not_there(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    rows = [
        {"text": "one", "prompt": None, "completion": None, "messages": None},
        {"text": None, "prompt": None, "completion": None, "messages": chat},
        {"text": None, "prompt": None, "completion": None, "messages": None},
    ]
    seen = Noticed()
    assert [one.kind for one in read(tmp_path, *rows, seen=seen)] == ["text", "chat"]
    assert seen.sentences() == ["1 example(s) hold no text and were left out."]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    found = read_examples(tmp_path / "data.parquet")
    assert [one.kind for one in found] == ["text", "chat"]
    assert found[1].messages[1] == {"role": "assistant", "content": "b"}
    call = {"function": {"name": "f", "arguments": {"place": "Bergen", "day": None}}}
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    seen = Noticed()
    (one,) = read(tmp_path, {"messages": asked}, seen=seen)
    assert one.messages[1]["tool_calls"][0]["function"]["arguments"] == {"place": "Bergen"}
    assert seen.sentences() == ["1 call(s) of tools have arguments of null, which are left out."]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_key_that_stands_twice_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    entry = '{"text": "first", "more": {"a": 1}, "text": "second"}'
    path.write_text(entry if suffix == ".jsonl" else f"[{entry}]")
    with pytest.raises(DataError, match="key 'text' stands twice in one object"):
        read_examples(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_number_of_too_many_digits_is_one_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    entry = '{"text": "a", "id": ' + "1" * 5000 + "}"
    path.write_text(entry if suffix == ".jsonl" else f"[{entry}]")
    with pytest.raises(DataError, match="not JSON"):
        read_examples(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"]
    )
    parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(DataError, match="two columns 'text'"):
        read_examples(tmp_path / "data.parquet")


@pytest.mark.parametrize("text", ["BZhang wrote this.", "PAR1S is a word"])
def test_text_that_begins_as_a_packed_file_is_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(text)
    assert read_examples(tmp_path / "data.txt")[0].parts == (("text", text),)


def test_packed_files_are_told_by_their_beginning(tmp_path: Path) -> None:
    import bz2

    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "data.txt"
    path.write_bytes(bz2.compress(b"text " * 99))
    with pytest.raises(DataError, match="is a bzip2 file"):
        read_examples(path)
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match="is a parquet file"):
        read_examples(path)


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    dead = tmp_path / "dead.jsonl"
    dead.symlink_to("/nowhere/y.jsonl")
    for source in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="which is not there"):
            find_files([source])
    dead.rename(tmp_path / "dead.png")
    assert find_files([tmp_path]).files == (tmp_path / "a.jsonl",)


TEXT = "Les élèves étaient là, près de la forêt où l'été s'achève doucement.\n" * 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TEXT.encode("utf-16"), ["UTF-16", "iconv -f utf-16 -t utf-8 data.txt"]),
        (TEXT.encode("utf-32"), ["UTF-32", "iconv -f utf-32"]),
        (TEXT.encode("utf-16-le"), ["iconv -f utf-16-le"]),
        (TEXT.encode("utf-16-be"), ["iconv -f utf-16-be"]),
        (TEXT.encode("latin-1"), ["line 1: byte 0xe9", "iconv -f cp1252"]),
        (("på æbler øl år\n" * 20).encode("latin-1"), ["iconv -f cp1252"]),
        (("ganz schön müde, größer als üblich\n" * 5).encode("cp1252"), ["iconv -f cp1252"]),
        (
            "Он сказал, что зима в этом году будет долгой и холодной.\n".encode("cp1251") * 3,
            ["iconv -f cp1251"],
        ),
        (gzip.compress(TEXT.encode(), mtime=0), ["is a gzip file", "gunzip -c data.txt > unpacked.txt"]),
        (b"PK\x03\x04" + b"x" * 50, ["is a zip file", "unzip -p"]),
        (TEXT.encode() + bytes(4096), ["line 4: holds a zero byte", "cut off"]),
        (b"a" * 40 + bytes(200), ["line 1: holds a zero byte"]),
        (TEXT.encode()[:-1] + b"\xc3", ["line 3: ends within a character", "cut off"]),
        (TEXT.encode() + b"caf\xe9 " + TEXT.encode(), ["line 4: byte 0xe9", "what is around it is", "mend"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_encodings_are_named_with_their_cure(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_examples(path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_files_that_were_joined_keep_no_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n' * 2)
    assert [one.parts for one in read_examples(path)] == [(("text", "a"),)] * 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", "", ["saw a .gz file", "unpack it first"]),
        ("a.csv", "text\na", ["saw a .csv file", "tables of text are not read"]),
        ("a.ndjson", "", ["call it .jsonl"]),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', ["one object a line is called .jsonl"]),
        ("a.jsonl", '[{"text": "a"}, {"text": "b"}]\n', ["line 1: saw list", "one list is called .json"]),
    ],
)
def test_a_name_that_does_not_fit_is_told_which_does(
    name: str, content: str, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        read_examples(tmp_path / name)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_folders_patterns_and_lists_are_files_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.TXT", "sub/c.json", ".hidden/d.txt", "._e.txt", "f.csv", "g.csv", "README"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = find_files([tmp_path / "data"])
    assert [path.name for path in found.files] == ["a.TXT", "b.jsonl", "c.json"]
    assert found.left_out == (
        f"{tmp_path / 'data'}: not read: 2 .csv, 1 without a suffix, 2 hidden file(s).",
    )
    assert [p.name for p in find_files([tmp_path / "data" / "*.jsonl"]).files] == ["b.jsonl"]
    assert find_files([tmp_path / "data" / "._e.txt"]).files[0].name == "._e.txt"  # named itself
    with pytest.raises(DataError, match="is named twice"):
        find_files([tmp_path / "data" / "b.jsonl", tmp_path / "data"])
    with pytest.raises(DataError, match="no file is called so"):
        find_files([tmp_path / "data" / "*.parquet"])
    with pytest.raises(DataError, match=r"holds no file of \.jsonl.* \(but 1 hidden file\(s\)\)"):
        find_files([_hidden_only(tmp_path)])


def _hidden_only(folder: Path) -> Path:
    (folder / "only" / ".x").mkdir(parents=True)
    (folder / "only" / ".x" / "a.txt").write_text("a")
    return folder / "only"


def test_a_run_takes_several_files_by_the_folder_of_its_own(tmp_path: Path) -> None:
    run = {
        "model": "m",
        "pool": "pool.yaml",
        "data": {"train": ["a.jsonl", "more/*.jsonl"], "validation": "held.txt"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**run, "evaluate_every": 1}))
    data = load_run(path).data
    assert data.train == (tmp_path / "a.jsonl", tmp_path / "more" / "*.jsonl")
    assert data.validation == (tmp_path / "held.txt",)
    assert load_run(path, ["data.train=/x/b.txt"]).data.train == (Path("/x/b.txt"),)


@pytest.mark.parametrize("name", ["org/name", "tatsu-lab/alpaca"])
def test_a_hub_id_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data sets of a hub \(org/name\) are not read yet"):
        read_examples(tmp_path / name)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is a pipe or a device"):
        read_examples(tmp_path / "pipe.jsonl")
