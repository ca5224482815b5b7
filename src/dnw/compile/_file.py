"""Compiled networks on disk.

Contract: nothing in a file is run, and a file that was cut off, edited or written by a newer version is refused with one
message. A file is: 8 bytes that say what it is, the version, the length of the header, the SHA-256 of all that follows, the
header (JSON: the nodes with their instructions), and the arrays it refers to, little-endian, each at a multiple of 8 bytes
from where they begin. What stands there is read as the fields of the classes in _program.py and _layers.py are declared.
Weights that are mostly 0 are stored without zeros. Files of format 1, instructions one after the other, are still read.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import struct
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from dnw._files import write_whole
from dnw.compile._layers import (
    ACTIVATIONS,
    Activation,
    AdaptiveMean,
    Attention,
    Concat,
    Crop,
    LayerNorm,
    Pad,
    PlaceMean,
    Pool,
    Product,
    Rearrange,
    Shift,
    Sum,
)
from dnw.compile._older import Edges, Graph, Mean, Older, Read, Rectify, flat
from dnw.compile._program import (
    Affine,
    Beside,
    Constant,
    Convolution,
    Indices,
    InstanceNorm,
    Instruction,
    Linear,
    Pick,
    Program,
    Restore,
    Size,
    in_memory,
    require_program,
)
from dnw.compile._torch import Foreign

_MAGIC = b"dnw-prog"
_VERSION = 2
_FRONT = struct.Struct("<8sIQ32s")
_TYPES = {"f4": torch.float32, "u2": torch.uint16, "i4": torch.int32, "i8": torch.int64}
"""Whole numbers are stored as narrow as they allow, and are int64 again when read."""
Stored = Instruction | Older | Constant
_STORED: dict[str, type[Stored]] = {
    "Affine": Affine,
    "InstanceNorm": InstanceNorm,
    "Convolution": Convolution,
    "Linear": Linear,
    "Pick": Pick,
    "Restore": Restore,
    "Constant": Constant,
    "Beside": Beside,
    **{
        kind.__name__: kind
        for kind in (
            Activation,
            AdaptiveMean,
            Attention,
            Concat,
            Crop,
            LayerNorm,
            Pad,
            PlaceMean,
            Pool,
            Product,
            Rearrange,
            Shift,
            Sum,
        )
    },
}
"""What a program is made of, by the name that it has in files. A name stays when its class gets another one."""
_NAMES = {kind: name for name, kind in _STORED.items()}
_STORED |= {kind.__name__: kind for kind in (Edges, Graph, Mean, Rectify)}


def save_program(program: Program, path: str | Path) -> int:
    """Writes a compacted network; returns the number of bytes.

    Raises:
        ValueError: no compacted network, one of which PyTorch runs a part, or one with instructions that have no name in files.
    """
    require_program(program)
    arrays = bytearray()
    nodes = [{"reads": node.reads, **_plain(node.instruction, arrays)} for node in program.nodes]
    header = json.dumps({"input_sizes": program.input_sizes, "nodes": nodes, "outputs": program.outputs}).encode()
    rest = header + bytes(arrays)
    content = _FRONT.pack(_MAGIC, _VERSION, len(header), hashlib.sha256(rest).digest()) + rest
    write_whole(Path(path), content)
    return len(content)


def load_program(path: str | Path) -> Program:
    """Reads a compacted network.

    Raises:
        ValueError: no such file of ours, one that is damaged, or one of a newer version.
        OSError: it cannot be read.
    """
    path = Path(path)
    content = path.read_bytes()
    if len(content) < _FRONT.size or not content.startswith(_MAGIC):
        raise ValueError(f"{path}: not a compiled network (dnw compile makes them), or cut off at its beginning")
    _, version, length, digest = _FRONT.unpack_from(content)
    if version not in (1, _VERSION):
        raise ValueError(
            f"{path}: compiled by another version of dnw (format {version}; this one reads up to {_VERSION}); compile anew"
        )
    rest = content[_FRONT.size :]
    if hashlib.sha256(rest).digest() != digest or length > len(rest):
        raise ValueError(f"{path}: damaged: cut off or changed since it was written; compile anew")
    try:
        header = json.loads(rest[:length])
        arrays = memoryview(bytearray(rest[length:]))
        if version == 1:
            instructions = _value(header["instructions"], tuple[Instruction | Older, ...], arrays)
            nodes: list[Read] = [(instruction, (number,)) for number, instruction in enumerate(instructions)]
            sizes, outputs = (_value(header["input_size"], Size, arrays),), (len(nodes),)
        else:
            nodes = [_node(item, arrays) for item in _list(header["nodes"])]
            sizes = _value(header["input_sizes"], tuple[Size, ...], arrays)
            outputs = _value(header["outputs"], tuple[int, ...], arrays)
        program = flat(nodes, sizes, outputs)
        program.sizes()  # walks through all instructions and checks them
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a valid compiled network ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None
    return program


def _list(item: Any) -> list[Any]:
    if not isinstance(item, list):
        raise ValueError(f"a {type(item).__name__} where a list belongs")
    return item


def _node(item: dict[str, Any], arrays: memoryview) -> Read:
    reads = _value(item["reads"], tuple[int, ...], arrays)
    instruction = {key: value for key, value in item.items() if key != "reads"}
    return _value(instruction, Instruction | Older, arrays), reads


def _narrowest(numbers: Tensor) -> str:
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.numel() else (0, 0)
    if low >= 0 and high < 1 << 16:
        return "u2"
    return "i4" if low >= -(1 << 31) and high < 1 << 31 else "i8"


def raw_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, in order."""
    tensor = in_memory(tensor, tensor.dtype)
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()) if tensor.numel() else b""


def _plain(value: Any, arrays: bytearray) -> Any:
    """A value as JSON; tensors go into the arrays."""
    if isinstance(value, Tensor):
        return _plain_tensor(value, arrays)
    if isinstance(value, (Instruction, Constant)):
        name = _NAMES.get(type(value))
        if isinstance(value, Foreign):
            raise ValueError(
                f"PyTorch runs {value.name}, which files do not hold; compile with strict=True to hear of it before"
            )
        if name is None:
            raise ValueError(
                f"a {type(value).__name__} has no name in files; give it one in _STORED of dnw/compile/_file.py, so that it is "
                "found when the file is read"
            )
        fields = {f.name: _plain(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"instruction": name, **fields}
    if isinstance(value, (tuple, list)):
        return [_plain(item, arrays) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and value in ACTIVATIONS:
        return value
    raise ValueError(f"a {type(value).__name__} in a compacted network is not stored; what may be in its fields is in _value")


def _plain_tensor(value: Tensor, arrays: bytearray) -> dict[str, Any]:
    """An array; of weights that are mostly 0, the others and how far apart they are."""
    kind = "f4" if value.is_floating_point() else _narrowest(value)
    if kind == "f4" and value.numel() > 64 and 2 * int((there := value.flatten() != 0).count_nonzero()) < len(there):
        places = there.nonzero().flatten()
        gaps = places.diff(prepend=places.new_full((1,), -1))
        weights, apart = (
            _plain_tensor_whole(t, k, arrays) for t, k in ((value.flatten()[places], "f4"), (gaps, _narrowest(gaps)))
        )
        return {"sparse": weights, "gaps": apart, "shape": list(value.shape)}
    return _plain_tensor_whole(value, kind, arrays)


def _plain_tensor_whole(value: Tensor, kind: str, arrays: bytearray) -> dict[str, Any]:
    arrays += bytes(-len(arrays) % 8)
    found = {"array": kind, "shape": list(value.shape), "at": len(arrays)}
    arrays += raw_bytes(value.to(_TYPES[kind]))
    return found


def _value(item: Any, kind: Any, arrays: memoryview) -> Any:
    """What JSON says of a value that is declared as a kind.

    Raises:
        ValueError, KeyError, TypeError: it is no such value.
    """
    if kind in (Tensor, Indices):
        return _tensor(item, kind == Indices, arrays)
    if kind is str:
        if item not in ACTIVATIONS:
            raise ValueError(f"{item!r:.40} is no activation")
        return item
    if kind in (bool, float, int):
        if type(item) is not kind or (kind is int and abs(item) >= 1 << 31):
            raise ValueError(f"{item!r:.40} is no {kind.__name__}")
        if kind is float and math.isfinite(item) and abs(item) > torch.finfo(torch.float32).max:
            raise ValueError(f"{item!r:.40} is beyond single precision")
        return item
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(item, list):
            raise ValueError(f"a {type(item).__name__} where a list belongs")
        if inner[-1] is Ellipsis:
            inner = (inner[0],) * len(item)
        return tuple(_value(x, inner_kind, arrays) for x, inner_kind in zip(item, inner, strict=True))
    if isinstance(kind, UnionType) and NoneType in get_args(kind):
        (kind,) = (inner for inner in get_args(kind) if inner is not NoneType)
        return None if item is None else _value(item, kind, arrays)
    return _stored(item, kind, arrays)


def _stored(item: Any, kind: Any, arrays: memoryview) -> Any:
    """An instruction or constant of some kind."""
    name = item["instruction"]
    made = _STORED.get(name)
    if made is None or not issubclass(made, kind):
        raise ValueError(f"{name!r:.40} where {getattr(kind, '__name__', 'an instruction')} belongs")
    declared, fields = get_type_hints(made, include_extras=True), {k: v for k, v in item.items() if k != "instruction"}
    if unknown := fields.keys() - declared.keys():
        raise ValueError(f"{name} has no {min(unknown)!r}")
    return made(**{key: _value(value, declared[key], arrays) for key, value in fields.items()})


def _tensor(item: dict[str, Any], whole: bool, arrays: memoryview) -> Tensor:
    """Weights, or whole numbers."""
    if not whole and "sparse" in item:
        weights, gaps = _tensor(item["sparse"], False, arrays), _tensor(item["gaps"], True, arrays)
        shape = [int(n) for n in item["shape"]]
        count = math.prod(shape)
        if min(shape, default=0) < 0 or not 0 < count < 1 << 31 or weights.shape != gaps.shape or weights.ndim != 1:
            raise ValueError(f"weights of {shape} that are no weights")
        places = gaps.cumsum(0) - 1
        if len(places) and (int(gaps.min()) < 1 or int(places[-1]) >= count):
            raise ValueError(f"weights of {shape} that lie elsewhere")
        return torch.zeros(count).index_put((places,), weights).view(shape)
    dtype, shape, at = _TYPES[item["array"]], [int(n) for n in item["shape"]], int(item["at"])
    if dtype.is_floating_point == whole:
        raise ValueError(f"an array of {item['array']} where {'whole numbers' if whole else 'weights'} belong")
    count = 1
    for n in shape:
        count *= n
    size = count * dtype.itemsize
    if min(shape, default=0) < 0 or at < 0 or at + size > len(arrays):
        raise ValueError("an array that lies outside of the file")
    if not count:
        return torch.zeros(shape, dtype=dtype if dtype.is_floating_point else torch.int64)
    found = torch.frombuffer(arrays, dtype=dtype, count=count, offset=at).reshape(shape)
    return found.clone() if dtype.is_floating_point else found.to(torch.int64, copy=True)
