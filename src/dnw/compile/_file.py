"""Compiled networks on disk.

Contract: nothing in a file is run, and a file that was cut off, edited or written by a newer version is refused with one
message. A file is: 8 bytes that say what it is, the version, the length of the header, the SHA-256 of all that follows, the
header (JSON: the tree of instructions), and the arrays it refers to, little-endian, each at a multiple of 8 bytes from
where they begin.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnw._files import write_whole
from dnw.compile import _program
from dnw.compile._program import Constant, Edges, Instruction, Program, in_memory, require_program

_MAGIC = b"dnw-prog"
_VERSION = 1
_FRONT = struct.Struct("<8sIQ32s")
_TYPES = {"f4": torch.float32, "u2": torch.uint16, "i4": torch.int32, "i8": torch.int64}
"""Whole numbers are stored as narrow as they allow, and are int64 again when read."""
_INSTRUCTIONS: dict[str, Any] = {
    name: getattr(_program, name)
    for name in (
        "Edges",
        "Affine",
        "InstanceNorm",
        "Rectify",
        "Convolution",
        "Mean",
        "Linear",
        "Graph",
        "Pick",
        "Restore",
        "Constant",
    )
}


def save_program(program: Program, path: str | Path) -> int:
    """Writes a compacted network; returns the number of bytes.

    Raises:
        ValueError: no compacted network.
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
        instructions = tuple(_instruction(item, arrays) for item in header["instructions"])
        channels, height, width = (int(n) for n in header["input_size"])
        if not _are_instructions(instructions):
            raise ValueError("constants among the instructions")
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
        fields = {f.name: _plain(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"instruction": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [_plain(item, arrays) for item in value]
    return value


def _value(item: Any, arrays: memoryview) -> Any:
    if isinstance(item, dict):
        return _tensor(item, arrays) if "array" in item else _instruction(item, arrays)
    if isinstance(item, list):
        return tuple(_value(inner, arrays) for inner in item)
    if item is None or (isinstance(item, int) and not isinstance(item, bool)):
        return item
    raise ValueError(f"a {type(item).__name__} among the numbers")


def _instruction(item: Any, arrays: memoryview) -> Any:
    name = item["instruction"]
    if name not in _INSTRUCTIONS:
        raise ValueError(f"unknown instruction {name!r}")
    fields = {}
    for key, value in item.items():
        if key != "instruction":
            plain = (key == "eps" and isinstance(value, float)) or (key == "dense" and isinstance(value, bool))
            fields[key] = value if plain else _value(value, arrays)
    made = _INSTRUCTIONS[name](**fields)
    for field in dataclasses.fields(made):
        if not _FITS[str(field.type)](getattr(made, field.name), field.name):
            raise ValueError(f"{name} with another {field.name}")
    return made


def _is_whole(value: Any, *_: str) -> bool:
    return type(value) is int and abs(value) < 1 << 31


def _is_level(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Edges) and _are_instructions(value[1])


def _are_instructions(value: Any, *_: str) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, Instruction) for item in value)


_INDICES = ("starts", "sources", "channels", "rows", "columns")
"""Fields of whole numbers; all other tensors are weights."""
_FITS: dict[str, Callable[[Any, str], bool]] = {
    "Tensor": lambda value, name: isinstance(value, Tensor) and value.is_floating_point() != (name in _INDICES),
    "int": _is_whole,
    "float": lambda value, _: isinstance(value, float),
    "bool": lambda value, _: isinstance(value, bool),
    "tuple[int, int]": lambda value, _: isinstance(value, tuple) and len(value) == 2 and all(map(_is_whole, value)),
    "Constant | None": lambda value, _: value is None or isinstance(value, Constant),
    "Edges": lambda value, _: isinstance(value, Edges),
    "tuple[Instruction, ...]": _are_instructions,
    "tuple[tuple[Edges, tuple[Instruction, ...]], ...]": lambda value, _: (
        isinstance(value, tuple) and all(map(_is_level, value))
    ),
}
"""Whether a value fits what a field is declared as."""


def _tensor(item: dict[str, Any], arrays: memoryview) -> Tensor:
    dtype, shape, at = _TYPES[item["array"]], [int(n) for n in item["shape"]], int(item["at"])
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
