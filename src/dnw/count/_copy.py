"""What is run to count: a copy of the model without its weights, and of its inputs without their numbers.

Contract: nothing here changes the model or the inputs. Numbers that are not whole are left out (meta tensors), so that a copy
of any model is cheap; whole numbers and booleans stay, because control flow may depend on them (lengths, masks, positions).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dnw._wiring.parameters import _INNER_WRAPPERS, unwrap_model

_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def inner_model(model: nn.Module) -> nn.Module:
    """The user's model inside the wrappers of compile, parallel training, averaging and checkpointing."""
    while (inner := _inside(unwrap_model(model))) is not model:
        model = inner
    return model


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by each of its plain names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield _INNER_WRAPPERS.sub("", name).strip("."), parameter


def copied(model: nn.Module, inputs: Any, *, empty: bool) -> tuple[nn.Module, Any]:
    """The model inside all wrappers, and inputs for it.

    Args:
        model: any module.
        inputs: containers of any kind, with tensors in them.
        empty: whether numbers that are not whole are left out. Else the copy shares the model's parameters.

    Raises:
        ValueError: a parameter has no shape yet, or a module is TorchScript.
    """
    model = inner_model(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is TorchScript, which has no operations to count; count what it was made of"
            )
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name!r} has no shape yet; run one batch through the model before counting it")
        memo[id(parameter)] = nn.Parameter(_emptied(parameter), requires_grad=False) if empty else parameter
    for buffer in model.buffers():
        memo[id(buffer)] = _emptied(buffer) if empty else buffer.clone()
    modules = list(model.modules())
    own = [module for module in modules if _inside(module) is module]
    memo |= {id(module): object.__new__(type(module)) for module in own}
    for module in modules:
        inner = module
        while (further := _inside(inner)) is not inner:
            inner = further
        memo[id(module)] = memo[id(inner)]
    with _Copying(empty):
        for module in own:
            vars(memo[id(module)]).update({k: _attribute(k, v, memo) for k, v in vars(module).items()})
        inputs = _copied_if_possible(inputs, memo)
    return memo[id(model)], inputs


class _Copying(TorchFunctionMode):
    """Lets tensors be copied wherever they stand, also those that are no leaves."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self._empty = empty

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _emptied(tensor) if self._empty else tensor.detach().clone()
        return memo[id(tensor)]


def _emptied(tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.detach().clone()
    if tensor.layout is not torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, device="meta")
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _attribute(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """An attribute of a module, copied."""
    if name == "_compiled_call_impl":
        return None
    if name.endswith("_hooks") and isinstance(value, dict):
        # those of sharded training would gather the parameters, which have their whole shape here
        return type(value)((k, _copied_if_possible(v, memo)) for k, v in value.items() if not _is_of_sharding(v))
    return _copied_if_possible(value, memo)


def _copied_if_possible(value: Any, memo: dict[int, Any]) -> Any:
    """A copy; the thing itself where it cannot be copied (locks, process groups, generators)."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever a foreign class raises
        return value


def _is_of_sharding(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def _inside(module: nn.Module) -> nn.Module:
    children = dict(module.named_children())
    return next((children[name] for name in _INSIDE if name in children), module)
