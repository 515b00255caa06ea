"""Whether a model's parts give the whole, tried on a small copy of it with random weights before anything is planned.

Structure says where a model can be cut. It cannot promise that nothing else goes from layer to layer, such as keys
and values that blocks share, or inputs of every block that are made from the token ids. So a small model of the same
kind (the first blocks, so many that every kind of block is among them; few heads of the same width; narrow MLPs; a
small vocabulary) is cut after every layer, with and without padding: every boundary and every gradient must be what
the library's own model gives, bit for bit. Where blocks can be sharded, the shards' sums must be the whole's too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from colledge.errors import ModelError
from colledge.models.float64 import keep_float64
from colledge.models.small import small_configs, unnumbered
from colledge.models.structure import hidden_states

if TYPE_CHECKING:
    from colledge.models.huggingface import HuggingFaceCausalLM

_SHARD_TOLERANCE = 1e-10  # of float64, relative: a sum in parts rounds otherwise than the whole one
_NEEDED = {"block.0": "token ids or what is made of them", "head": "what embedding or blocks hold"}
_FIX = "use a model whose blocks pass on nothing but hidden states, such as Llama, Qwen3, Gemma 3 or GPT-2."

_NOT_MADE = (
    ModelError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    ImportError,
)

_StageOf: TypeAlias = tuple[nn.Module, dict[str, nn.Parameter]]  # and its parameters


def check_parts(model: HuggingFaceCausalLM) -> frozenset[str]:
    """Check on a small copy that a model's layers, and the shards of its blocks, together give the model.

    Returns:
        The parameters that no loss reaches in the library's own model either, such as those that choose experts.

    Raises:
        ModelError: They do not, and after which layer; or no small copy can be made, so that nothing shows it.
    """
    small, whole = _small_copy(model)
    layers = pairwise(range(len(small.layer_names) + 1))
    stages = [_stage(small, whole, layer) for layer in layers]
    unreached: set[str] = set()
    for context in _contexts():
        unreached = _check_stages(small, whole, stages, context)
    if small.shard_units > 1:
        _check_shards(small)
    patterns = {unnumbered(name) for name in unreached}
    names = (name for index in range(len(model.layer_names)) for name in model.layer_parameters(index))
    return frozenset(name for name in names if unnumbered(name) in patterns)


def _small_copy(model: HuggingFaceCausalLM) -> tuple[HuggingFaceCausalLM, nn.Module]:
    """Return a small model of the same kind and the library's own, with values.

    Raises:
        ModelError: None can be made.
    """
    why = "it has other parameters than the model"
    for config in small_configs(model):
        try:
            small = type(model)(config)
            whole = _whole(small, torch.float32)
            whole(input_ids=_ids(small), use_cache=False)
        except _NOT_MADE as fault:
            why = _line(fault)
            continue
        enough = len(small.layer_names) >= min(
            len(model.layer_names), 4
        )  # for something to pass between blocks
        if enough and _parameter_names(small) == _parameter_names(model)[: len(small.layer_names) - 2]:
            return small, whole
    kind = model.config.model_type
    raise ModelError(f"no small copy of this {kind!r} can be made to try its cuts on ({why}).")


def _line(fault: Exception) -> str:
    said = getattr(fault, "message", f"{type(fault).__name__}: {fault}")
    return shorten(said.rstrip("."), 200, placeholder=" ...")


# -- the small copy ------------------------------------------------------------------------------------------------


def _parameter_names(model: HuggingFaceCausalLM) -> list[set[str]]:
    """Return the names of each block's parameters, without numbers: a block may have lists with an entry a head."""
    layers = (model.layer_parameters(index) for index in range(1, len(model.layer_names) - 1))
    return [{unnumbered(name) for name in parameters} for parameters in layers]


def _whole(model: HuggingFaceCausalLM, dtype: torch.dtype) -> nn.Module:
    """Return the library's own model, with weights that leave no module without effect."""
    whole: nn.Module = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config), dtype=dtype, trust_remote_code=False
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in _weights(whole).values():
            if weight.is_floating_point():
                noise = torch.randn(weight.shape, generator=generator, dtype=dtype)
                weight.add_(noise.to(weight.dtype), alpha=0.05)
    return whole


def _weights(whole: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and the buffers that are saved with it, tied ones under each name."""
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    return {name: parameters.get(name, tensor) for name, tensor in whole.state_dict(keep_vars=True).items()}


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
) -> set[str]:
    before = {name: weight.detach().clone() for name, weight in _weights(whole).items()}
    boundaries, logits = _boundaries(model, whole, context)
    changed = [name for name, weight in _weights(whole).items() if not torch.equal(weight, before[name])]
    if changed:
        raise _differs(model, f"{changed[0]} changes as the model runs")
    if len(boundaries) != len(model.layer_names) - 1:
        raise _differs(model, "text alone does not run each of its blocks, or runs one more than once")
    whole.zero_grad()
    torch.autograd.backward(logits.square().sum())
    x = _ids(model)
    for layer, (stage, _), wanted in zip(model.layer_names, stages, [*boundaries, logits], strict=True):
        stage.zero_grad()
        try:
            x = stage(x, context)
        except Exception as fault:  # whatever the library raises, the cut is what made it do so
            more = _NEEDED.get(layer, "what earlier blocks make")
            raise _differs(
                model, f"{layer} alone does not run; beside hidden states it needs {more} ({_line(fault)})"
            ) from None
        if not torch.equal(x, wanted):
            if not torch.equal(_boundaries(model, whole, context)[1], logits):
                raise _differs(model, "it draws random numbers as it runs, so that no two runs are alike")
            seen = f"{layer} alone does not give what it gives in the whole model"
            raise _differs(model, f"{seen}, where something beside hidden states comes to it")
    torch.autograd.backward(x.square().sum())
    gradients: dict[str, Tensor] = {}
    unreached: set[str] = set()
    for name, parameter in (item for _, parameters in stages for item in parameters.items()):
        if parameter.grad is None:
            continue
        name = model.tied.get(name, name)
        gradients[name] = parameter.grad if name not in gradients else gradients[name] + parameter.grad
    for name, parameter in whole.named_parameters():
        if name.startswith(tuple(f"{path}." for path in model.structure.idle)):
            continue
        if parameter.grad is None and name not in gradients:
            unreached.add(name)
        elif (
            parameter.grad is None
            or name not in gradients
            or not torch.equal(gradients[name], parameter.grad)
        ):
            raise _differs(model, f"{name} has another gradient than in the whole model")
    return unreached


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
    weights = _weights(whole)
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
