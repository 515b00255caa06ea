"""Whether a model's parts give the whole, tried on a small copy of it with random weights before anything is planned.

Structure says where a model can be cut. It cannot promise that nothing else goes from layer to layer, such as keys
and values that blocks share, or inputs of every block that are made from the token ids. So a small model of the same
kind (the first blocks, so many that every kind of block is among them; few heads of the same width; narrow MLPs; a
small vocabulary) is cut after every layer, with and without padding: every boundary and every gradient must be what
the library's own model gives, bit for bit. Where blocks can be sharded, the shards' sums must be the whole's too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from colledge.errors import ModelError
from colledge.models.float64 import keep_float64
from colledge.models.structure import hidden_states

if TYPE_CHECKING:
    from colledge.models.huggingface import HuggingFaceCausalLM

_VOCABULARY, _MLP_WIDTH, _MLP_WIDTHS = 64, 48, ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
_HEAD_SHARE = 16  # of the hidden size, where heads have a width of their own
_KV_HEADS = ("num_kv_heads", "num_key_value_heads")
_SHARD_TOLERANCE = 1e-10  # of float64, relative: a sum in parts rounds otherwise than the whole one
_FIX = "use a model whose blocks pass on nothing but hidden states, such as Llama, Qwen3, Gemma 3 or GPT-2."

_StageOf: TypeAlias = tuple[nn.Module, dict[str, nn.Parameter]]  # and its parameters


def check_parts(model: HuggingFaceCausalLM) -> None:
    """Check on a small copy that a model's layers, and the shards of its blocks, together give the model.

    Raises:
        ModelError: They do not, and after which layer; or no small copy can be made, so that nothing shows it.
    """
    kind = model.config.model_type
    try:
        small = type(model)(_small_config(model))
        whole = _whole(small, torch.float32)
    except (
        ModelError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        ZeroDivisionError,
    ) as fault:
        raise ModelError(
            f"no small copy of this {kind!r} can be made to try its cuts on ({_line(fault)})."
        ) from None
    if _parameter_names(small) != _parameter_names(model)[: len(small.layer_names) - 2]:
        raise ModelError(
            f"a small copy of this {kind!r} has other parameters than the model: its cuts cannot be tried."
        )
    layers = pairwise(range(len(small.layer_names) + 1))
    stages = [_stage(small, whole, layer) for layer in layers]
    for context in _contexts():
        _check_stages(small, whole, stages, context)
    if small.shard_units > 1:
        _check_shards(small)


def _line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"


# -- the small copy ------------------------------------------------------------------------------------------------


def _parameter_names(model: HuggingFaceCausalLM) -> list[set[str]]:
    """Return the names of each block's parameters, without numbers: a block may have lists with an entry a head."""
    layers = (model.layer_parameters(index) for index in range(1, len(model.layer_names) - 1))
    return [{re.sub(r"\d+", "", name) for name in parameters} for parameters in layers]


def _num_blocks(model: HuggingFaceCausalLM, lists: list[list[Any]]) -> int:
    """Return so many blocks that every kind is among the first of them, and one more; at least 3 if there are."""
    kinds = []
    for index in range(len(model.layer_names) - 2):
        parameters = model.layer_parameters(index + 1).items()
        shapes = frozenset((name.partition(f".{index}.")[2], shape) for name, shape in parameters)
        kinds.append((shapes, *(str(values[index]) for values in lists)))
    return min(max(3, 2 + max(map(kinds.index, kinds))), len(kinds))


def _small_config(model: HuggingFaceCausalLM) -> dict[str, Any]:
    """Return the configuration of the small copy; what is not known to be a size stays as it is."""
    config: dict[str, Any] = model.config.to_dict()
    depth = len(model.layer_names) - 2
    each_block = {
        name: value for name, value in config.items() if isinstance(value, list) and len(value) == depth
    }
    num_blocks = _num_blocks(model, list(each_block.values()))
    names = getattr(model.config, "attribute_map", {})
    heads_name = names.get("num_attention_heads", "num_attention_heads")
    heads = config[heads_name]
    groups = next((config[name] for name in _KV_HEADS if config.get(name)), heads)
    few = min(groups, 2) * min(heads // groups, 2)
    small = config | {name: value[:num_blocks] for name, value in each_block.items()}
    small |= {names.get("num_hidden_layers", "num_hidden_layers"): num_blocks, heads_name: few}
    for name, value in config.items():
        if not isinstance(value, int) or name == heads_name:
            continue
        if name in _KV_HEADS:
            small[name] = min(value, 2)
        elif name in (names.get("hidden_size", "hidden_size"), "word_embed_proj_dim"):
            small[name] = value * few // heads if config.get("head_dim") is None else _HEAD_SHARE * few
        elif name.endswith(_MLP_WIDTHS):
            small[name] = min(value, _MLP_WIDTH)
        elif name.startswith("vocab_size"):
            small[name] = min(value, _VOCABULARY)
        elif name.endswith("_token_id"):
            small[name] = 0
    return small


def _whole(model: HuggingFaceCausalLM, dtype: torch.dtype) -> nn.Module:
    """Return the library's own model, with weights that leave no module without effect."""
    whole: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=0.05)
    return whole


def _ids(model: HuggingFaceCausalLM) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, model.output_width, (3, 8), generator=generator)


def _contexts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return no mask, and one with padding right and left."""
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, :3] = 0
    return {}, {"attention_mask": mask}


# -- the comparison ------------------------------------------------------------------------------------------------


def _differs(model: HuggingFaceCausalLM, seen: str) -> ModelError:
    return ModelError(
        f"model type {model.config.model_type!r} is not exact when it is cut: {seen}.", fix=_FIX
    )


def _check_stages(
    model: HuggingFaceCausalLM, whole: nn.Module, stages: list[_StageOf], context: Mapping[str, Tensor]
) -> None:
    boundaries, logits = _boundaries(model, whole, context)
    whole.zero_grad()
    torch.autograd.backward(logits.square().sum())
    x = _ids(model)
    for layer, (stage, _), wanted in zip(model.layer_names, stages, [*boundaries, logits], strict=True):
        stage.zero_grad()
        try:
            x = stage(x, context)
        except Exception as fault:  # whatever the library raises, the cut is what made it do so
            raise _differs(model, f"{layer} alone does not run ({_line(fault)})") from None
        if not torch.equal(x, wanted):
            raise _differs(model, f"{layer} alone does not give what it gives in the whole model")
    torch.autograd.backward(x.square().sum())
    gradients: dict[str, Tensor] = {}
    for name, parameter in (item for _, parameters in stages for item in parameters.items()):
        if parameter.grad is None:
            raise _differs(model, f"no loss reaches {name}")
        name = model.tied.get(name, name)
        gradients[name] = parameter.grad if name not in gradients else gradients[name] + parameter.grad
    for name, parameter in whole.named_parameters():
        if parameter.grad is None or not torch.equal(gradients[name], parameter.grad):
            raise _differs(model, f"{name} has another gradient than in the whole model")


def _boundaries(
    model: HuggingFaceCausalLM, whole: nn.Module, context: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return what the library's model computes after the embedding and after each block, and its logits."""
    found: list[Tensor] = []
    blocks = list(whole.get_submodule(model.structure.blocks).children())

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(hidden_states(args, kwargs).detach())

    def after(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).detach())

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(after))
    logits: Tensor = whole(input_ids=_ids(model), **context, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found, logits


class _Sums:
    """f and g of one shard alone: notes what it would add to each sum, and goes on with the sums given, if any."""

    def __init__(self, sums: list[Tensor] | None = None) -> None:
        self.addends: list[Tensor] = []
        self._sums = sums

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        self.addends.append(x.clone())  # the library may go on to add to x in place
        return x if self._sums is None else self._sums[len(self.addends) - 1].clone()

    def sum_in_place(self, x: Tensor) -> Tensor:
        return x

    def max_in_place(self, x: Tensor) -> Tensor:
        return x


def _stage(
    model: HuggingFaceCausalLM,
    whole: nn.Module,
    layers: tuple[int, int],
    units: tuple[int, int] | None = None,
    ops: _Sums | None = None,
) -> _StageOf:
    """Return a stage with its part of the whole model's weights."""
    weights = dict(whole.named_parameters(remove_duplicate=False))
    stage, parameters = model.build_stage(layers, next(whole.parameters()).dtype, units, ops)
    with torch.no_grad():
        for name, parameter in parameters.items():
            part = model.slices(name, units) if units is not None else None
            parameter.copy_(weights[name] if part is None else part.take(weights[name]))
    return stage, parameters


@torch.no_grad()
def _check_shards(model: HuggingFaceCausalLM) -> None:
    whole = _whole(model, torch.float64)
    keep_float64(whole)
    layers, units = (0, len(model.layer_names)), model.shard_units
    one = _Sums()
    shards, outputs = [], []
    try:
        _, logits = _boundaries(model, whole, {})
        output = _stage(model, whole, layers, (0, units), one)[0](_ids(model), {})
        for part in ((0, 1), (1, units)):
            shards.append(_Sums(one.addends))
            outputs.append(_stage(model, whole, layers, part, shards[-1])[0](_ids(model), {}))
    except Exception as fault:  # as above
        raise _differs(model, f"a shard of its blocks does not run ({_line(fault)})") from None
    sums = [sum(addends) for addends in zip(*(shard.addends for shard in shards), strict=True)]
    joined = outputs[0] if model.tied else torch.cat(outputs, -1)
    for seen, wanted in zip([output, joined, *sums], [logits, logits, *one.addends], strict=True):
        if not bool((seen - wanted).abs().max() <= _SHARD_TOLERANCE * wanted.abs().max()):
            raise _differs(model, "the shards of a block do not sum to the block")
