"""Compiled networks on disk.

Contract: nothing in a file is run, and a file that was cut off, edited or written by a newer version is refused with one
message. A file is: 8 bytes that say what it is, the version, the length of the header, the SHA-256 of all that follows, the
header (JSON: the tree of instructions), and the arrays it refers to, little-endian, each at a multiple of 8 bytes from where
they begin. What stands in the tree is read as the fields of the classes in _program.py are declared.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from dnw._files import write_whole
from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    Edges,
    Graph,
    Indices,
    InstanceNorm,
    Instruction,
    Linear,
    Mean,
    Pick,
    Program,
    Rectify,
    Restore,
    in_memory,
    require_program,
)

_MAGIC = b"dnw-prog"
_VERSION = 1
_FRONT = struct.Struct("<8sIQ32s")
_TYPES = {"f4": torch.float32, "u2": torch.uint16, "i4": torch.int32, "i8": torch.int64}
"""Whole numbers are stored as narrow as they allow, and are int64 again when read."""
_STORED: dict[str, type[Instruction | Constant]] = {
    "Edges": Edges,
    "Affine": Affine,
    "InstanceNorm": InstanceNorm,
    "Rectify": Rectify,
    "Convolution": Convolution,
    "Mean": Mean,
    "Linear": Linear,
    "Graph": Graph,
    "Pick": Pick,
    "Restore": Restore,
    "Constant": Constant,
}
"""What a program is made of, by the name that it has in files. A name stays when its class gets another one."""
_NAMES = {kind: name for name, kind in _STORED.items()}


def save_program(program: Program, path: str | Path) -> int:
    """Writes a compacted network; returns the number of bytes.

    Raises:
        ValueError: no compacted network, or one with instructions that have no name in files.
    """
    require_program(program)
    arrays = bytearray()
    tree = [_plain(instruction, arrays) for instruction in program.instructions]
    header = json.dumps({"input_size": program.input_size, "instructions": tree}).encode()
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
    if version != _VERSION:
        raise ValueError(
            f"{path}: compiled by another version of dnw (format {version}; this one reads {_VERSION}); compile anew"
        )
    rest = content[_FRONT.size :]
    if hashlib.sha256(rest).digest() != digest or length > len(rest):
        raise ValueError(f"{path}: damaged: cut off or changed since it was written; compile anew")
    try:
        header = json.loads(rest[:length])
        arrays = memoryview(bytearray(rest[length:]))
        instructions = _value(header["instructions"], tuple[Instruction, ...], arrays)
        channels, height, width = (int(n) for n in header["input_size"])
        program = Program(instructions, (channels, height, width))
        program.output_size  # noqa: B018  (walks through all instructions and checks them)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a valid compiled network ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None
    return program


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
        kind = "f4" if value.is_floating_point() else _narrowest(value)
        arrays += bytes(-len(arrays) % 8)
        found = {"array": kind, "shape": list(value.shape), "at": len(arrays)}
        arrays += raw_bytes(value.to(_TYPES[kind]))
        return found
    if isinstance(value, (Instruction, Constant)):
        name = _NAMES.get(type(value))
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
    raise ValueError(f"a {type(value).__name__} in a compacted network is not stored; what may be in its fields is in _value")


def _value(item: Any, kind: Any, arrays: memoryview) -> Any:
    """What JSON says of a value that is declared as a kind.

    Raises:
        ValueError, KeyError, TypeError: it is no such value.
    """
    if kind in (Tensor, Indices):
        return _tensor(item, kind == Indices, arrays)
    if kind in (bool, float, int):
        if type(item) is not kind or (kind is int and abs(item) >= 1 << 31):
            raise ValueError(f"{item!r:.40} is no {kind.__name__}")
        return item
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(item, list):
            raise ValueError(f"a {type(item).__name__} where a list belongs")
        if inner[-1] is Ellipsis:
            inner = (inner[0],) * len(item)
        return tuple(_value(x, inner_kind, arrays) for x, inner_kind in zip(item, inner, strict=True))
    if isinstance(kind, UnionType):
        (kind,) = (inner for inner in get_args(kind) if inner is not NoneType)
        return None if item is None else _value(item, kind, arrays)
    return _stored(item, kind, arrays)


def _stored(item: Any, kind: type[Instruction | Constant], arrays: memoryview) -> Any:
    """An instruction or constant of some kind."""
    name = item["instruction"]
    made = _STORED.get(name)
    if made is None or not issubclass(made, kind):
        raise ValueError(f"{name!r:.40} where {kind.__name__} belongs")
    declared, fields = get_type_hints(made, include_extras=True), {k: v for k, v in item.items() if k != "instruction"}
    if unknown := fields.keys() - declared.keys():
        raise ValueError(f"{name} has no {min(unknown)!r}")
    return made(**{key: _value(value, declared[key], arrays) for key, value in fields.items()})


def _tensor(item: dict[str, Any], whole: bool, arrays: memoryview) -> Tensor:
    """Weights, or whole numbers."""
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
