"""`colledge data check`: what is in a data file, before any device starts."""

from __future__ import annotations

import re
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from colledge.data import Example, Tokenizer, Tokens, tokenize
from colledge.data.text.reading.examples import Kind, Noticed, iterate_examples
from colledge.data.text.reading.files import find_files
from colledge.errors import DataError
from colledge.settings import LossOn

_MOST_KINDS, _MOST_PLACES = 20, 6  # of faults that are shown, and of places of each
_PLACE = re.compile(r"(?<=line )\d+|(?<=entry )\d+|(?<=row )\d+")
_NUMBER = re.compile(r"\d+")
_MOST_BINS, _BAR = 12, 40
_MOST_SAMPLE_TOKENS = 256
_KINDS: dict[Kind, str] = {"text": "text", "completion": "prompt and completion", "chat": "messages"}


def check_file(
    path: Path, tokenizer: Tokenizer | None, loss_on: LossOn, sequence_length: int, console: Console
) -> None:
    """Print counts, faults and, with a tokenizer, lengths and three samples with what the loss counts.

    Args:
        path: A file, a folder or a pattern.
        tokenizer: Of the model; None looks at the examples alone.
        loss_on: What the loss counts.
        sequence_length: Tokens a row, for what is longer.
        console: Where it is printed.

    Raises:
        DataError: There are faults, or nothing to train on; they have been printed.
    """
    faults, noticed, counts = Faults(), Noticed(), Counter[Kind]()
    found = find_files([path])
    examples = _counted(iterate_examples(found.files, faults.add, noticed), counts)
    lengths = _Lengths()
    if tokenizer is None:
        deque(examples, maxlen=0)
    else:
        for tokens in tokenize(examples, tokenizer, loss_on, faults.add, noticed):
            lengths.add(tokens)
    kinds = ", ".join(f"{counts[kind]:,} of {name}" for kind, name in _KINDS.items() if counts[kind])
    console.print(Text(f"{path}: {counts.total():,} example(s) ({kinds or 'nothing that can be read'})"))
    for sentence in (*found.left_out, *noticed.sentences()):
        console.print(Text(sentence))
    if tokenizer is not None and lengths.samples:
        _print_lengths(lengths, loss_on, sequence_length, console)
        _print_samples(lengths.samples, tokenizer, console)
    for line in faults.lines():
        console.print(Text(line, style="red"))
    if faults.count:
        raise DataError(
            f"{path}: {faults.count:,} example(s) cannot be trained on.",
            fix="mend the lines named above and check again.",
        )
    if not counts.total():
        raise DataError(f"{path}: holds no text.", fix="give a file with at least one row of text.")


class Faults:
    """Faults of a file's examples; those of one kind are one line, however many they are."""

    def __init__(self) -> None:
        self.count = 0
        self._first: dict[str, DataError] = {}
        self._where: dict[str, list[str]] = {}

    def add(self, fault: DataError) -> None:
        """Take a fault."""
        self.count += 1
        where, _, what = fault.message.partition(": ")
        what = _NUMBER.sub("", what)
        if what not in self._first and len(self._first) >= _MOST_KINDS:
            return
        self._first.setdefault(what, fault)
        places = self._where.setdefault(what, [])
        named = _PLACE.search(where)
        place = named.group() if named and len(places) < _MOST_PLACES else ""
        file, first = (
            said.rpartition(", ")[0] for said in (where, self._first[what].message.partition(": ")[0])
        )
        places.append(f"{place} of {file}" if place and file != first else place)

    def lines(self) -> Iterator[str]:
        """Yield a line for each kind: its first fault, and where the others are."""
        shown = 0
        for what, fault in self._first.items():
            places = self._where[what]
            shown += len(places)
            others = [place for place in places[1:] if place]
            more = f" ({len(places) - 1:,} more alike: {', '.join(others)}" if others else ""
            yield f"{fault}{more}{', ...' if len(others) < len(places) - 1 else ''}{')' if more else ''}"
        if shown < self.count:
            yield f"... and {self.count - shown:,} of other kinds"


class _Lengths:
    """How long examples are, and three of them: the first, the last, and one in between."""

    def __init__(self) -> None:
        self.all = array("q")
        self.learnt = 0
        self._first: Tokens | None = None
        self._between: Tokens | None = None
        self._last: Tokens | None = None
        self._begun = 0  # tokens of an example that goes on

    def add(self, tokens: Tokens) -> None:
        self.learnt += tokens.num_learnt
        if not self._begun:
            count = len(self.all)
            if self._first is None:
                self._first = tokens
            elif count & (count - 1) == 0:  # 1, 2, 4, 8 ...: never long ago
                self._between = tokens
            self._last = tokens
        self._begun += len(tokens.ids)
        if not tokens.goes_on:
            self.all.append(self._begun)
            self._begun = 0

    @property
    def samples(self) -> list[Tokens]:
        found = (self._first, self._between, self._last)
        return list({one.where: one for one in found if one is not None}.values())


def _counted(examples: Iterable[Example], counts: Counter[Kind]) -> Iterator[Example]:
    for example in examples:
        counts[example.kind] += not example.goes_on
        yield example


def _print_lengths(found: _Lengths, loss_on: LossOn, sequence_length: int, console: Console) -> None:
    lengths = np.array(found.all)
    console.print(
        f"{int(lengths.sum()):,} tokens, of which the loss counts {found.learnt:,} (loss_on: {loss_on})",
        highlight=False,
    )
    over = int((lengths > sequence_length).sum())
    console.print(
        f"{over:,} example(s) are longer than {sequence_length} tokens: without packing they are cut",
        highlight=False,
    )
    width = max(1, -(-int(lengths.max() + 1) // _MOST_BINS))
    bins = np.bincount(lengths // width)
    console.print("tokens an example")
    for number, count in enumerate(bins):
        bar = "█" * -(-int(count) * _BAR // int(bins.max()))
        console.print(f"{number * width:>8}-{(number + 1) * width - 1:<8} {bar} {count:,}", highlight=False)


def _print_samples(samples: Sequence[Tokens], tokenizer: Tokenizer, console: Console) -> None:
    """Print some examples, decoded; what the loss counts stands in ⟦ ⟧."""
    for one in (tokens for tokens in samples if len(tokens.ids)):
        more = " and more" if one.goes_on else ""
        title = f"sample ({one.where}, {len(one.ids)} tokens{more}; the loss counts ⟦this⟧)\n"
        shown = Text(title, style="bold")
        ids = one.ids[:_MOST_SAMPLE_TOKENS]
        learnt = np.ones(len(ids), dtype=bool) if one.learnt is None else one.learnt[: len(ids)]
        edges = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(ids)]
        for start, stop in pairwise(edges):
            text = tokenizer.decode(ids[start:stop].tolist())
            shown.append(f"⟦{text}⟧" if learnt[start] else text, style="green" if learnt[start] else "dim")
        if len(ids) < len(one.ids) or one.goes_on:
            shown.append(" ...")
        console.print(shown)
