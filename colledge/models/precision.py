"""Narrower numbers where the user asks for them: frozen weights held in bfloat16, and computing in bfloat16.

held       frozen matrices lie in memory in bfloat16; for each product they are widened, and the wide copy goes
mixed      torch.autocast: products in bfloat16, weights, gradients, optimizer and what is passed on as they are
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HELD = torch.bfloat16
BUFFER = "_is_saved_buffer"  # on parameters that the library keeps as buffers: they stay as they are


def is_held(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is one of those that are held: a frozen matrix."""
    return not parameter.requires_grad and parameter.dim() == 2 and not hasattr(parameter, BUFFER)


def hold_frozen(model: nn.Module) -> None:
    """Turn a model's frozen matrices into bfloat16 in place, keeping ties; it computes under `WideProducts`."""
    held: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_held(parameter):
                if id(parameter) not in held:
                    held[id(parameter)] = nn.Parameter(parameter.detach().to(HELD), requires_grad=False)
                setattr(module, name, held[id(parameter)])


class WideProducts(TorchFunctionMode):
    """Under this mode products and look-ups with held weights are of a wider type.

    Args:
        dtype: Of activations.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return func(*args, **kwargs).to(self._dtype)
        if func is F.linear and _differ(args[0], args[1]):
            return _product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        if func is torch.addmm and _differ(args[1], args[2]):  # bias + x W: how GPT-2's linears compute
            return _product(args[1], args[2].t(), args[0])
        return func(*args, **kwargs)


def _differ(x: Tensor, weight: Tensor) -> bool:
    """Return whether a weight is to be widened; under autocast the library narrows x instead."""
    return weight.dtype is HELD and x.dtype is not HELD and not torch.is_autocast_enabled(x.device.type)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _WidenedProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _WidenedProduct(torch.autograd.Function):
    """x W^T of a frozen W of a narrower type; between forward and backward only the narrow one is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None
