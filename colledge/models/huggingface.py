"""Hugging Face decoder-only causal models as ordered layers: embedding, block.0 ... block.N-1, head.

A stage is the library's own model with the other stages' modules taken out, run by the library's own
`forward`: the first stage takes token ids, a later one `inputs_embeds`; a stage without the head returns the
hidden states before the final norm. So masks, rotary positions and the like stay the library's business.
What is taken out is found by structure: one list of blocks, one input embedding, one final norm, one head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from colledge.errors import ModelError
from colledge.models.layered import BatchRows, ModelSpec, StageModule
from colledge.models.lora import RowDropout, attach_adapters, cut_adapters, is_adapter, plain_name
from colledge.models.sharding import (
    ShardedBlock,
    ShardedLinear,
    ShardOps,
    Slice,
    find_sharding,
    shard_block,
    shard_head,
)
from colledge.settings import LoraSettings

_POSITION_EMBEDDINGS = ("wpe",)
_EXACT_TYPES = frozenset(  # checked: cut into stages they give the whole model's logits, bit for bit
    {
        *("arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "falcon", "glm", "gpt2", "gpt_neox", "llama"),
        *("mistral", "nemotron", "olmo", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "smollm3"),
        *("stablelm", "starcoder2"),
    }
)
_BAD_CONFIGURATION = (KeyError, ValueError, TypeError, ArithmeticError, StrictDataclassError)


class _NoPositions(nn.Module):
    """Stands in for learned position embeddings on stages after the first, where they are already added."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device, dtype=torch.bfloat16)


class _TrueRMSNorm(nn.Module):
    """RMSNorm computed in the precision of its input.

    The library's norms compute in float32 whatever the input, which would limit a float64 run to float32.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.get_parameter("weight")
        self.eps = float(getattr(norm, "variance_epsilon", 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def use_float64_norms(model: nn.Module) -> None:
    """Replace, in place, every RMSNorm that would compute in float32 by one that computes in float64."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(parent, name, _TrueRMSNorm(child))


class _Stage(StageModule):
    """A trimmed causal model: `forward(x, context)` as the engine calls it."""

    def __init__(self, causal_lm: nn.Module, base: nn.Module, first: bool, last: bool) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._forward = causal_lm if last else base
        self._input = "input_ids" if first else "inputs_embeds"
        self._output = "logits" if last else "last_hidden_state"

        self._dropouts = [m for m in causal_lm.modules() if isinstance(m, RowDropout)]

    def next_rows(self, rows: BatchRows | None) -> None:
        """Say which rows of the batch the next forwards compute; None is evaluation."""
        for dropout in self._dropouts:
            dropout.rows = rows

    def forward(self, x: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        output = self._forward(**{self._input: x}, **context, use_cache=False)
        result: Tensor = getattr(output, self._output)
        return result


class HuggingFaceCausalLM:
    """The layered view of a Hugging Face causal model (a `LayeredModel`); structure only, no weights.

    Args:
        config: The model's configuration as plain data (`config.to_dict()`).
        lora: Adapters to train, everything else frozen; None trains all.

    Raises:
        ModelError: The structure is not embeddings -> blocks -> norm -> head; the message shows what was found.
    """

    input_name = "input_ids"
    context_names = ("attention_mask",)

    def __init__(self, config: Mapping[str, Any], lora: LoraSettings | None = None) -> None:
        values = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
        try:
            whole = AutoConfig.for_model(**values).to_dict()  # dropout would depend on the plan
            values |= {name: 0.0 for name in whole if name.endswith(("dropout", "_pdrop")) and whole[name]}
            self._config = AutoConfig.for_model(**values)
        except _BAD_CONFIGURATION as fault:
            line = " ".join(str(fault).split())
            raise ModelError(f"the model's configuration cannot be used ({line[:300]}).") from None
        self.spec = ModelSpec(family="huggingface", config=values, lora=lora)
        self._find_structure()
        self._find_parameters()

    @classmethod
    def from_directory(cls, directory: Path, lora: LoraSettings | None = None) -> HuggingFaceCausalLM:
        """Return the model whose configuration is in a directory that `save_pretrained` wrote.

        Raises:
            ModelError: There is no config.json, or its structure cannot be cut.
        """
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"{directory}: no config.json there.", fix="give a directory that save_pretrained wrote."
            )
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, *_BAD_CONFIGURATION) as fault:
            line = " ".join(str(fault).split())
            raise ModelError(f"{directory}/config.json cannot be used ({line}).") from None
        return cls(config.to_dict(), lora)

    def _skeleton(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.device("meta"):
            try:
                model: nn.Module = AutoModelForCausalLM.from_config(
                    copy.deepcopy(self._config), dtype=dtype, attn_implementation="sdpa"
                )
            except _BAD_CONFIGURATION as fault:
                line = " ".join(str(fault).split())
                raise ModelError(f"no causal language model for this configuration ({line[:300]}).") from None
        return model

    def _adapted_skeleton(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model with its adapters, on the meta device."""
        model = self._skeleton(dtype)
        if self.spec.lora is not None:
            attach_adapters(model, self.spec.lora)
        return model

    def _find_parameters(self) -> None:
        """Find every parameter's whole shape and whether it trains, and the kinds of layers."""
        found = dict(self._adapted_skeleton().named_parameters(remove_duplicate=False))
        self._shapes = {plain_name(name): tuple(p.shape) for name, p in found.items()}
        self._trained = frozenset(plain_name(name) for name, p in found.items() if p.requires_grad)
        outside = [name for name in self._shapes if is_adapter(name) and not self._block_prefix(name)]
        if outside:
            raise ModelError(
                f"lora.targets: {outside[0].removesuffix('.lora_A.weight')} lies outside the blocks.",
                fix="adapt linears of the blocks; train others whole with lora.modules_to_save.",
            )
        for copy_name, source in self.tied.items():
            if (copy_name in self._trained) != (source in self._trained):
                raise ModelError(
                    f"lora.modules_to_save trains one of {copy_name} and {source}, which are one weight.",
                    fix="name both modules, or neither.",
                )
        self.layer_kinds = self._find_kinds()

    def _block_prefix(self, name: str) -> bool:
        return name.startswith(f"{self._base_name}.{self._blocks}.")

    def _find_kinds(self) -> tuple[str, ...]:
        """Return the kind of each layer: blocks that train other parameters take another time."""
        kinds: dict[frozenset[str], str] = {}
        found = []
        for index, name in enumerate(self.layer_names):
            if 0 < index < len(self.layer_names) - 1:
                (prefix,) = self._layer_prefixes(index)
                own = frozenset(n.removeprefix(prefix) for n in self._trained if n.startswith(prefix))
                name = kinds.setdefault(own, "block" if not kinds else f"block.{len(kinds)}")
            found.append(name)
        return tuple(found)

    def _find_structure(self) -> None:
        model = self._skeleton()
        base_name = getattr(model, "base_model_prefix", "")
        base = getattr(model, base_name, None)
        children = dict(base.named_children()) if isinstance(base, nn.Module) else {}
        blocks = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
        norms = [name for name, child in children.items() if "norm" in type(child).__name__.lower()]
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        embeddings = [name for name, child in children.items() if child is embedding]
        head = model.get_output_embeddings()  # type: ignore[operator]
        heads = [name for name, child in model.named_children() if child is head and head is not None]
        found = ", ".join(f"{name}: {type(child).__name__}" for name, child in children.items())
        if not (len(blocks) == len(norms) == len(embeddings) == len(heads) == 1):
            raise ModelError(
                f"{type(model).__name__} is not an embedding, one list of blocks, a norm and a head: found "
                f"{found or 'nothing'} in {base_name or 'the model'!r}, head {heads or 'none'}.",
                fix="use a decoder-only causal model such as Llama, Qwen2 or GPT-2.",
            )
        positions = [name for name in children if name in _POSITION_EMBEDDINGS]
        others = {
            name
            for name, _ in base.named_parameters(recurse=True)  # type: ignore[union-attr]
            if name.split(".")[0] not in {*blocks, *norms, *embeddings, *positions}
        }
        if others:
            raise ModelError(
                f"{type(model).__name__} has parameters outside its layers: {sorted(others)[:4]}; found {found}.",
                fix="use a decoder-only causal model such as Llama, Qwen2 or GPT-2.",
            )
        if (
            self._config.model_type not in _EXACT_TYPES
        ):  # it may do more than its modules show, such as scaling
            raise ModelError(
                f"model type {self._config.model_type!r} is not known to stay exact when it is cut; found {found}.",
                fix=f"use one of {', '.join(sorted(_EXACT_TYPES))}.",
            )
        self._base_name, self._blocks, self._norm, self._head = base_name, blocks[0], norms[0], heads[0]
        self._embeddings = (embeddings[0], *positions)
        block_list = children[self._blocks]
        assert isinstance(block_list, nn.ModuleList)
        num_blocks = len(block_list)
        if num_blocks < 1:
            raise ModelError(f"{type(model).__name__} has {num_blocks} blocks, wanted at least 1.")
        self.layer_names = ("embedding", *(f"block.{i}" for i in range(num_blocks)), "head")
        self._sharding = [find_sharding(block) for block in block_list]
        embedding_name = f"{base_name}.{self._embeddings[0]}.weight"
        head_name = f"{self._head}.weight"
        tied = model.get_parameter(embedding_name) is model.get_parameter(head_name)
        self.tied: dict[str, str] = {head_name: embedding_name} if tied else {}

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return self._config

    @cached_property
    def shard_units(self) -> int:
        """The number of KV groups, or 1 where the blocks' structure cannot be sharded."""
        if any(sharding is None for sharding in self._sharding):
            return 1
        heads = self._config.num_attention_heads
        return int(getattr(self._config, "num_key_value_heads", None) or heads)

    @cached_property
    def _head_sharding(self) -> ShardedLinear | None:
        """The head cut along the vocabulary; a head tied to the embedding stays whole."""
        return None if self.tied else ShardedLinear(self._head, column=True)

    def is_sharded(self, layer_index: int) -> bool:
        """Return whether the shards of a replica share this layer's work; else each does all of it."""
        if layer_index == len(self.layer_names) - 1:
            return self.shard_units > 1 and self._head_sharding is not None
        return self.shard_units > 1 and layer_index > 0

    def output_columns(self, units: tuple[int, int]) -> tuple[int, int] | None:
        """Return the columns of the model's output that a shard computes; None for all of them."""
        part = self.slices(f"{self._head}.weight", units)
        return part.ranges[0] if part is not None else None

    @property
    def output_width(self) -> int:
        """The size of the vocabulary."""
        return self._shapes[f"{self._head}.weight"][0]

    def boundary_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (sequence length, hidden size) for input ids of (sequence length,)."""
        return (*input_shape, int(self._config.hidden_size))

    def _layer_prefixes(self, layer_index: int) -> tuple[str, ...]:
        if layer_index == 0:
            return tuple(f"{self._base_name}.{name}." for name in self._embeddings)
        if layer_index == len(self.layer_names) - 1:
            return (f"{self._base_name}.{self._norm}.", f"{self._head}.")
        return (f"{self._base_name}.{self._blocks}.{layer_index - 1}.",)

    def layer_parameters(self, layer_index: int) -> dict[str, tuple[int, ...]]:
        """Return a layer's parameters and whole shapes; the head's includes a tied weight."""
        prefixes = self._layer_prefixes(layer_index)
        return {name: shape for name, shape in self._shapes.items() if name.startswith(prefixes)}

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The adapters' parameters by name, and their whole shapes."""
        return {name: shape for name, shape in self._shapes.items() if is_adapter(name)}

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The weights that are stored as (inputs, outputs), as GPT-2's are."""
        modules = self._skeleton().named_modules()
        return frozenset(f"{name}.weight" for name, module in modules if isinstance(module, Conv1D))

    def trains(self, name: str) -> bool:
        """Return whether a parameter is trained; others are frozen."""
        return name in self._trained

    def slices(self, name: str, units: tuple[int, int]) -> Slice | None:
        """Return the part of a parameter that a shard holds; None is all of it."""
        if name.startswith(f"{self._head}.") and self._head_sharding is not None:
            parameter = name.rpartition(".")[2]
            return self._head_sharding.slice(parameter, self._shapes[name], units, self.shard_units)
        linear, parameter = self._sharded_parameter(name)
        if linear is None:
            return None
        return linear.slice(parameter, self._shapes[name], units, self.shard_units)

    def is_partial(self, name: str) -> bool:
        """Return whether shards hold this parameter whole and each computes a part of its gradient."""
        if self.shard_units == 1:
            return False
        linear, parameter = self._sharded_parameter(name)
        return linear is not None and linear.is_partial(parameter)

    def _sharded_parameter(self, name: str) -> tuple[ShardedLinear | None, str]:
        """Return the linear of a block that shards cut and that a parameter belongs to, and the rest of its name."""
        prefix = f"{self._base_name}.{self._blocks}."
        if not name.startswith(prefix):
            return None, ""
        index, _, path = name.removeprefix(prefix).partition(".")
        for linear in self._block_sharding(int(index)).linears:
            if path.startswith(f"{linear.path}."):
                return linear, path.removeprefix(f"{linear.path}.")
        return None, ""

    def _block_sharding(self, block_index: int) -> ShardedBlock:
        sharding = self._sharding[block_index]
        if sharding is None:
            raise ModelError(
                f"the blocks of {self._config.model_type!r} cannot be cut into shards: their attention and MLP "
                "are not the linears that tensor parallelism knows.",
                fix="plan without tensor parallelism (fractions of 1).",
            )
        return sharding

    def build_stage(
        self,
        layers: tuple[int, int],
        dtype: torch.dtype,
        units: tuple[int, int] | None = None,
        ops: ShardOps | None = None,
    ) -> tuple[StageModule, dict[str, nn.Parameter]]:
        """Return a stage's module on the CPU, values not set, and its parameters by their whole-model names."""
        start, stop = layers
        first, last = start == 0, stop == len(self.layer_names)
        model = self._adapted_skeleton(dtype)
        base = model.get_submodule(self._base_name)
        begin, end = max(start - 1, 0), min(stop - 1, len(self.layer_names) - 2)
        blocks = base.get_submodule(self._blocks)
        assert isinstance(blocks, nn.ModuleList)
        kept = nn.ModuleList(list(blocks)[begin:end])
        setattr(base, self._blocks, kept)
        self._trim_config(base, begin, end)
        if units is not None:
            assert ops is not None
            for offset, block in enumerate(kept):
                sharding = self._block_sharding(begin + offset)
                shard_block(block, sharding, units, self.shard_units, ops)
                cut_adapters(block, sharding, units, self.shard_units)
            if last and self._head_sharding is not None:
                shard_head(model, self._head_sharding, units, self.shard_units, ops)
        if not first:
            for name in self._embeddings:
                replacement = _NoPositions() if name in _POSITION_EMBEDDINGS else nn.Identity()
                setattr(base, name, replacement)
        if not last:
            setattr(base, self._norm, nn.Identity())
            setattr(model, self._head, nn.Identity())
        if dtype is torch.float64:
            use_float64_norms(model)
        _materialise(model)
        return _Stage(model, base, first, last), self._whole_names(model, begin)

    def _trim_config(self, base: nn.Module, begin: int, end: int) -> None:
        """Give the base model a configuration of its own blocks only; the blocks keep the whole one."""
        config: Any = copy.deepcopy(base.config)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[begin:end]
        config.num_hidden_layers = end - begin
        object.__setattr__(base, "config", config)

    def _whole_names(self, model: nn.Module, begin: int) -> dict[str, nn.Parameter]:
        prefix = f"{self._base_name}.{self._blocks}."
        names = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name.startswith(prefix):
                index, _, path = name.removeprefix(prefix).partition(".")
                name = f"{prefix}{int(index) + begin}.{path}"
            names[plain_name(name)] = parameter
        return names


def _materialise(model: nn.Module) -> None:
    """Allocate the parameters of a meta-device model, keeping ties, and compute its constant buffers anew."""
    fresh: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in fresh:
                values = torch.empty_like(parameter, device="cpu")
                fresh[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(module, name, fresh[id(parameter)])
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                try:
                    setattr(parent, name, type(child)(child.config))
                except (AttributeError, TypeError) as fault:
                    raise ModelError(
                        f"{type(child).__name__} holds constants that cannot be computed anew ({fault})."
                    ) from None
