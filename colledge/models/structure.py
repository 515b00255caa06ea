"""Where the layers of a causal model are, found from its modules and not from its name.

    causal model                 the order in which its forward calls modules decides whose parameters are whose
      base model (may be nested)
        input embedding ...      called before the first block: layer "embedding"
        one list of blocks       layers "block.0" ... "block.N-1"
        final norm ...           the rest: layer "head"
      head
      towers ...               lists of blocks that text alone never runs, and what belongs to them: no layer's

What does not fit is refused, naming the modules. Whether the parts give the whole is for `probe` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from colledge.errors import ModelError

_FIX = "use a decoder-only causal model of one list of blocks, such as Llama, Qwen3, Gemma 3 or GPT-2."

_Answer = TypeVar("_Answer")
Unknown: TypeAlias = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Structure:
    """Paths of modules in a causal model.

    Attributes:
        blocks: The list of blocks.
        num_blocks: How many there are.
        before: The modules with parameters that run before the blocks.
        after: The other modules with parameters.
        embedding: The input embedding, one of `before`.
        head: The linear that gives the logits, one of `after`.
        boundary: The shape of what goes from block to block, for a token: mostly (width,).
        num_outputs: A block returns a tuple of so many values, hidden states first; None: hidden states only.
        alibi: The blocks are given ALiBi's slopes, which belong to heads.
        idle: The modules with parameters that text alone never runs, such as a vision tower.
    """

    blocks: str
    num_blocks: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    embedding: str
    head: str
    boundary: tuple[int, ...]
    num_outputs: int | None
    alibi: bool
    idle: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """The blocks, the embedding and the head."""
        return self.num_blocks + 2

    def blocks_of(self, layers: tuple[int, int]) -> range:
        """Return the indices of the blocks in a half-open range of layers."""
        return range(max(layers[0] - 1, 0), min(layers[1] - 1, self.num_blocks))

    def modules_of(self, layer_index: int) -> tuple[str, ...]:
        """Return the paths of a layer's modules."""
        if layer_index == 0:
            return self.before
        return self.after if layer_index > self.num_blocks else (f"{self.blocks}.{layer_index - 1}",)


def find_structure(model: nn.Module) -> Structure:
    """Return where the layers of a causal model on the meta device are.

    Raises:
        ModelError: It is not embeddings, one list of blocks, and a head; the message names what was found.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = _path_of(model, paths, "input"), _path_of(model, paths, "output")
    blocks, num_blocks, runs = _list_of_blocks(model)
    if embedding is None or head is None:
        raise _refusal(model, f"no input embedding and no head beside {blocks!r}")
    parts = _parts(model, blocks)
    idle = () if runs is None else tuple(path for path in parts if not _is_run(model, path, runs))
    parts = tuple(path for path in parts if path not in idle)
    called, block = _trace(model, parts, blocks)
    before = tuple(path for path in parts if _within(embedding, path) or path in called)
    after = tuple(path for path in parts if path not in before)
    if not any(_within(head, path) for path in after):
        raise _refusal(model, f"the head {head!r} inside another module")
    alibi = block.kwargs.get("alibi") is not None
    return Structure(
        blocks, num_blocks, before, after, embedding, head, block.boundary, block.num_outputs, alibi, idle
    )


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a module is called with, positional or by keyword."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden_states(
    x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module's call with other hidden states."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def fix_positions(model: nn.Module) -> None:
    """Leave "dynamic" rotary positions as they are made, in place.

    They change where rows are longer than the positions that the model has, which rows of training never are; to find
    that out the library would look at values.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and "dynamic" in kinds:
            setattr(module, "rope_type", "default")  # noqa: B010 - which the forward looks at
        elif isinstance(kinds, dict):
            fixed = {layer: "default" if "dynamic" in str(kind) else kind for layer, kind in kinds.items()}
            setattr(module, "rope_type", fixed)  # noqa: B010 - as above


def _refusal(model: nn.Module, seen: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be cut into layers: {seen}.", fix=_FIX)


def _path_of(model: nn.Module, paths: dict[int, str], side: str) -> str | None:
    try:
        module = getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
    return paths.get(id(module))


def _within(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}.")


def _is_run(model: nn.Module, path: str, runs: set[str]) -> bool:
    """Return whether text runs a module, or one of those in it, that has parameters."""
    inside = model.get_submodule(path).named_modules(prefix=path)
    return any(
        name in runs for name, module in inside if next(module.parameters(recurse=False), None) is not None
    )


def _list_of_blocks(model: nn.Module) -> tuple[str, int, set[str] | None]:
    """Return the list of blocks, how many they are, and, where there are several lists, which modules text runs."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and next(module.parameters(), None) is not None:
            lists[path] = module
    runs = _runs(model) if len(lists) > 1 else None
    if runs is not None:
        lists = {path: blocks for path, blocks in lists.items() if f"{path}.0" in runs}
    if len(lists) != 1:
        found = ", ".join(
            f"{path}: {len(blocks)} {type(blocks[0]).__name__}" for path, blocks in lists.items()
        )
        raise _refusal(model, f"wanted one list of blocks, found {found or 'none'}")
    ((path, blocks),) = lists.items()
    return path, len(blocks), runs


def _without_values(run: Callable[[Unknown], _Answer]) -> _Answer:
    """Return what a forward gives that runs on shapes alone; sizes that only values give are then unknown ones.

    Args:
        run: Runs it; told what is raised where it asks for an unknown size.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return run(())
    except (DataDependentOutputException, DynamicOutputShapeException):
        # 35 MB that few models need: experts take as many rows as are theirs
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

        sizes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes):
            return run((GuardOnDataDependentSymNode,))


def _runs(model: nn.Module) -> set[str] | None:
    """Return the modules that a forward of text runs; None where it cannot be run without values."""
    found: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: found.add(path))
        for path, module in model.named_modules()
    ]
    try:
        _without_values(lambda _: model(input_ids=_ids(), use_cache=False))
    except Exception:  # whatever the library raises: the refusal then shows all lists
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _parts(model: nn.Module, blocks: str) -> tuple[str, ...]:
    """Return the modules with parameters beside the list of blocks; refuse parameters that are in none."""
    names = blocks.split(".")
    parts: list[str] = []
    for depth in range(len(names)):
        parent = ".".join(names[:depth])
        module = model.get_submodule(parent)
        prefix = f"{parent}." if parent else ""
        own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
        if own:
            raise _refusal(model, f"parameters outside its layers: {', '.join(own[:4])}")
        parts += [
            prefix + name
            for name, child in module.named_children()
            if name != names[depth] and next(child.parameters(), None) is not None
        ]
    return tuple(parts)


class _FirstBlock(Exception):
    """The trace has come to the first block, whose call this is."""

    boundary: tuple[int, ...]
    num_outputs: int | None = None

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.positional, self.kwargs = args, kwargs
        self.boundary = tuple(hidden_states(args, kwargs).shape[2:])


def _trace(model: nn.Module, parts: tuple[str, ...], blocks: str) -> tuple[set[str], _FirstBlock]:
    """Run the model up to its first block, and that one, without values; also return the parts that ran before."""
    called: set[str] = set()
    first = model.get_submodule(f"{blocks}.0")

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstBlock(args, kwargs)

    def reach() -> _FirstBlock:
        hooks = [first.register_forward_pre_hook(stop, with_kwargs=True)]
        for path in parts:
            note = model.get_submodule(path).register_forward_pre_hook
            hooks.append(note(lambda _module, _args, path=path: called.add(path)))
        try:
            model(input_ids=_ids(), use_cache=False)
        except _FirstBlock as reached:
            return reached
        finally:
            for hook in hooks:
                hook.remove()
        raise _refusal(model, f"its forward does not run {blocks}.0")

    def run(unknown: Unknown) -> _FirstBlock:
        block = reach()
        with suppress(*unknown):  # then it gives hidden states only, until the probe sees otherwise
            output = first(*block.positional, **block.kwargs)
            block.num_outputs = None if isinstance(output, Tensor) else len(output)
        return block

    try:
        return called, _without_values(run)
    except ModelError:
        raise
    except Exception as fault:
        line = shorten(f"{type(fault).__name__}: {fault}", 200, placeholder=" ...")
        raise _refusal(model, f"its forward does not run without values ({line})") from None


def _ids() -> Tensor:
    return torch.zeros((2, 8), dtype=torch.long, device="meta")
