"""float64 means float64: what the library would round to float32 on its way (norms, softmax) keeps its precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _NoRounding(TorchFunctionMode):
    """Under this mode no operator turns a float64 tensor into a float32 one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.full) and args and isinstance(args[-1], float):
            kwargs.setdefault("dtype", torch.float64)  # such as the smallest number that there is
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def keep_float64(model: nn.Module) -> None:
    """Make a model's forward compute in float64 throughout, in place; the code that runs stays the library's.

    The library's norms and its eager attention compute in float32 whatever they are given, which would limit a
    float64 run to the precision of float32.
    """
    forward = model.forward

    def in_float64(*args: Any, **kwargs: Any) -> Any:
        with _NoRounding():
            return forward(*args, **kwargs)

    setattr(model, "forward", in_float64)  # noqa: B010 - a method for mypy
