"""Losses by name: a name crosses the wire, code never does.

A loss is a sum over targets; the engine divides it by the number of targets in the whole batch, so that padding
and unequal shares of rows do not bias it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from colledge.models.sharding import ShardOps

IGNORED = -100


@dataclass(frozen=True)
class OutputShard:
    """The half-open columns of the model's output that this shard computes, and how it sums over the others."""

    columns: tuple[int, int]
    ops: ShardOps


class Loss(Protocol):
    """A sum over the targets of some rows, and how many targets there are."""

    def count(self, targets: Mapping[str, Tensor]) -> int:
        """Return the number of targets in these rows."""

    def total(
        self, output: Tensor, targets: Mapping[str, Tensor], shard: OutputShard | None = None
    ) -> Tensor:
        """Return the loss summed over the targets, a scalar of at least float32.

        Args:
            output: The model's output, or a shard's columns of it.
            targets: Rows first.
            shard: Which columns, where they are not all.
        """


class CausalLanguageModel:
    """Cross entropy of each next token. `targets["labels"]`: (rows, sequence), -100 where nothing is learnt."""

    def count(self, targets: Mapping[str, Tensor]) -> int:
        """Return the number of next tokens that are learnt."""
        return int((targets["labels"][:, 1:] != IGNORED).sum())

    def total(
        self, output: Tensor, targets: Mapping[str, Tensor], shard: OutputShard | None = None
    ) -> Tensor:
        """Return the summed cross entropy of logits (rows, sequence, vocabulary)."""
        labels = F.pad(targets["labels"][:, 1:], (0, 1), value=IGNORED)
        return _cross_entropy(output.reshape(-1, output.shape[-1]), labels.reshape(-1), shard)


class CrossEntropy:
    """Cross entropy of one class a row. `targets["labels"]`: (rows,)."""

    def count(self, targets: Mapping[str, Tensor]) -> int:
        """Return the number of rows that are learnt."""
        return int((targets["labels"] != IGNORED).sum())

    def total(
        self, output: Tensor, targets: Mapping[str, Tensor], shard: OutputShard | None = None
    ) -> Tensor:
        """Return the summed cross entropy of logits (rows, classes)."""
        return _cross_entropy(output, targets["labels"], shard)


LOSSES: dict[str, Loss] = {"causal_lm": CausalLanguageModel(), "cross_entropy": CrossEntropy()}


def _cross_entropy(logits: Tensor, labels: Tensor, shard: OutputShard | None) -> Tensor:
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if shard is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    result: Tensor = _ShardedCrossEntropy.apply(logits, labels, shard)  # type: ignore[no-untyped-call]
    return result


class _ShardedCrossEntropy(torch.autograd.Function):
    """Cross entropy of logits whose columns are spread over shards (Shoeybi et al., arXiv 1909.08053, section 3).

    Only one maximum, one sum of exponentials and one target logit a row travel, never the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: OutputShard) -> Tensor:
        start, stop = shard.columns
        valid = labels != IGNORED
        inside = valid & (labels >= start) & (labels < stop)
        column = torch.where(inside, labels - start, 0)[:, None]
        largest = shard.ops.max_in_place(logits.amax(-1))
        shifted = logits - largest[:, None]
        target = torch.where(inside, shifted.gather(-1, column)[:, 0], 0)
        exponentials = shifted.exp_()
        total, target = shard.ops.sum_in_place(torch.stack([exponentials.sum(-1), target]))
        ctx.save_for_backward(exponentials.div_(total[:, None]), column, inside, valid)
        loss: Tensor = ((total.log() - target) * valid).sum()
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        probabilities, column, inside, valid = ctx.saved_tensors
        gradient = probabilities * (valid * gradients[0])[:, None]
        return gradient.scatter_add_(1, column, -(inside * gradients[0])[:, None]), None, None
