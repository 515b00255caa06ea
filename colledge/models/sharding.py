"""Tensor parallelism of one block: which linears are cut, along which dimension, and into which parts.

Column-parallel linears (query, key, value, gate, up) are cut along their outputs, row-parallel ones (output,
down) along their inputs; f before and g after each pair make the result whole (Megatron-LM: Shoeybi et al.,
arXiv 1909.08053). Cuts fall on KV groups in attention and on the nearest column in the MLP, so shards may be
unequal.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from colledge.models.structure import hidden_states, with_hidden_states


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

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part of a tensor of that shape."""
        size = sum(b - a for a, b in self.ranges)
        return (*whole[: self.dim], size, *whole[self.dim + 1 :])

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
    """How one linear of a block is cut.

    Attributes:
        path: Of the linear in its block.
        column: Cut along its outputs (column-parallel), else along its inputs.
        parts: The sizes of the projections that lie side by side along that dimension; each is cut.
        transposed: The weight is stored as (inputs, outputs), as GPT-2's Conv1D does.
    """

    path: str
    column: bool
    parts: tuple[int, ...]
    transposed: bool = False

    def slice(self, parameter: str, units: tuple[int, int], num_units: int) -> Slice | None:
        """Return the slice of one of the linear's parameters; None for what every shard holds whole.

        Args:
            parameter: "weight", "bias", "lora_A.weight" (rank, inputs) or "lora_B.weight" (outputs, rank).
            units: The shard's half-open range of units.
            num_units: The units in all.
        """
        if parameter not in ("weight", "bias", self._cut_factor) or (parameter == "bias" and not self.column):
            return None
        if parameter == self._cut_factor:
            return replace(self, transposed=False).slice("weight", units, num_units)
        ranges, offset = [], 0
        for size in self.parts:
            a, b = unit_range(size, units, num_units)
            ranges.append((offset + a, offset + b))
            offset += size
        dim = 0 if parameter == "bias" else (int(self.column) if self.transposed else 1 - int(self.column))
        return Slice(dim, tuple(ranges))

    @property
    def _cut_factor(self) -> str:
        """The factor of an adapter that is cut with the linear: that on the side that is cut."""
        return "lora_B.weight" if self.column else "lora_A.weight"

    def is_partial(self, parameter: str) -> bool:
        """Return whether shards hold this whole and each computes a part of its gradient: an adapter's other factor."""
        return parameter in ("lora_A.weight", "lora_B.weight") and parameter != self._cut_factor


@dataclass(frozen=True)
class ShardedBlock:
    """The parts of a block between f and g, and how they are cut.

    Attributes:
        num_units: The KV groups.
        attention: Path of the attention.
        regions: Paths of the modules before which f stands.
        linears: The linears that are cut.
        partial: Names of the parameters that every shard holds whole and uses for its own heads only.
    """

    num_units: int
    attention: str
    regions: tuple[str, ...]
    linears: tuple[ShardedLinear, ...]
    partial: frozenset[str]

    def linear_of(self, name: str) -> tuple[ShardedLinear | None, str]:
        """Return the linear that is cut and that a parameter belongs to, and the parameter's name in it."""
        for linear in self.linears:
            if name.startswith(f"{linear.path}."):
                return linear, name.removeprefix(f"{linear.path}.")
        return None, name


_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_SIDE_BY_SIDE = (
    ("qkv_proj", "o_proj"),
    ("c_attn", "c_proj"),
)  # all queries, all keys, all values; and the output
_GROUPED = ("query_key_value",)  # of each KV group its queries, its key and its value
_MLPS = (  # column-parallel linears, then the row-parallel one
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "split_size",
    "embed_dim",
)


def find_sharding(block: nn.Module) -> ShardedBlock | None:
    """Return how a decoder block is cut, found from its modules; None where the structure is not known.

    Known are separate queries, keys and values (Llama, OPT), fused ones side by side (GPT-2, Phi-3) or in groups
    (GPT-NeoX, Falcon), and MLPs with a gate beside (Llama), fused with it (Phi-3), or none (GPT-2, OPT). Beside
    these linears attention may have norms of one head's width (Qwen3, Gemma 3); other parameters in it or in the
    MLP are not known.
    """
    for name, attention in block.named_children():
        cut = _attention(name, attention)
        if cut is None:
            continue
        mlp = _mlp(block, name)
        if mlp is None:
            return None
        (num_units, head_dim, linears), (region, mlp_linears) = cut, mlp
        linears += mlp_linears
        known = {f"{linear.path}.{parameter}" for linear in linears for parameter in ("weight", "bias")}
        norms = {
            f"{name}.{child}.{parameter}"
            for child, module in attention.named_children()
            for parameter, tensor in module.named_parameters(recurse=False)
            if "norm" in child and tensor.shape == (head_dim,)
        }
        inside = (f"{name}.", f"{region}.")
        if not {p for p, _ in block.named_parameters() if p.startswith(inside)} <= known | norms:
            return None
        return ShardedBlock(num_units, name, (name, region), linears, frozenset(norms))
    return None


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of the linears that are a module's children."""
    sizes = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Conv1D):
            rows, columns = child.weight.shape
            sizes[name] = (columns, rows) if isinstance(child, nn.Linear) else (rows, columns)
    return sizes


def _attention(path: str, module: nn.Module) -> tuple[int, int, tuple[ShardedLinear, ...]] | None:
    """Return the KV groups, the width of a head, and the linears of attention that is known."""
    sizes = _linears(module)
    parts: dict[str, tuple[int, ...]]
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    output = next((name for name in _ATTENTION_OUTPUTS if name in sizes), None)
    side_by_side = (fused for fused, out in _SIDE_BY_SIDE if out == output)
    fused = next((name for name in (*side_by_side, *_GROUPED) if name in sizes), None)
    if output is None or not isinstance(head_dim, int):
        return None
    queries = sizes[output][0]
    if sizes.keys() >= set(_SEPARATE):
        if sizes["q_proj"][1] != queries or sizes["k_proj"][1] != sizes["v_proj"][1]:
            return None
        keys, parts = sizes["k_proj"][1], {name: (sizes[name][1],) for name in _SEPARATE}
    elif fused is not None:
        total = sizes[fused][1]
        keys = (total - queries) // 2
        parts = {fused: (total,) if fused in _GROUPED else (queries, keys, total - queries - keys)}
    else:
        return None
    num_units = keys // head_dim
    if num_units < 1 or keys % head_dim or queries % keys or sizes.keys() - parts.keys() != {output}:
        return None
    columns = [_cut(module, path, name, True, sides) for name, sides in parts.items()]
    return num_units, head_dim, (*columns, _cut(module, path, output, False, (queries,)))


def _mlp(block: nn.Module, attention: str) -> tuple[str, tuple[ShardedLinear, ...]] | None:
    """Return the path before which f stands, and the linears, of an MLP that is known; it may be the block itself."""
    containers = [(name, child) for name, child in block.named_children() if name != attention] + [
        ("", block)
    ]
    for path, module in containers:
        sizes = _linears(module)
        names = next((names for names in _MLPS if sizes.keys() == set(names)), None)
        if names is None:
            continue
        *columns, row = names
        width = sizes[row][0]
        parts = (width, width) if columns == ["gate_up_proj"] else (width,)
        if any(sizes[name][1] != sum(parts) for name in columns) or (not path and len(columns) > 1):
            return None  # widths that do not meet, or two linears with no module around them for f to stand before
        linears = [_cut(module, path, name, True, parts) for name in columns]
        return path or columns[0], (*linears, _cut(module, path, row, False, (width,)))
    return None


def _cut(module: nn.Module, path: str, name: str, column: bool, parts: tuple[int, ...]) -> ShardedLinear:
    transposed = isinstance(module.get_submodule(name), Conv1D)
    return ShardedLinear(f"{path}.{name}" if path else name, column, parts, transposed)


class _ParallelLinear(nn.Module):
    """A linear of which this shard holds a part; of a row-parallel one a hook makes the sum and adds the bias once."""

    def __init__(self, linear: ShardedLinear, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self._linear.transposed else self.weight
        return F.linear(x, weight, self.bias if self._linear.column else None)


def shard_block(block: nn.Module, sharding: ShardedBlock, units: tuple[int, int], ops: ShardOps) -> None:
    """Cut a block on the meta device in place: this shard's part of every linear, f and g around each region.

    Args:
        block: A whole decoder block whose parameters have no values yet.
        sharding: How it is cut.
        units: The shard's half-open range of units.
        ops: f (`enter`) and g (`leave`).
    """
    for linear in sharding.linears:
        _cut_linear(block, linear, units, sharding.num_units, ops)
    attention: Any = block.get_submodule(sharding.attention)
    if hasattr(attention, "config"):
        attention.config = copy.copy(attention.config)
    for owner in (attention, getattr(attention, "config", None)):
        for name in _COUNTS:
            count = getattr(owner, name, None)
            if isinstance(count, int) and count % sharding.num_units == 0:
                setattr(owner, name, count * (units[1] - units[0]) // sharding.num_units)
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
            part = linear.slice(name, units, num_units)
            tensor = parameter.detach() if part is None else part.take(parameter.detach())
            parameter = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        parts[name] = parameter
    assert parts["weight"] is not None
    cut = _ParallelLinear(linear, parts["weight"], parts["bias"])
    if outer is whole:
        module.set_submodule(linear.path, cut)
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
    """Return a hook that passes a region's hidden states through f."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return with_hidden_states(ops.enter(hidden_states(args, kwargs)), args, kwargs)

    return hook
