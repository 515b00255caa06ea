"""`colledge data check`: what is in a data file, before any device starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from colledge.data import Tokenizer, Tokens, count_kinds, read_examples, tokenize
from colledge.data.text.examples import Kind
from colledge.errors import DataError
from colledge.settings import LossOn

_MOST_FAULTS_SHOWN = 20
_MOST_BINS, _BAR = 12, 40
_MOST_SAMPLE_TOKENS = 256
_KINDS: dict[Kind, str] = {"text": "text", "completion": "prompt and completion", "chat": "messages"}


def check_file(
    path: Path, tokenizer: Tokenizer | None, loss_on: LossOn, sequence_length: int, console: Console
) -> None:
    """Print counts, faults and, with a tokenizer, lengths and three samples with what the loss counts.

    Raises:
        DataError: There are faults, or nothing to train on; they have been printed.
    """
    faults: list[DataError] = []
    try:
        examples = read_examples(path, faults.append)
    except DataError as empty:  # of the whole file; where all its lines are bad, those say more
        if not faults:
            raise
        examples = []
        console.print(Text(str(empty), style="red"))
    tokens = list(tokenize(examples, tokenizer, loss_on, faults.append)) if tokenizer is not None else []
    counts = count_kinds(examples)
    kinds = ", ".join(f"{counts[kind]:,} of {name}" for kind, name in _KINDS.items() if counts[kind])
    console.print(Text(f"{path}: {len(examples):,} example(s) ({kinds or 'nothing that can be read'})"))
    if tokenizer is not None and tokens:
        _print_lengths(tokens, loss_on, sequence_length, console)
        _print_samples(tokens, tokenizer, console)
    for fault in faults[:_MOST_FAULTS_SHOWN]:
        console.print(Text(str(fault), style="red"))
    if len(faults) > _MOST_FAULTS_SHOWN:
        console.print(Text(f"... and {len(faults) - _MOST_FAULTS_SHOWN:,} more", style="red"))
    if faults:
        raise DataError(
            f"{path}: {len(faults)} example(s) cannot be trained on.",
            fix=f"mend the lines named above{' and check again' if len(faults) > _MOST_FAULTS_SHOWN else ''}.",
        )


def _print_lengths(tokens: Sequence[Tokens], loss_on: LossOn, sequence_length: int, console: Console) -> None:
    lengths = np.array([len(one.ids) for one in tokens])
    total, learnt = int(lengths.sum()), sum(one.num_learnt for one in tokens)
    console.print(
        f"{total:,} tokens, of which the loss counts {learnt:,} (loss_on: {loss_on})", highlight=False
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


def _print_samples(tokens: Sequence[Tokens], tokenizer: Tokenizer, console: Console) -> None:
    """Print the first, the middle and the last example, decoded; what the loss counts stands in ⟦ ⟧."""
    for one in (tokens[at] for at in sorted({0, len(tokens) // 2, len(tokens) - 1}) if len(tokens[at].ids)):
        shown = Text(f"sample ({one.where}, {len(one.ids)} tokens; the loss counts ⟦this⟧)\n", style="bold")
        ids = one.ids[:_MOST_SAMPLE_TOKENS]
        learnt = np.ones(len(ids), dtype=bool) if one.learnt is None else one.learnt[: len(ids)]
        edges = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(ids)]
        for start, stop in pairwise(edges):
            text = tokenizer.decode(ids[start:stop].tolist())
            shown.append(f"⟦{text}⟧" if learnt[start] else text, style="green" if learnt[start] else "dim")
        if len(ids) < len(one.ids):
            shown.append(" ...")
        console.print(shown)
