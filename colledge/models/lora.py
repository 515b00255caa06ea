"""Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685) as PEFT makes them, under the engine's names.

    x ──┬── frozen linear ──────────────── + ──>       PEFT's own layer: its structure, scaling and forward
        └── dropout ── lora_A ── lora_B ───┘           `q_proj.lora_A.weight` here and in PEFT's files

Two things differ from one process running PEFT, so that a plan changes nothing: A begins with values that depend on
the seed and the parameter's name alone, and a dropped element depends on the seed, the step, the row of the batch
and the linear alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from colledge.errors import ModelError, one_line
from colledge.models.generator import generator_of
from colledge.models.layered import BatchRows
from colledge.models.sharding import ShardedBlock, Slice
from colledge.settings import LoraSettings

_ADAPTER = "default"  # PEFT's name for a model's first adapter
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_PEFT_PREFIX = "base_model.model."


def attach_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Put adapters into a whole model on the meta device, in place, and freeze everything that does not train.

    Raises:
        ModelError: A target names no linear, a module to save is not there, or an adapter would lie outside a block.
    """
    from peft import inject_adapter_in_model  # a second to import, and most runs need none

    linears = {name.rpartition(".")[2] for name, child in model.named_modules() if _is_linear(child)}
    asked = settings.model_copy(update={"modules_to_save": ()})
    try:
        with (
            unset_fake_temporarily(),
            warnings.catch_warnings(),
        ):  # PEFT swaps tensors: fake ones do not allow it
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # it finds the right one, and says so
            inject_adapter_in_model(
                peft_config(with_names(asked, linears - _of_the_head(model))),
                model,
                low_cpu_mem_usage=True,
            )
    except ValueError as fault:
        raise ModelError(
            f"PEFT cannot put adapters into this model ({one_line(fault)}).",
            fix=f"name some of {', '.join(sorted(linears))} in lora.targets.",
        ) from None
    layers = dict(adapted_linears(model))
    _check_targets(settings.targets, layers, linears)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name).endswith(_FACTORS))
    for wanted in settings.modules_to_save:
        found = [m for name, m in model.named_modules() if name.endswith(wanted)]  # as PEFT matches
        if not found:
            names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _holds(m)})
            raise ModelError(
                f"lora.modules_to_save: the model has no module {wanted!r}.",
                fix=f"name some of {', '.join(names)}.",
            )
        for module in found:
            module.requires_grad_(True)
    for name, layer in layers.items():
        dtype = (
            layer.get_base_layer().weight.dtype
        )  # which PEFT gives to adapters too, but not on the meta device
        for factors in (layer.lora_A, layer.lora_B):
            factors.to(dtype)
        if settings.dropout:
            layer.lora_dropout[_ADAPTER] = RowDropout(settings.dropout, name)


def with_names(settings: LoraSettings, linears: Iterable[str]) -> LoraSettings:
    """Return settings with these targets in place of all-linear, where there are blocks: PEFT takes not both."""
    if settings.targets != "all-linear" or settings.blocks is None:
        return settings
    return settings.model_copy(update={"targets": tuple(sorted(linears))})


def _of_the_head(model: nn.Module) -> set[str]:
    """Return the name of the linear that makes logits, which all-linear leaves out."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name.rpartition(".")[2] for name, module in model.named_modules() if module is head}


def targets_of(names: Iterable[str]) -> set[str]:
    """Return the names of the linears that adapters of these parameters adapt."""
    return {
        name.removesuffix(factor).rpartition(".")[2]
        for name in names
        for factor in _FACTORS
        if name.endswith(factor)
    }


def peft_config(settings: LoraSettings) -> Any:
    """Return PEFT's configuration of the adapters, as an adapter directory holds it."""
    from peft import LoraConfig

    targets = settings.targets
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        modules_to_save=list(settings.modules_to_save) or None,
        layers_to_transform=list(settings.blocks) if settings.blocks is not None else None,
        task_type="CAUSAL_LM",
    )


def _check_targets(
    targets: Sequence[str] | str | None, layers: Mapping[str, nn.Module], linears: set[str]
) -> None:
    for target in targets if isinstance(targets, tuple) else ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ModelError(
                f"lora.targets: no linear of the model is called {target!r}.",
                fix=f"name some of {', '.join(sorted(linears))}.",
            )


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def adapted_linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers and their paths."""
    for name, child in module.named_modules():
        if hasattr(child, "lora_A"):
            yield name, child


def cut_adapters(block: nn.Module, sharding: ShardedBlock, units: tuple[int, int], num_units: int) -> None:
    """Cut the adapters of a sharded block on the meta device in place: the factor on the side that is cut.

    Args:
        block: A block whose linears are cut.
        sharding: How.
        units: The shard's half-open range of units.
        num_units: The units in all.
    """
    linears = {linear.path: linear for linear in sharding.linears}
    for path, layer in adapted_linears(block):
        linear = linears[path]
        for name, factor in (("lora_A.weight", layer.lora_A), ("lora_B.weight", layer.lora_B)):
            whole = factor[_ADAPTER].weight
            part = linear.slice(name, units, num_units)
            if part is None:
                continue
            factor[_ADAPTER].weight = nn.Parameter(part.take(whole.detach()))
            dropout = layer.lora_dropout[_ADAPTER]
            if not linear.column and isinstance(dropout, RowDropout):
                dropout.columns = (Slice(-1, part.ranges), whole.shape[1])


def plain_name(name: str) -> str:
    """Return a parameter's name without PEFT's wrapping: that of the plain model, or `linear.lora_A.weight`."""
    return name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.", ".")


def is_adapter(name: str) -> bool:
    """Return whether a parameter is an adapter's, by its plain name."""
    return name.endswith(_FACTORS)


def peft_name(name: str) -> str:
    """Return a parameter's name in PEFT's adapter_model.safetensors."""
    return _PEFT_PREFIX + name


def plain_of_peft(name: str) -> str:
    """Return a parameter's name from that in PEFT's adapter_model.safetensors."""
    return name.removeprefix(_PEFT_PREFIX)


def merged(
    name: str, weight: Tensor, values: Mapping[str, Tensor], settings: LoraSettings, transposed: bool
) -> Tensor:
    """Return a weight with its adapter added: W + alpha / rank * B A; one without an adapter as it is.

    Args:
        name: The weight's.
        weight: (outputs, inputs), or the other way round where it is `transposed`, as GPT-2's are.
        values: The adapters', by name.
        settings: The adapters'.
        transposed: Whether the weight is stored as (inputs, outputs).
    """
    linear = name.removesuffix(".weight")
    if f"{linear}.lora_A.weight" not in values:
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    first, second = (values[f"{linear}{factor}"].to(dtype) for factor in _FACTORS)
    change = settings.alpha / settings.rank * (second @ first)
    return (weight + (change.t() if transposed else change)).to(weight.dtype)


class StartingValues(Mapping[str, Tensor]):
    """A model's weights, and the values that its new adapters begin with: B is 0, A as PEFT draws it.

    A is uniform as torch.nn.Linear's weight is (Kaiming: He et al., arXiv 1502.01852), from a generator of its own.

    Args:
        weights: The frozen model's.
        shapes: Of the adapters' parameters, by name.
        seed: The run's.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], seed: int
    ) -> None:
        self._weights, self._shapes, self._seed = weights, shapes, seed

    def __getitem__(self, name: str) -> Tensor:
        """Return the values of one parameter.

        Raises:
            KeyError: There is no such parameter.
        """
        if name not in self._shapes:
            return self._weights[name]
        values = torch.zeros(self._shapes[name])
        if name.endswith(".lora_A.weight"):
            bound = 1 / math.sqrt(self._shapes[name][1])
            values.uniform_(-bound, bound, generator=generator_of(self._seed, name))
        return values

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a parameter, without reading it."""
        return name in self._shapes or name in self._weights

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all parameters."""
        yield from self._weights
        yield from self._shapes

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._weights) + len(self._shapes)


class RowDropout(nn.Module):
    """Dropout (Srivastava et al., 2014) that drops the same elements under any plan.

    Each row of the batch has a mask of its own, drawn from the seed, the step, the row and the linear's path.
    `rows` are those of the next forward; with None nothing is dropped: that is evaluation.

    Args:
        probability: Of an element to be dropped.
        path: The linear's, in the whole model.
    """

    def __init__(self, probability: float, path: str) -> None:
        super().__init__()
        self.path = path
        self.columns: tuple[Slice, int] | None = None  # of a shard: its columns, of how many
        self._probability = probability
        self.rows: BatchRows | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x (rows, sequence, features) with elements dropped and the rest scaled up."""
        if self.rows is None:
            return x
        part, width = self.columns or (None, x.shape[-1])
        masks = []
        for row in self.rows.indices:
            generator = generator_of(self.rows.seed, self.rows.step, row, self.path)
            kept = torch.rand((*x.shape[1:-1], width), generator=generator)
            kept = (kept >= self._probability).to(x.dtype)
            masks.append(kept if part is None else part.take(kept))
        return x * torch.stack(masks).to(x.device) / (1 - self._probability)
