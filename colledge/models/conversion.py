"""A model's weights by the names that they have in memory, read from files that may call and cut them otherwise.

    on disk                                       in memory
    embed_out.weight                        ->    lm_head.weight                    GPT-NeoX
    h.0.ln_1.weight                         ->    transformer.h.0.ln_1.weight       the hub's gpt2
    ...experts.0.w1.weight, .1.w1.weight ...->    ...experts.gate_up_proj           Mixtral: one tensor, three axes
    lm_head.weight alone                    ->    both names of a tied weight

Names and operations are the library's own, as its from_pretrained applies them; only which tensors are in memory is
decided here: those that make the weight that was asked for. Which weights there are is known from the files' headers.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colledge.errors import ModelError, said_by
from colledge.models.weights import SafetensorsDirectory, has_weights

_SCALES = re.compile(
    r"(^|[._:])(weight_scale(_inv|_2)?|scale_inv|input_scale|weight_zero_point|weight_packed|qweight|qzeros|scales|"
    r"g_idx|absmax|quant_map|SCB|blocks|qdata|quant_state\..*)$"
)


@dataclass(frozen=True)
class _Group:
    """Tensors on disk that together make weights in memory, of which `first` is one.

    `sources` are names on disk, and the patterns that they match of `transform`, the library's; None gives a new name
    at most.
    """

    first: str
    sources: tuple[tuple[str, str], ...]
    transform: Any


class ModelWeights(Mapping[str, Tensor]):
    """The weights of a model's folder by their names in memory; each is read when it is asked for, and must be finite.

    `unexpected` are names on disk that belong to nothing in the model, without those that the library leaves out.

    Args:
        directory: The model's.
        skeleton: The model on the meta device.

    Raises:
        ModelError: There are no weights, or by the files' headers one is missing, of another shape or quantised.
    """

    def __init__(self, directory: Path, skeleton: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.directory = directory
        self._model: Any = skeleton
        check_not_quantised(directory, self._model.config)
        self._files = SafetensorsDirectory(directory, _stem(directory, self._model.config))
        self._wanted: dict[str, Tensor] = self._model.state_dict()
        transforms = get_model_conversion_mapping(self._model)
        groups, unmatched = self._match(transforms)
        self._used = [transform for transform in transforms if transform.was_used()]
        self._check_types(groups, unmatched)
        self._groups: dict[str, _Group] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for group in groups:
            for name, tensor in self._convert_headers(group).items():
                self._groups[name], self._shapes[name] = group, tuple(tensor.shape)
        self._tied = self._find_tied()
        self._check_names()
        self._check_shapes()
        self.unexpected = self._without_ignored(unmatched)
        self._kept: tuple[_Group, dict[str, Tensor]] | None = (
            None  # what was made beside the last that was asked for
        )

    # -- from disk -------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """Return one weight.

        Raises:
            KeyError: There is no such weight.
            ModelError: A file is damaged, or the weight holds a number that is none.
        """
        name = self._tied.get(name, name)
        group = self._groups[name]
        if self._kept is None or self._kept[0] is not group:
            self._kept = (group, self._convert(group, self._files.read(s for s, _ in group.sources)))
        tensor = self._kept[1][name]
        if len(self._kept[1]) == 1:
            self._kept = None
        return tensor

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a weight, without reading it."""
        return name in self._groups or name in self._tied

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the weights, both of a tied one."""
        yield from (name for name in self._wanted if name in self)

    def __len__(self) -> int:
        """Return the number of names."""
        return sum(1 for _ in self)

    @property
    def num_bytes(self) -> int:
        """The bytes of the files' tensors."""
        sources = (source for group in set(self._groups.values()) for source, _ in group.sources)
        return sum(self._files.headers[source].num_bytes for source in sources)

    def check_values(self) -> None:
        """Read every weight's tensors once.

        Raises:
            ModelError: A file is damaged, or a weight holds a number that is none.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # enough for what memory is read at; on busy cores several wait for each other
        try:
            for group in set(self._groups.values()):
                self._files.read(source for source, _ in group.sources)
        finally:
            torch.set_num_threads(threads)

    def _match(self, transforms: list[Any]) -> tuple[list[_Group], list[str]]:
        """Return which tensors on disk make which weights, and the tensors that make none."""
        from transformers import core_model_loading as library

        renamings = [one for one in transforms if isinstance(one, library.WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, library.WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix = self._model.base_model_prefix
        found: dict[str, _Group] = {}
        unmatched = []
        for source in sorted(self._files, key=library.dot_natural_key):
            name, pattern = library.rename_source_key(source, renamings, converters, prefix, self._wanted)
            if name not in self._wanted and source in self._wanted:
                name, pattern = source, None
            if name not in self._wanted:
                unmatched.append(source)
                continue
            before = found.get(name)
            if before is None:
                transform = by_pattern[pattern] if pattern is not None else None
                found[name] = _Group(name, ((source, pattern or ""),), transform)
            elif before.transform is not None:
                found[name] = _Group(name, (*before.sources, (source, pattern or "")), before.transform)
        return list(found.values()), unmatched

    def _convert(self, group: _Group, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that a group's tensors make.

        Raises:
            ModelError: The tensors do not fit together.
        """
        if group.transform is None:
            return {group.first: stored[group.sources[0][0]]}
        transform = copy.deepcopy(group.transform)
        for source, pattern in group.sources:
            transform.add_tensor(group.first, source, pattern, stored[source])
        try:
            made = transform.convert(group.first, model=self._model, config=self._model.config)
        except Exception as fault:  # of the library's operations, which check nothing themselves
            names = ", ".join(source for source, _ in group.sources[:3])
            raise ModelError(
                f"{self.directory}: {names} do not make {group.first!r} ({said_by(fault)}).",
                fix="copy the model again.",
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _convert_headers(self, group: _Group) -> dict[str, Tensor]:
        """Return what a group makes, on the meta device."""
        headers = {source: self._files.headers[source] for source, _ in group.sources}
        return self._convert(
            group,
            {
                s: torch.empty(header.shape, dtype=header.dtype, device="meta")
                for s, header in headers.items()
            },
        )

    def _find_tied(self) -> dict[str, str]:
        """Return the names that are stored under another one."""
        tied: dict[str, str] = getattr(self._model, "all_tied_weights_keys", {})
        pairs = [
            pair for copy_name, source in tied.items() for pair in ((copy_name, source), (source, copy_name))
        ]
        return {name: other for name, other in pairs if name not in self._groups and other in self._groups}

    def stores_both(self, name: str, other: str) -> bool:
        """Return whether two names of one weight have a tensor each, which may differ."""
        return name in self._groups and other in self._groups

    @property
    def ties(self) -> bool:
        """Whether the model has weights of two names."""
        return bool(getattr(self._model, "all_tied_weights_keys", {}))

    def notes(self) -> tuple[str, ...]:
        """Return in words what of the files is not in the model."""
        if not self.unexpected:
            return ()
        return (
            f"{self.directory}: {len(self.unexpected)} tensor(s) of its files are no weights of the model and "
            f"are left out: {_some(list(self.unexpected))}.",
        )

    # -- to disk ---------------------------------------------------------------------------------------------------

    def on_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights as this folder's files call and cut them, where all of a group are among them."""
        from transformers.core_model_loading import revert_weight_conversion

        self._model._weight_conversions = self._used
        written: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return written

    def rest(self, written: Container[str]) -> Iterator[dict[str, Tensor]]:
        """Yield the weights that are not written yet, those together that are from the same tensors on disk."""
        copies = getattr(self._model, "all_tied_weights_keys", {})
        together = defaultdict(list)
        for name, group in self._groups.items():
            if name in self._wanted and name not in written and name not in copies:
                together[group].append(name)
        for names in together.values():
            yield {name: self[name] for name in names}

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_types(self, groups: list[_Group], unmatched: list[str]) -> None:
        scales = [name for name in unmatched if _SCALES.search(name)]
        if scales:
            raise _quantised(self.directory, f"{_some(scales)} go with quantised weights")
        for group in groups:
            floating = self._wanted[group.first].is_floating_point()
            for source, _ in group.sources:
                header = self._files.headers[source]
                if header.dtype is None or header.dtype.is_floating_point < floating:
                    raise _quantised(self.directory, f"{source!r} is stored as {header.stored}")

    def _check_names(self) -> None:
        missing = [name for name in self._wanted if name not in self]
        if missing:
            raise ModelError(
                f"{self.directory}: {len(missing)} of the model's {len(self._wanted)} weights are in none of its "
                f"files: {_some(missing)}.",
                fix="copy the model again; its files are not whole, or of another model than config.json.",
            )

    def _check_shapes(self) -> None:
        for name, shape in self._shapes.items():
            wanted = self._wanted.get(name)
            if wanted is not None and tuple(wanted.shape) != shape:
                raise ModelError(
                    f"{self.directory}: {name!r} has shape {list(shape)}, config.json wants {list(wanted.shape)}.",
                    fix="copy the model again; its files and its config.json are of different models.",
                )

    def _without_ignored(self, unmatched: list[str]) -> tuple[str, ...]:
        from transformers.utils.loading_report import LoadStateDictInfo

        info = LoadStateDictInfo(set(), set(unmatched), set(), [], {}, set())
        self._model._adjust_missing_and_unexpected_keys(info)
        return tuple(name for name in unmatched if name in info.unexpected_keys)


def _stem(directory: Path, config: Any) -> str:
    """Return what the files are called, which a configuration may say.

    Raises:
        ModelError: It names no file of the folder.
    """
    name = getattr(config, "transformers_weights", None) or "model.safetensors"
    found = re.fullmatch(r"([^/\\]+)\.safetensors(\.index\.json)?", name) if isinstance(name, str) else None
    if found is None:
        raise ModelError(
            f"{directory}/config.json: transformers_weights is {name!r}, which is no .safetensors of the folder.",
            fix="mend it, or leave it out.",
        )
    return found.group(1)


def check_not_quantised(directory: Path, config: Any) -> None:
    """Check that a configuration speaks of no quantised weights.

    Raises:
        ModelError: It does; the message names the method.
    """
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if settings is not None:
        values = settings if isinstance(settings, dict) else {}
        method = values.get("quant_method") or next((key for key in values if "bit" in key), "unknown")
        raise _quantised(directory, f"config.json has a quantization_config, of the method {method}")


def stores_weights(directory: Path, skeleton: nn.Module) -> bool:
    """Return whether a model's folder holds its weights, whatever its configuration calls their files.

    Raises:
        ModelError: The configuration names no file of the folder.
    """
    return has_weights(directory, _stem(directory, skeleton.config))


def stores_two_values(directory: Path, skeleton: nn.Module, tied: Mapping[str, str]) -> bool:
    """Return whether a folder stores two unlike values for a weight that its configuration ties.

    transformers then keeps them apart, whatever the configuration says. A folder without weights stores none.

    Args:
        directory: The model's.
        skeleton: The model on the meta device.
        tied: The names of tied weights, and those that they share values with.

    Raises:
        ModelError: The folder's weights are damaged.
    """
    if not stores_weights(directory, skeleton):
        return False
    weights = ModelWeights(directory, skeleton)
    apart = ((name, source) for name, source in tied.items() if weights.stores_both(name, source))
    return any(not torch.equal(weights[name], weights[source]) for name, source in apart)


def _quantised(directory: Path, seen: str) -> ModelError:
    return ModelError(
        f"{directory}: {seen}; colledge trains weights that are not quantised.",
        fix="give the model's bfloat16 or float32 release, or dequantise it with its library and save it anew.",
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
