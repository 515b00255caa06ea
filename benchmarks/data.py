"""How long text takes to become tokens, and how much memory: the first time and when its tokens lie on the disk.

    python benchmarks/data.py [--megabytes N] [--shape NAME] [--folder DIR] [--json]

Makes text of that size in every shape, and a tokenizer. Each pass is a process of its own, which opens the tokens, cuts
them into rows of 512 and reads every row once, in a random order. What it adds is its largest resident size, less what
it had before it opened them. The tokens are removed before a first pass.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

from colledge.data import end_of, load_tokenizer, rows_of, stored_tokens
from colledge.settings import LossOn

SEQUENCE, BATCH_ROWS, VOCABULARY = 512, 64, 8000
BLOCK_BYTES = 8_000_000  # text is made once, and repeated from there
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% endfor %}"
)


# -- what is read ------------------------------------------------------------------------------------------------


def make_words() -> list[str]:
    """Return made words, the frequent ones often."""
    chance = random.Random(0)
    parts = [a + b for a in "bcdfghklmnprstvwz" for b in "aeiou"]
    words = ["".join(chance.choices(parts, k=chance.randint(1, 4))) for _ in range(20_000)]
    return chance.choices(words, [1 / (rank + 3) for rank in range(len(words))], k=BLOCK_BYTES // 6)


def documents(num_bytes: int) -> Iterator[str]:
    """Yield documents of about 150 words, until they are so many bytes."""
    words, made, at = make_words(), 0, 0
    while made < num_bytes:
        text = f"{made}. " + " ".join(words[at : at + 150]) + ".\n"
        made, at = made + len(text), (at + 150) % (len(words) - 150)
        yield text


def write_jsonl(path: Path, num_bytes: int) -> None:
    """Write a document a line."""
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents(num_bytes))


def write_chats(path: Path, num_bytes: int) -> None:
    """Write a chat a line."""
    with path.open("w") as file:
        for text in documents(num_bytes):
            question, answer = text[: len(text) // 3], text[len(text) // 3 :]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_json(path: Path, num_bytes: int) -> None:
    """Write a list of documents."""
    with path.open("w") as file:
        file.write("[")
        for number, text in enumerate(documents(num_bytes)):
            file.write((",\n" if number else "") + json.dumps({"text": text}))
        file.write("]\n")


def write_txt(path: Path, num_bytes: int) -> None:
    """Write one long document."""
    with path.open("w") as file:
        file.writelines(documents(num_bytes))


def write_parquet(path: Path, num_bytes: int) -> None:
    """Write a document a row."""
    import pyarrow
    from pyarrow import parquet

    texts, schema = documents(num_bytes), pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        while some := [text for _, text in zip(range(20_000), texts, strict=False)]:
            writer.write_table(pyarrow.table({"text": some}, schema))


SHAPES: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "documents": ("documents.jsonl", write_jsonl),
    "chats": ("chats.jsonl", write_chats),
    "list": ("list.json", write_json),
    "table": ("table.parquet", write_parquet),
    "text": ("text.txt", write_txt),
}


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE that has seen a part of the text."""
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        documents(1_000_000), vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


# -- passes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What one process measured."""

    open_s: float
    read_s: float
    added_bytes: int
    num_tokens: int


def run_pass(path: Path, folder: Path, cache: Path) -> Pass:
    """Open the tokens of a file, cut them into rows, and read every row once."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    tokenizer = load_tokenizer(folder)
    before, began_s = peak_bytes(), time.perf_counter()
    loss_on: LossOn = "answers" if path.name.startswith("chats") else "all"
    stream, _ = stored_tokens([path], folder, tokenizer, loss_on, lambda line: print(line, file=sys.stderr))
    rows = rows_of(stream, SEQUENCE, end_of(tokenizer), packing=True)
    opened_s = time.perf_counter()
    for indices in torch.randperm(rows.num_rows).split(BATCH_ROWS):
        rows.batch(indices)
    read_s = time.perf_counter() - opened_s
    return Pass(opened_s - began_s, read_s, peak_bytes() - before, rows.num_tokens)


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(path: Path, folder: Path) -> tuple[Pass, Pass]:
    """Return a first pass over a file, and a second one."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    found = []
    for _ in range(2):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            found.append(processes.submit(run_pass, path, folder, cache).result())
    return found[0], found[1]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--folder", type=Path, help="where files are made, and found again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    print(
        "| shape | million tokens | first pass | added | second pass | added | an epoch of rows |\n|"
        + "---|" * 7
    )
    for shape in options.shape or SHAPES:
        name, write = SHAPES[shape]
        path = folder / f"{options.megabytes}" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write(path, options.megabytes * 1_000_000)
        first, second = measure(path, folder)
        if options.json:
            print(json.dumps({"shape": shape, "first": vars(first), "second": vars(second)}))
            continue
        cells = [f"`{name}`", f"{first.num_tokens / 1e6:.0f}"]
        for one in (first, second):
            cells += [f"{one.open_s:.1f} s", f"{one.added_bytes / 1e6:.0f} MB"]
        print("| " + " | ".join([*cells, f"{second.read_s:.1f} s"]) + " |", flush=True)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
