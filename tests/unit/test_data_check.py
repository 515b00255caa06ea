"""`colledge data check`, and what a run's data section asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from colledge.errors import ConfigError, DataError
from colledge.launch.cli import main
from colledge.launch.inputs import load_data
from colledge.launch.run_config import load_run

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"what is {n}?"},
            {"role": "assistant", "content": "it is" * n},
        ]
    }
    for n in range(1, 21)
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(["what is it?"], vocab_size=270, special_tokens=["</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="</s>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["colledge", "data", "check", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        seen = capsys.readouterr()
        return int(ended.value.code or 0), seen.out, seen.err

    return run


def write(folder: Path, values: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_good_data_is_counted_and_shown(tmp_path: Path, model: Path, check: Run) -> None:
    file = write(tmp_path, [*CHATS, {"text": "more"}])
    code, out, err = check(
        str(file), "--model", str(model), "--loss-on", "answers", "--sequence-length", "64"
    )
    assert (code, err) == (0, "")
    assert "21 example(s) (1 of text, 20 of messages)" in out
    assert "(loss_on: answers)" in out
    assert f"sample ({file}, line 1, " in out
    assert "<user>what is 1?</s><assistant>⟦it is</s>⟧" in out
    assert "⟦more</s>⟧" in out
    histogram = [line.split() for line in out.splitlines() if "█" in line]
    assert sum(int(line[-1]) for line in histogram) == 21
    assert "of which the loss counts" in out


def test_without_a_model_it_is_read_and_counted(tmp_path: Path, check: Run) -> None:
    code, out, _ = check(str(write(tmp_path, [{"text": "a"}, {"prompt": "b", "completion": "c"}])))
    assert code == 0
    assert "2 example(s) (1 of text, 1 of prompt and completion)" in out
    assert "sample" not in out


def test_every_fault_is_named_and_the_end_is_bad(tmp_path: Path, model: Path, check: Run) -> None:
    values = [*CHATS[:2], {"txt": 1}, {"messages": [{"role": "user", "content": "no answer"}]}, 7]
    file = write(tmp_path, values)
    code, out, err = check(str(file), "--model", str(model), "--loss-on", "answers")
    assert code == 2
    assert f"{file}, line 3: key 'text' is missing" in out
    assert f"{file}, line 4: no message is the assistant's" in out
    assert f"{file}, line 5: saw int" in out
    assert err.strip().endswith(
        "3 example(s) cannot be trained on. Fix: mend the lines named above and check again."
    )
    assert len(err.strip().splitlines()) == 1


def test_a_file_in_which_every_line_is_bad_says_so_line_by_line(tmp_path: Path, check: Run) -> None:
    file = write(tmp_path, [{"txt": "a"}, 3])
    code, out, err = check(str(file))
    assert code == 2
    assert f"{file}, line 1: key 'text' is missing" in out
    assert "line 2: saw int" in out
    assert "2 example(s) cannot be trained on" in err


def test_faults_of_one_kind_are_one_line(tmp_path: Path, check: Run) -> None:
    code, out, err = check(str(write(tmp_path, [{"text": "a"}, *({"n": n} for n in range(50))])))
    assert code == 2
    assert out.count("is missing") == 1
    assert "line 2: key 'text' is missing" in out
    assert "49 more alike: 3, 4, 5, 6, 7, ..." in out.replace("\n", " ")
    assert "50 example(s)" in err


def test_faults_of_several_files_are_named_with_their_file(tmp_path: Path, check: Run) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "some" / "b.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"n": 1}\n')
    _, out, _ = check(str(tmp_path / "some"))
    assert f"1 more alike: 3 of {tmp_path}/some/b.jsonl" in " ".join(out.split())


def test_kinds_of_faults_that_are_too_many_are_counted(tmp_path: Path, check: Run) -> None:
    values = [{"n" + "x" * n: 1} for n in range(30)]
    _, out, _ = check(str(write(tmp_path, [{"text": "a"}, *values])))
    assert out.count("is missing") == 20
    assert "... and 10 of other kinds" in out


# -- a run's data ----------------------------------------------------------------------------------------------


def run_file(folder: Path, data: dict[str, Any], **keys: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(json.dumps({"model": "model", "pool": "pool.yaml", "data": data, **keys}))
    return path


def test_a_run_validates_with_a_share_or_a_file(tmp_path: Path, model: Path) -> None:
    train, held = write(tmp_path, CHATS), write(tmp_path, CHATS[:3], "held.jsonl")
    base: dict[str, Any] = {
        "train": str(train),
        "sequence_length": 200,
        "packing": False,
        "loss_on": "answers",
    }
    run = load_run(run_file(tmp_path, {**base, "validation_split": 0.2}, evaluate_every=1))
    data = load_data(run, model)
    assert data.validation is not None
    assert (data.train.num_rows, data.validation.num_rows) == (16, 4)
    run = load_run(run_file(tmp_path, {**base, "validation": str(held)}, evaluate_every=1))
    data = load_data(run, model)
    assert data.validation is not None
    assert (data.train.num_rows, data.validation.num_rows) == (20, 3)
    assert data.notes() == ()
    cut = load_data(load_run(run_file(tmp_path, {**base, "sequence_length": 60})), model)
    assert cut.validation is None
    (note,) = cut.notes()
    assert "training example(s) are longer than 60 tokens and were cut" in note


@pytest.mark.parametrize(
    ("data", "keys", "words"),
    [
        ({"validation": "a.txt", "validation_split": 0.1}, {"evaluate_every": 1}, "not both"),
        ({"validation_split": 0.1}, {}, "evaluate_every is missing"),
        ({}, {"evaluate_every": 5}, "validation_split. is missing"),
        ({"validation_split": 1.5}, {"evaluate_every": 5}, "less than 1"),
        ({"loss_on": "some"}, {}, "'all' or 'answers'"),
    ],
)
def test_a_bad_data_section_is_refused(
    tmp_path: Path, data: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_run(run_file(tmp_path, {"train": "x.txt", **data}, **keys))


def test_an_empty_split_names_the_file(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path, CHATS[:1])
    run = load_run(run_file(tmp_path, {"train": str(file), "validation_split": 0.5}, evaluate_every=1))
    with pytest.raises(DataError, match=rf"{file}: 1 example\(s\) cannot be split"):
        load_data(run, model)
