"""The products of one run, by the parameter that takes part, and the run itself as a list of operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

OPERANDS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.addbmm: (1, 2),
    aten.mv: (0, 1),
    aten.addmv: (1, 2),
    aten.dot: (0, 1),
    aten.convolution: (0, 1),
    aten._trilinear: (0, 1, 2),
}
"""Which arguments are multiplied, where others are added; of all other products it is all of them."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation that is more than a view.

    Attributes:
        func: what was called, of ``torch.ops.aten``.
        args, kwargs: with what.
        outputs: the tensors that it made or wrote to.
        products: multiply-adds.
        owner: the parameter that they are counted for, or the module; empty where there are no products or for the model.
        is_constant: whether parameters and buffers alone were multiplied.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    products: int
    owner: str
    is_constant: bool

    @property
    def sources(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [*tensors((self.args, self.kwargs))]

    @property
    def operands(self) -> list[Tensor]:
        """The tensors that are multiplied."""
        return _operands(self.func, self.args, self.kwargs)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the schema."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name and i < len(self.args):
                return self.args[i]
        return self.kwargs.get(name, default)


class Ledger(TorchDispatchMode):
    """Counts multiply-adds while it is active.

    Args:
        model: whose parameters take part.
        keep_run: whether to keep the operations too, and with them all tensors of the run.
    """

    def __init__(self, model: nn.Module, keep_run: bool) -> None:
        super().__init__()
        self.products: dict[str, int] = {}
        self.modules: list[str] = []
        self.run: list[Operation] = []
        self.is_opaque = False
        """Whether there is more to the run than its operations show: elements that have no address each (sparse tensors), or
        numbers that the program read."""
        self._keep_run = keep_run
        # what is made of parameters and buffers alone (casts, masked or normalised weights) is known by its storage and kept,
        # so that the storage is not another's later
        self._weights: dict[int, tuple[Tensor, str | None]] = {storage(b): (b, None) for b in model.buffers()}
        self._weights |= {storage(p): (p, n) for n, p in model.named_parameters()}

    def leave(self, *_: Any) -> None:
        """A forward hook: the module that was running has ended."""
        self.modules.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet not in _PRODUCTS and hasattr(func, "decompose"):
            with self:  # in inference mode composite operations come whole
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = _without_numbers(func, args, kwargs)
        self._note(func, packet, args, kwargs, out)
        return out

    def _note(self, func: Any, packet: Any, args: tuple, kwargs: dict, out: Any) -> None:
        given, made = [*tensors((args, kwargs))], [*tensors(out)]
        is_strided = all(t.layout is torch.strided for t in (*given, *made))
        reads = torch.Tag.data_dependent_output in getattr(func, "tags", ()) and any(t.is_floating_point() for t in given)
        self.is_opaque |= reads or not is_strided
        written = _written(func, args, kwargs)
        if is_strided and not written and made and {storage(t) for t in made} <= {storage(t) for t in given}:
            return  # a view
        products, owner, is_constant = 0, "", False
        if packet in _PRODUCTS:
            operands = _operands(func, args, kwargs)
            owners = (self._weights[storage(t)][1] for t in operands if storage(t) in self._weights)
            owner = next((name for name in owners if name is not None), self.modules[-1] if self.modules else "")
            is_constant = all(storage(t) in self._weights for t in operands)
            products = _PRODUCTS[packet](*args, **kwargs, out_val=out)
            self.products[owner] = self.products.get(owner, 0) + products
        elif given and not written and all(storage(t) in self._weights for t in given):
            known = [(t, self._weights[storage(t)][1]) for t in given]
            for tensor in made:
                name = next((n for t, n in known if n is not None and t.numel() == tensor.numel()), None)
                self._weights.setdefault(storage(tensor), (tensor, name))
        if self._keep_run and is_strided:
            outputs = tuple({id(t): t for t in (*made, *written)}.values())
            self.run.append(Operation(func, args, kwargs, outputs, products, owner, is_constant))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in containers and objects of any kind."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif not isinstance(value, (str, bytes, int, float, nn.Module, type)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                inside = [*value.values()]
            else:
                inside = [*value] if isinstance(value, (tuple, list, set)) else [*getattr(value, "__dict__", {}).values()]
            for item in inside:
                yield from walk(item)

    yield from walk(value)


def storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage, as long as it lives."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _operands(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    positions = OPERANDS.get(getattr(func, "_overloadpacket", func))
    return [*tensors((args, kwargs))] if positions is None else [args[i] for i in positions]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    values = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(schema.arguments)]
    return [t for a, v in values if a.alias_info is not None and a.alias_info.is_write for t in tensors((v,))]


def _without_numbers(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operation; where a meta tensor takes part, the others lose their numbers for it."""
    if not any(t.is_meta for t in tensors((args, kwargs))):
        return func(*args, **kwargs)
    originals: dict[int, Tensor] = {}

    def emptied(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided:
            twin = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
            originals[id(twin)] = value
            return twin
        return type(value)(map(emptied, value)) if type(value) in (list, tuple) else value

    kwargs = {k: emptied(v) for k, v in kwargs.items()}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("meta")
    out = func(*emptied(args), **kwargs)
    return originals.get(id(out), out)


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *expand: Any, out_val: Any = None) -> int:
    views = []
    for tensor, dims in zip((a, b, c), expand, strict=False):
        for dim in sorted(dims):
            tensor = tensor.unsqueeze(dim)
        views.append(tensor.shape)
    return torch.broadcast_shapes(*views).numel()


def _of_flops(formula: Callable[..., Any]) -> Callable[..., int]:
    return lambda *args, **kwargs: int(formula(*args, **kwargs)) // 2


_PRODUCTS: dict[Any, Callable[..., int]] = {packet: _of_flops(formula) for packet, formula in flop_registry.items()}
_PRODUCTS |= {
    aten.mv: lambda a, b, out_val: a.numel(),
    aten.addmv: lambda x, a, b, out_val, **_: a.numel(),
    aten.dot: lambda a, b, out_val: a.numel(),
    aten.addbmm: lambda x, a, b, out_val, **_: a.numel() * b.shape[-1],
    aten._trilinear: _trilinear,
}
