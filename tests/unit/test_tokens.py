"""Tokens of real tokenizers: long documents as if whole, tokenizers in Python, files of newer versions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from colledge.data import Example, load_tokenizer, read_examples, tokenize
from colledge.data.text.reading.examples import iterate_examples
from colledge.data.text.rows import joined
from colledge.errors import DataError, ModelError

WORDS = ["kettle", "moss", "lantern", "gravel", "tide", "walnut", "über", "潮", "🌿", "don't", "x1y2", "..."]


def bpe(kind: str) -> PreTrainedTokenizerFast:
    """A small BPE as GPT-2's, as a Llama 2's (a prefix before every text, no splitting) or without any splitting."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "llama"))
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    if kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    generator = random.Random(0)
    backend.train_from_iterator((text(generator, 40) for _ in range(200)), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text(generator: random.Random, length: int, line_every: int = 9) -> str:
    words = generator.choices(WORDS, k=length)
    return "".join(word + ("\n" if generator.randrange(line_every) == 0 else " ") for word in words)


@pytest.mark.parametrize("lines", ["lines", "no lines", "no spaces"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "metaspace"])
def test_long_documents_have_the_tokens_of_the_whole(kind: str, lines: str) -> None:
    tokenizer, generator = bpe(kind), random.Random(1)
    document = text(generator, 40_000, 9 if lines == "lines" else 10**9)
    document = document.replace(" ", "") if lines == "no spaces" else document
    assert len(document) > 2 * (1 << 16)
    if kind == "llama" and lines != "lines":
        document = document[: 3 << 16]
    one = joined(tokenize([Example("here", "text", (("text", document),))], tokenizer))
    whole = tokenizer(document, verbose=False)["input_ids"]
    assert one.ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert whole[0] == tokenizer.bos_token_id
    example = Example(
        "here", "completion", (("prompt", document[:100_000]), ("completion", document[100_000:]))
    )
    asked = joined(tokenize([example], tokenizer, "answers"))
    assert asked.ids.tolist() == one.ids.tolist()
    assert asked.ends.tolist() == [len(asked.ids)]
    assert asked.learnt is not None
    first = int(np.flatnonzero(asked.learnt)[0])
    spoken = tokenizer(document, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    assert spoken[first][0] <= 100_000 < spoken[first][1]


def test_a_tokenizer_in_python_learns_answers_too() -> None:
    tokenizer: Any = ByT5Tokenizer()
    example = Example("here", "completion", (("prompt", "2 + 2 = "), ("completion", "four")))
    (one,) = tokenize([example], tokenizer, "answers")
    assert one.learnt is not None
    assert tokenizer.decode(one.ids[~one.learnt].tolist()) == "2 + 2 = "
    assert tokenizer.decode(one.ids[one.learnt].tolist()) == "four</s>"
    (one,) = tokenize(
        [Example("here", "completion", (("prompt", "潮ü"), ("completion", " é🌿")))], tokenizer, "answers"
    )
    assert one.learnt is not None
    assert tokenizer.decode(one.ids[one.learnt].tolist()) == " é🌿</s>"
    tokenizer.decode = lambda ids: "?"
    with pytest.raises(ModelError, match="cannot say where in a text its tokens stand"):
        list(tokenize([example], tokenizer, "answers"))


@pytest.mark.parametrize("part_bytes", [1 << 12, 4097, 1 << 20])
def test_a_long_file_is_read_in_parts_and_learnt_as_one_document(
    part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, document = bpe("gpt2"), "\ufeff" + text(random.Random(2), 30_000)
    path = tmp_path / "book.txt"
    path.write_text(document, encoding="utf-8")
    monkeypatch.setattr("colledge.data.text.reading.parts._PART_BYTES", part_bytes)
    document = document.removeprefix("\ufeff")
    assert [one.parts[0][1] for one in read_examples(path)] == [document]
    examples = list(iterate_examples([path, path]))
    assert max(len(one.parts[0][1].encode()) for one in examples) <= part_bytes + 3
    stream = joined(tokenize(examples, tokenizer))
    whole = [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
    assert stream.ids.tolist() == [*whole, *whole]
    assert stream.ends.tolist() == [len(whole), 2 * len(whole)]
    with path.open("ab") as file:
        file.write(b"\ncaf\xe9 au lait\n")
    with pytest.raises(DataError, match=f"line {document.count(chr(10)) + 2}: byte 0xe9"):
        read_examples(path)


@pytest.mark.parametrize("change", [{"version": "2.0"}, {"pre_tokenizer": {"type": "Newer", "size": 3}}])
def test_a_tokenizer_of_a_newer_version_says_so(change: dict[str, Any], tmp_path: Path) -> None:
    bpe("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ModelError, match=r"no usable tokenizer there .* newer version: update tokenizers"):
        load_tokenizer(tmp_path)
