"""Losses by name: a name crosses the wire, code never does.

A loss is a sum over targets; the engine divides it by the number of targets in the whole batch, so that padding
and unequal shares of rows do not bias it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class Loss(Protocol):
    """A sum over the targets of some rows, and how many targets there are."""

    def count(self, targets: Mapping[str, Tensor]) -> int:
        """Return the number of targets in these rows."""

    def total(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the loss summed over the targets, a scalar of at least float32."""


class CausalLanguageModel:
    """Cross entropy of each next token. `targets["labels"]`: (rows, sequence), -100 where nothing is learnt."""

    def count(self, targets: Mapping[str, Tensor]) -> int:
        """Return the number of next tokens that are learnt."""
        return int((targets["labels"][:, 1:] != IGNORED).sum())

    def total(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the summed cross entropy of logits (rows, sequence, vocabulary)."""
        if output.dtype in (torch.bfloat16, torch.float16):
            output = output.float()
        labels = F.pad(targets["labels"][:, 1:], (0, 1), value=IGNORED)
        return F.cross_entropy(
            output.reshape(-1, output.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
        )


class CrossEntropy:
    """Cross entropy of one class a row. `targets["labels"]`: (rows,)."""

    def count(self, targets: Mapping[str, Tensor]) -> int:
        """Return the number of rows that are learnt."""
        return int((targets["labels"] != IGNORED).sum())

    def total(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the summed cross entropy of logits (rows, classes)."""
        return F.cross_entropy(output, targets["labels"], ignore_index=IGNORED, reduction="sum")


LOSSES: dict[str, Loss] = {"causal_lm": CausalLanguageModel(), "cross_entropy": CrossEntropy()}
