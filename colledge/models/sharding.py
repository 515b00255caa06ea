"""Tensor parallelism of one block: which linears are cut, along which dimension, and into which parts.

Column-parallel linears (query, key, value, gate, up) are cut along their outputs, row-parallel ones (output,
down) along their inputs; f before and g after each pair make the result whole (Megatron-LM: Shoeybi et al.,
arXiv 1909.08053). Cuts fall on KV groups in attention and on the nearest column in the MLP, so shards may be
unequal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShardOps(Protocol):
    """The two operators around a sharded region (Megatron-LM's f and g: Shoeybi et al., arXiv 1909.08053)."""

    def enter(self, x: Tensor) -> Tensor:
        """Return x; in the backward pass, sum the gradient over the shards (f)."""

    def leave(self, x: Tensor) -> Tensor:
        """Return x summed over the shards; in the backward pass, the identity (g)."""

    def sum_in_place(self, x: Tensor) -> Tensor:
        """Return x summed over the shards, written to x itself; no gradient."""

    def max_in_place(self, x: Tensor) -> Tensor:
        """Return the largest of every element over the shards, written to x itself; no gradient."""


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that a shard holds: some ranges along one dimension, one after another."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def take(self, whole: Tensor) -> Tensor:
        """Return the part, a new contiguous tensor."""
        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.ranges], self.dim)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the part to its place in the whole tensor."""
        offset = 0
        for a, b in self.ranges:
            whole.narrow(self.dim, a, b - a).copy_(part.narrow(self.dim, offset, b - a))
            offset += b - a


def unit_range(size: int, units: tuple[int, int], num_units: int) -> tuple[int, int]:
    """Return the columns of `size` that fall to the shard units [a, b) of `num_units`: the nearest ones."""
    a, b = units
    return (round(size * a / num_units), round(size * b / num_units))


@dataclass(frozen=True)
class ShardedLinear:
    """How one linear of a block is cut. `parts` counts projections fused side by side in its outputs."""

    path: str
    column: bool
    parts: int = 1
    transposed: bool = False  # weight stored as (inputs, outputs), as GPT-2's Conv1D does

    def slice(
        self, parameter: str, shape: tuple[int, ...], units: tuple[int, int], num_units: int
    ) -> Slice | None:
        """Return the slice of one of the linear's parameters; None for what every shard holds whole.

        Args:
            parameter: "weight", "bias", "lora_A.weight" (rank, inputs) or "lora_B.weight" (outputs, rank).
            shape: The whole parameter's shape.
            units: The shard's half-open range of units.
            num_units: The units in all.
        """
        if parameter not in ("weight", "bias", self._cut_factor) or (parameter == "bias" and not self.column):
            return None
        if parameter == self._cut_factor:
            return replace(self, transposed=False).slice("weight", shape, units, num_units)
        dim = 0 if parameter == "bias" else (int(self.column) if self.transposed else 1 - int(self.column))
        part = shape[dim] // self.parts
        a, b = unit_range(part, units, num_units)
        return Slice(dim, tuple((p * part + a, p * part + b) for p in range(self.parts)))

    @property
    def _cut_factor(self) -> str:
        """The factor of an adapter that is cut with the linear: that on the side that is cut."""
        return "lora_B.weight" if self.column else "lora_A.weight"

    def is_partial(self, parameter: str) -> bool:
        """Return whether shards hold this whole and each computes a part of its gradient: an adapter's other factor."""
        return parameter in ("lora_A.weight", "lora_B.weight") and parameter != self._cut_factor


@dataclass(frozen=True)
class ShardedBlock:
    """The regions of a block between f and g, and the linears in them that are cut."""

    regions: tuple[str, ...]
    linears: tuple[ShardedLinear, ...]


_SEPARATE_GATED = ShardedBlock(
    regions=("self_attn", "mlp"),
    linears=(
        ShardedLinear("self_attn.q_proj", column=True),
        ShardedLinear("self_attn.k_proj", column=True),
        ShardedLinear("self_attn.v_proj", column=True),
        ShardedLinear("self_attn.o_proj", column=False),
        ShardedLinear("mlp.gate_proj", column=True),
        ShardedLinear("mlp.up_proj", column=True),
        ShardedLinear("mlp.down_proj", column=False),
    ),
)
_FUSED_PLAIN = ShardedBlock(
    regions=("attn", "mlp"),
    linears=(
        ShardedLinear("attn.c_attn", column=True, parts=3, transposed=True),
        ShardedLinear("attn.c_proj", column=False, transposed=True),
        ShardedLinear("mlp.c_fc", column=True, transposed=True),
        ShardedLinear("mlp.c_proj", column=False, transposed=True),
    ),
)


def find_sharding(block: nn.Module) -> ShardedBlock | None:
    """Return how a decoder block is cut, found from its modules; None where the structure is not known.

    Known: separate query, key, value with a gated MLP (Llama, Qwen2), and fused Conv1D projections with a
    plain MLP (GPT-2). A region with parameters other than those linears' is not cut.
    """
    for sharding in (_SEPARATE_GATED, _FUSED_PLAIN):
        expected = {f"{linear.path}.{name}" for linear in sharding.linears for name in ("weight", "bias")}
        found = {name for name, _ in block.named_parameters() if name.startswith(tuple(sharding.regions))}
        weights = {f"{linear.path}.weight" for linear in sharding.linears}
        if weights <= found <= expected:
            return sharding
    return None


class _ParallelLinear(nn.Module):
    """A linear of which this shard holds a part; of a row-parallel one a hook makes the sum and adds the bias once."""

    def __init__(self, linear: ShardedLinear, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self._linear.transposed else self.weight
        return F.linear(x, weight, self.bias if self._linear.column else None)


def shard_block(
    block: nn.Module, sharding: ShardedBlock, units: tuple[int, int], num_units: int, ops: ShardOps
) -> None:
    """Cut a block on the meta device in place: this shard's part of every linear, f and g around each region.

    Args:
        block: A whole decoder block whose parameters have no values yet.
        sharding: How it is cut.
        units: The shard's half-open range of units.
        num_units: The units in all.
        ops: f (`enter`) and g (`leave`).
    """
    for linear in sharding.linears:
        cut = _cut_linear(block, linear, units, num_units, ops)
        parent = block.get_submodule(linear.path.rpartition(".")[0])
        if linear.parts > 1:  # the attention splits the fused output into equal projections by this size
            size = cut.weight.shape[1 if linear.transposed else 0] // linear.parts
            object.__setattr__(parent, "split_size", size)
    for region in sharding.regions:
        block.get_submodule(region).register_forward_pre_hook(_enter(ops), with_kwargs=True)


def shard_head(
    model: nn.Module, linear: ShardedLinear, units: tuple[int, int], num_units: int, ops: ShardOps
) -> None:
    """Cut a model's head in place: this shard's columns of the vocabulary, f before them."""
    _cut_linear(model, linear, units, num_units, ops).register_forward_pre_hook(_enter(ops), with_kwargs=True)


def _cut_linear(
    module: nn.Module, linear: ShardedLinear, units: tuple[int, int], num_units: int, ops: ShardOps
) -> _ParallelLinear:
    outer = module.get_submodule(linear.path)
    whole = getattr(outer, "base_layer", outer)  # where an adapter stands beside it
    parts: dict[str, nn.Parameter | None] = {}
    for name in ("weight", "bias"):
        parameter = getattr(whole, name, None)
        if parameter is not None:
            part = linear.slice(name, tuple(parameter.shape), units, num_units)
            tensor = parameter.detach() if part is None else part.take(parameter.detach())
            parameter = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        parts[name] = parameter
    assert parts["weight"] is not None
    cut = _ParallelLinear(linear, parts["weight"], parts["bias"])
    if outer is whole:
        parent, _, name = linear.path.rpartition(".")
        setattr(module.get_submodule(parent), name, cut)
        outer = cut
    else:
        outer.base_layer = cut
    if not linear.column:
        outer.register_forward_hook(_leave(ops, cut))
    return cut


class _EnterHook(Protocol):
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]: ...


class _LeaveHook(Protocol):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor: ...


def _leave(ops: ShardOps, linear: _ParallelLinear) -> _LeaveHook:
    """Return a hook that passes a row-parallel linear's output, its adapter's part included, through g."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        y = ops.leave(output)
        return y if linear.bias is None else y + linear.bias

    return hook


def _enter(ops: ShardOps) -> _EnterHook:
    """Return a hook that passes a region's hidden states through f, positional or by keyword."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (ops.enter(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": ops.enter(kwargs["hidden_states"])}

    return hook
