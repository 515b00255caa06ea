"""Hugging Face decoder-only causal models as ordered layers: embedding, block.0 ... block.N-1, head.

What belongs to which layer is found by structure (`structure`), never by a model's name; a stage is the library's
own model with the other stages' modules taken out (`stage`); tensor shards are found by structure too (`sharding`).
`from_directory` also tries the cuts on a small copy of the model (`probe`).
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
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from colledge.errors import ModelError, said_by
from colledge.models.conversion import stores_two_values
from colledge.models.float64 import keep_float64
from colledge.models.folder import check_folder
from colledge.models.layered import ModelSpec, StageModule
from colledge.models.lora import attach_adapters, cut_adapters, is_adapter, plain_name
from colledge.models.precision import BUFFER, HELD, hold_frozen
from colledge.models.probe import check_parts
from colledge.models.sharding import (
    ShardedBlock,
    ShardedLinear,
    ShardOps,
    Slice,
    find_sharding,
    shard_block,
    shard_head,
)
from colledge.models.stage import OtherBlock, Stage
from colledge.models.structure import find_structure, fix_positions
from colledge.settings import LoraSettings, NarrowPrecision

_BAD_CONFIGURATION = (
    *(
        LookupError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        ImportError,
    ),
    StrictDataclassError,
)


class HuggingFaceCausalLM:
    """The layered view of a Hugging Face causal model (a `LayeredModel`); structure only, no weights.

    Args:
        config: The model's configuration as plain data (`config.to_dict()`).
        lora: Adapters to train, everything else frozen; None trains all.
        mixed_precision: Of products, instead of that of activations.
        frozen_precision: Of frozen matrices in memory.

    Raises:
        ModelError: The structure is not embeddings -> blocks -> norm -> head; the message shows what was found.
    """

    unreached: frozenset[str] = frozenset()  # parameters that no loss reaches, where a probe looked for them
    input_name, input_dtype = "input_ids", torch.int64
    context_names = ("attention_mask",)

    def __init__(
        self,
        config: Mapping[str, Any],
        lora: LoraSettings | None = None,
        mixed_precision: NarrowPrecision | None = None,
        frozen_precision: NarrowPrecision | None = None,
    ) -> None:
        values = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
        try:
            values = _without_dropout(values, AutoConfig.for_model(**values).to_dict())
            self._config = AutoConfig.for_model(**values)
        except _BAD_CONFIGURATION as fault:
            raise ModelError(
                f"the model's configuration cannot be used ({said_by(fault)}).", fix="mend its config.json."
            ) from None
        self.spec = ModelSpec(
            family="huggingface",
            config=values,
            lora=lora,
            mixed_precision=mixed_precision,
            frozen_precision=frozen_precision,
        )
        self._find_structure()
        self._find_parameters()

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> HuggingFaceCausalLM:
        """Return the model that a spec describes."""
        return cls(spec.config, spec.lora, spec.mixed_precision, spec.frozen_precision)

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        lora: LoraSettings | None = None,
        mixed_precision: NarrowPrecision | None = None,
        frozen_precision: NarrowPrecision | None = None,
        *,
        probe: bool = True,
    ) -> HuggingFaceCausalLM:
        """Return the model whose configuration is in a directory that `save_pretrained` wrote.

        Args:
            directory: Of the model.
            lora: Adapters to train; None trains all.
            mixed_precision: Of products.
            frozen_precision: Of frozen matrices in memory.
            probe: Whether a small copy is tried in parts; once a run is enough.

        Raises:
            ModelError: There is no config.json, it cannot be cut, or a small copy of it in parts is not the whole.
        """
        check_folder(directory)
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, *_BAD_CONFIGURATION) as fault:
            raise ModelError(
                f"{directory}/config.json cannot be used ({said_by(fault)}).",
                fix="copy it again from where the model was saved.",
            ) from None
        model = cls(config.to_dict())
        if model.tied and stores_two_values(directory, model.skeleton(), model.tied):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
            model = cls(config.to_dict())
        unreached = check_parts(model) if probe else frozenset()
        opened = cls(config.to_dict(), lora, mixed_precision, frozen_precision)
        opened.unreached = unreached
        return opened

    def skeleton(self) -> nn.Module:
        """Return the library's whole model on the meta device, without adapters."""
        return self._skeleton()

    def _skeleton(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.device("meta"):
            try:
                model: nn.Module = AutoModelForCausalLM.from_config(
                    copy.deepcopy(self._config), dtype=dtype, trust_remote_code=False
                )
            except _BAD_CONFIGURATION as fault:
                raise ModelError(
                    f"no causal language model for this configuration ({said_by(fault)}).",
                    fix="use a causal language model, with the config.json that it was saved with.",
                ) from None
        freeze_buffers(model)
        return model

    def _adapted_skeleton(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model with its adapters, on the meta device."""
        model = self._skeleton(dtype)
        if self.spec.lora is not None:
            attach_adapters(model, self.spec.lora)
        return model

    def _find_parameters(self) -> None:
        """Find every parameter's whole shape and whether it trains, and the kinds of layers."""
        blocks = self.spec.lora.blocks if self.spec.lora is not None else None
        if blocks is not None and not all(0 <= block < self.structure.num_blocks for block in blocks):
            raise ModelError(
                f"lora.blocks is {list(blocks)}, the model has blocks 0 to {self.structure.num_blocks - 1}.",
                fix="name blocks that are there, or leave lora.blocks out for all of them.",
            )
        idle = tuple(f"{path}." for path in self.structure.idle)
        named = self._adapted_skeleton().named_parameters(remove_duplicate=False)
        found = {name: parameter for name, parameter in named if not name.startswith(idle)}
        self._shapes = {plain_name(name): tuple(p.shape) for name, p in found.items()}
        self._trained = frozenset(plain_name(name) for name, p in found.items() if p.requires_grad)
        outside = [name for name in self._shapes if is_adapter(name) and not self._block_prefix(name)]
        if outside:
            raise ModelError(
                f"lora.targets: {outside[0].removesuffix('.lora_A.weight')} lies outside the blocks.",
                fix="adapt linears of the blocks; train others whole with lora.modules_to_save.",
            )
        for copy_name, source in self.tied.items():
            if self.spec.lora is not None and source in self._trained:
                raise ModelError(
                    f"lora.modules_to_save names {copy_name} or {source}, which are one weight; PEFT would part them.",
                    fix="leave them out, or untie them in the model (tie_word_embeddings).",
                )
        self.layer_kinds = self._find_kinds()

    def _block_prefix(self, name: str) -> bool:
        return name.startswith(f"{self.structure.blocks}.")

    def _find_kinds(self) -> tuple[str, ...]:
        """Return the kind of each layer: blocks that hold or train other parameters take another time."""
        kinds: dict[frozenset[tuple[str, tuple[int, ...], bool]], str] = {}
        found = []
        for index, name in enumerate(self.layer_names):
            if 0 < index < len(self.layer_names) - 1:
                prefix = f"{self.structure.blocks}.{index - 1}."
                shapes = self.layer_parameters(index).items()
                own = frozenset((n.removeprefix(prefix), shape, n in self._trained) for n, shape in shapes)
                name = kinds.setdefault(own, "block" if not kinds else f"block.{len(kinds)}")
            found.append(name)
        return tuple(found)

    def _find_structure(self) -> None:
        model = self._skeleton(torch.bfloat16)  # experts run without values in no other type
        fix_positions(model)
        self.structure = find_structure(model)
        num_blocks = self.structure.num_blocks
        self.layer_names = ("embedding", *(f"block.{i}" for i in range(num_blocks)), "head")
        blocks = model.get_submodule(self.structure.blocks)
        self._sharding = None if self.structure.alibi else _sharding_of_all(blocks)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._fixed_dtypes = _fixed_dtypes(model)
        embedding_name, head_name = f"{self.structure.embedding}.weight", f"{self.structure.head}.weight"
        tied = model.get_parameter(embedding_name) is model.get_parameter(head_name)
        self.tied: dict[str, str] = {head_name: embedding_name} if tied else {}
        if len(names) - len(self.tied) != len(list(model.parameters())):
            raise ModelError(
                f"{type(model).__name__} shares weights between layers other than embedding and head."
            )
        inside = [
            f"{path}."
            for layer in range(self.structure.num_layers)
            for path in self.structure.modules_of(layer)
        ]
        inside += [f"{path}." for path in self.structure.idle]
        outside = sorted(name for name in names if not name.startswith(tuple(inside)))
        if outside:
            raise ModelError(
                f"{type(model).__name__} has weights outside its layers: {', '.join(outside[:4])}."
            )

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return self._config

    @property
    def shard_units(self) -> int:
        """The number of KV groups, or 1 where the blocks' structure cannot be sharded."""
        return 1 if self._sharding is None else self._sharding[0].num_units

    @cached_property
    def _head_sharding(self) -> ShardedLinear | None:
        """The head cut along the vocabulary; a head tied to the embedding stays whole."""
        return None if self.tied else ShardedLinear(self.structure.head, True, (self.output_width,))

    def is_sharded(self, layer_index: int) -> bool:
        """Return whether the shards of a replica share this layer's work; else each does all of it."""
        if layer_index == len(self.layer_names) - 1:
            return self.shard_units > 1 and self._head_sharding is not None
        return self.shard_units > 1 and layer_index > 0

    def output_columns(self, units: tuple[int, int]) -> tuple[int, int] | None:
        """Return the columns of the model's output that a shard computes; None for all of them."""
        part = self.slices(f"{self.structure.head}.weight", units)
        return part.ranges[0] if part is not None else None

    @property
    def output_width(self) -> int:
        """The size of the vocabulary."""
        return self._shapes[f"{self.structure.head}.weight"][0]

    def boundary_shape(
        self, row_shape: tuple[int, ...], layer_index: int, first_layer: int = 0
    ) -> tuple[int, ...]:
        """Return (sequence length, hidden size) for a block or the head, (sequence length, vocabulary) behind it."""
        if layer_index == first_layer:
            return row_shape
        behind = layer_index == len(self.layer_names)
        return (row_shape[0], *((self.output_width,) if behind else self.structure.boundary))

    def layer_parameters(self, layer_index: int) -> dict[str, tuple[int, ...]]:
        """Return a layer's parameters and whole shapes; the head's includes a tied weight."""
        prefixes = tuple(f"{path}." for path in self.structure.modules_of(layer_index))
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

    @cached_property
    def first_trained(self) -> int:
        """The first layer that trains anything, or the number of layers where none does."""
        num_layers = len(self.layer_names)
        trained = (i for i in range(num_layers) if any(map(self.trains, self.layer_parameters(i))))
        return next(trained, num_layers)

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which a parameter is held where the model is built with `dtype`."""
        if name in self._fixed_dtypes:
            return self._fixed_dtypes[name] or dtype
        held = self.spec.frozen_precision is not None and len(self._shapes[name]) == 2
        return HELD if held and not self.trains(name) else dtype

    def slices(self, name: str, units: tuple[int, int]) -> Slice | None:
        """Return the part of a parameter that a shard holds; None is all of it."""
        if name.startswith(f"{self.structure.head}.") and self._head_sharding is not None:
            return self._head_sharding.slice(name.rpartition(".")[2], units, self.shard_units)
        if not self._block_prefix(name):
            return None
        sharding, path = self._sharding_of(name)
        linear, parameter = sharding.linear_of(path)
        return None if linear is None else linear.slice(parameter, units, self.shard_units)

    def is_partial(self, name: str) -> bool:
        """Return whether shards hold this parameter whole and each computes a part of its gradient."""
        if self.shard_units == 1 or not self._block_prefix(name):
            return False
        sharding, path = self._sharding_of(name)
        linear, parameter = sharding.linear_of(path)
        return path in sharding.partial if linear is None else linear.is_partial(parameter)

    def _sharding_of(self, name: str) -> tuple[ShardedBlock, str]:
        """Return how the block of a parameter is cut, and the parameter's name in the block."""
        index, _, path = name.removeprefix(f"{self.structure.blocks}.").partition(".")
        return self._block_sharding(int(index)), path

    def _block_sharding(self, block_index: int) -> ShardedBlock:
        if self._sharding is None:
            raise ModelError(
                f"the blocks of {self._config.model_type!r} cannot be cut into shards: their attention and MLP "
                "are not the linears that tensor parallelism knows.",
                fix="plan without tensor parallelism (fractions of 1).",
            )
        return self._sharding[block_index]

    def build_stage(
        self,
        layers: tuple[int, int],
        dtype: torch.dtype,
        units: tuple[int, int] | None = None,
        ops: ShardOps | None = None,
    ) -> tuple[StageModule, dict[str, nn.Parameter]]:
        """Return a stage's module on the CPU, values not set, and its parameters by their whole-model names."""
        model = self._adapted_skeleton(dtype)
        stage = Stage(model, self.structure, layers, dtype, self.spec.mixed_precision is not None)
        if units is not None:
            assert ops is not None
            for index in self.structure.blocks_of(layers):
                block = model.get_submodule(f"{self.structure.blocks}.{index}")
                shard_block(block, self._block_sharding(index), units, ops)
                cut_adapters(block, self._block_sharding(index), units, self.shard_units)
            if layers[1] == len(self.layer_names) and self._head_sharding is not None:
                shard_head(model, self._head_sharding, units, self.shard_units, ops)
        if self.spec.frozen_precision is not None:
            hold_frozen(model)
        if dtype is torch.float64:
            keep_float64(stage)
        _materialise(model, dtype)
        fix_positions(model)
        parameters = model.named_parameters(remove_duplicate=False)
        named = ((plain_name(name), parameter) for name, parameter in parameters)
        return stage, {name: parameter for name, parameter in named if name in self._shapes}


def _without_dropout(values: dict[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without dropout, which would depend on the plan, in any of its parts.

    Args:
        values: What is said.
        whole: That and the library's defaults.
    """
    none: dict[str, Any] = {}
    for name, value in whole.items():
        if "drop" in str(name) and isinstance(value, float):  # labels have numbers for names
            none[name] = 0.0
        elif isinstance(value, dict) and isinstance(values.get(name, {}), dict):
            none[name] = _without_dropout(values.get(name, {}), value)
    return values | {name: value for name, value in none.items() if value != {}}


def freeze_buffers(model: nn.Module) -> None:
    """Turn the buffers that are saved with a model into parameters that do not train, in place.

    Routers keep such weights, which no gradient reaches (a bias by which experts are chosen). They are read, sent, held
    and saved as what is frozen.
    """
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name not in module._non_persistent_buffers_set:
                del module._buffers[name]
                setattr(module, name, nn.Parameter(buffer, requires_grad=False))
                setattr(getattr(module, name), BUFFER, True)


def _fixed_dtypes(model: nn.Module) -> dict[str, torch.dtype | None]:
    """Return of every weight that was a buffer the type that it has whatever the model is built with, None if that.

    Args:
        model: Built with bfloat16.
    """
    return {
        name: None if weight.dtype is torch.bfloat16 else weight.dtype
        for name, weight in model.named_parameters()
        if hasattr(weight, BUFFER)
    }


def _sharding_of_all(blocks: nn.Module) -> tuple[ShardedBlock, ...] | None:
    """Return how every block is cut; None where one is not known, or they have not the same number of KV groups."""
    found = [find_sharding(block) for block in blocks.children()]
    known = tuple(sharding for sharding in found if sharding is not None)
    alike = len({sharding.num_units for sharding in known}) == 1
    return known if alike and len(known) == len(found) else None


@torch.no_grad()
def _materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """Allocate a meta-device model on the CPU, keeping ties; the library computes its constant buffers.

    Raises:
        ModelError: A constant is not one that the library computes for a model made without values.
    """
    fresh: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in fresh:
                values = torch.empty_like(parameter, device="cpu")
                fresh[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                fresh[id(parameter)]._is_hf_initialized = True  # type: ignore[attr-defined] # to be left alone
            setattr(module, name, fresh[id(parameter)])
    with unset_fake_temporarily():  # constants are small, and have values even where parameters have none
        for module in list(model.modules()):
            _compute_constants(model, module, dtype)
        if any(map(_not_computed, model.modules())):
            _initialise_around_blocks(model, dtype)
        for path, module in model.named_modules():
            if unset := _not_computed(module):
                kind, names = type(module).__name__, ", ".join(unset)
                raise ModelError(
                    f"{path} ({kind}) holds constants that cannot be computed anew: {names}.",
                    fix="use another model, or look at its config.json.",
                )


def _initialise_around_blocks(model: nn.Module, dtype: torch.dtype) -> None:
    """Have the library initialise the modules that hold lists of blocks: some set constants of the blocks."""
    from transformers.modeling_utils import local_torch_dtype  # as below

    for outer in list(model.modules()):
        lists = {n: child for n, child in outer.named_children() if isinstance(child, nn.ModuleList)}
        for name, blocks in lists.items():
            setattr(outer, name, nn.ModuleList(b for b in blocks if not isinstance(b, OtherBlock)))
        if lists:
            with local_torch_dtype(dtype):
                model._init_weights(outer)  # type: ignore[operator]
        for name, blocks in lists.items():
            setattr(outer, name, blocks)


def _compute_constants(model: nn.Module, module: nn.Module, dtype: torch.dtype) -> None:
    """Have the library compute a module's own buffers, as in a model of this dtype."""
    from transformers.modeling_utils import (
        local_torch_dtype,
    )  # a second to import, too long before a worker joins

    buffers = list(module.named_buffers(recurse=False))
    for name, buffer in buffers:
        unset = torch.nan if buffer.is_floating_point() else torch.iinfo(torch.int8).min
        setattr(module, name, torch.full(buffer.shape, unset, dtype=buffer.dtype, device="cpu"))
    if buffers:
        with local_torch_dtype(dtype):
            model._init_weights(module)  # type: ignore[operator]


def _not_computed(module: nn.Module) -> list[str]:
    """Return a module's own constants that the library has not computed."""
    buffers = module.named_buffers(recurse=False)
    unset = [n for n, c in buffers if bool((c.isnan() if c.is_floating_point() else c == -128).any())]
    return unset + [n for n, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
