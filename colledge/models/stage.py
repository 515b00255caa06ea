"""A stage: the library's own causal model, other stages' modules taken out, run by the library's own forward.

    boundary i is what block i is called with; the last one, what the last block gives

    stage of       embedding   block 0    block 1   block 2   block 3     norm    head
    blocks 1, 2    nothing     passes on  in ─▶     ─▶ ─▶     ─▶ out      never called

What the library does between embedding and blocks (scaling, positions, norms) counts in the first stage only,
whatever it is; what it makes for all blocks (masks, rotary positions) it makes in every stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from colledge.models.layered import BatchRows, StageModule
from colledge.models.lora import RowDropout
from colledge.models.precision import WideProducts
from colledge.models.structure import Structure, hidden_states, with_hidden_states


class _Nothing(nn.Module):
    """Stands in for another stage's module beside the blocks: gives hidden states back, of all else zero."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        passed = (x for x in given if x.is_floating_point() and x.dim() == 3)
        return next(passed, torch.zeros((), device=given[0].device if given else None))


class OtherBlock(nn.Module):
    """Stands in for another stage's block, whose settings the library may ask for; passes hidden states on."""

    def __init__(self, block: nn.Module, num_outputs: int | None) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(block).items() if name not in vars(self)})
        self._num_outputs, self._kind = num_outputs, type(block)

    def __getattr__(self, name: str) -> Any:
        """Return what the block's class says of it."""
        found = getattr(vars(self).get("_kind"), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        if found is None or callable(found):
            return super().__getattr__(name)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Return the hidden states, as the block would."""
        x = hidden_states(args, kwargs)
        return x if self._num_outputs is None else (x, *(None for _ in range(self._num_outputs - 1)))


class _End(Exception):
    """The library's forward has come to the end of the stage, with these hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Stage(StageModule):
    """A trimmed causal model: `forward(x, context)` as the engine calls it.

    Args:
        causal_lm: The whole model, on the meta device; trimmed in place, what stays keeps its name.
        structure: Where its layers are.
        layers: The half-open range of layers.
        dtype: Of activations.
        mixed: Whether products are computed in bfloat16 (torch.autocast).
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        structure: Structure,
        layers: tuple[int, int],
        dtype: torch.dtype,
        mixed: bool,
    ) -> None:
        super().__init__()
        self._dtype, self._mixed = dtype, mixed
        self.causal_lm = causal_lm
        self._first, self._last = layers[0] == 0, layers[1] == structure.num_layers
        self._x: Tensor | None = None
        blocks = causal_lm.get_submodule(structure.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks, self._stop = [blocks], layers[1]  # in a list: no module of this one's own
        kept = structure.blocks_of(layers)
        for index, block in enumerate(blocks):
            if index not in kept:
                blocks[index] = OtherBlock(block, structure.num_outputs)
        gone = (
            (() if self._first else structure.before)
            + (() if self._last else structure.after)
            + structure.idle
        )
        for path in gone:
            causal_lm.set_submodule(path, _Nothing())
        _keep_dtype(causal_lm, structure.blocks, dtype)
        if not self._first and kept.start < structure.num_blocks:
            blocks[kept.start].register_forward_pre_hook(self._enter_block, with_kwargs=True)
        elif not self._first:
            blocks[-1].register_forward_hook(self._enter_head)
        if not self._last:
            self._leave_before(layers[1])

        self._dropouts = [m for m in causal_lm.modules() if isinstance(m, RowDropout)]

    def next_rows(self, rows: BatchRows | None) -> None:
        """Say which rows of the batch the next forwards compute; None is evaluation."""
        for dropout in self._dropouts:
            dropout.rows = rows

    def _leave_before(self, layer_index: int) -> RemovableHandle:
        """Have forwards end before a block or the head."""
        (blocks,) = self._blocks
        if layer_index <= len(blocks):
            return blocks[layer_index - 1].register_forward_pre_hook(self._leave_at_block, with_kwargs=True)
        return blocks[-1].register_forward_hook(self._leave_at_head)

    def forward(self, x: Tensor, context: Mapping[str, Tensor], until: int | None = None) -> Tensor:
        """Return the logits, or the hidden states at the stage's end or before `until`, (rows, sequence, width)."""
        self._x = x
        leaving = self._leave_before(until) if until is not None and until < self._stop else None
        inputs = (
            {"input_ids": x} if self._first else {"inputs_embeds": x.new_zeros(*x.shape[:2], x.shape[-1])}
        )
        mixed = torch.autocast(x.device.type, torch.bfloat16, enabled=self._mixed)
        try:
            with WideProducts(self._dtype), mixed:
                logits: Tensor = self.causal_lm(**inputs, **context, use_cache=False).logits
        except _End as end:
            return end.hidden.to(self._dtype)
        finally:
            self._x = None
            if leaving is not None:
                leaving.remove()
        return logits

    def _enter_block(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._x is not None
        return with_hidden_states(self._x, args, kwargs)

    def _enter_head(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return self._x if isinstance(output, Tensor) else (self._x, *output[1:])

    def _leave_at_block(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _End(hidden_states(args, kwargs))

    def _leave_at_head(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        raise _End(output if isinstance(output, Tensor) else output[0])


def _keep_dtype(causal_lm: nn.Module, blocks: str, dtype: torch.dtype) -> None:
    """Give the modules around the blocks an empty parameter where they have none: the library asks for its type."""
    names = blocks.split(".")
    for depth in range(1, len(names)):
        module = causal_lm.get_submodule(".".join(names[:depth]))
        if next(module.parameters(), None) is None:
            nothing = torch.empty(0, dtype=dtype, device="meta")
            module.register_parameter("nothing", nn.Parameter(nothing, requires_grad=False))
