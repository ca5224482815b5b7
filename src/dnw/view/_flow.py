"""Which layers of a network feed which, for a picture of any model: from its capture, or else in the order of their names.

Contract: pure reading, without computing anything; the model is as it was afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnw.compile._capture import evaluating, silence

_PRODUCTS = ("linear", "conv", "mm", "matmul", "einsum", "embedding", "lstm", "gru", "rnn")
"""What multiplies by a weight, as part of an operator's name."""


@dataclass(frozen=True)
class Block:
    """A part of a network in a picture: an input, a layer, or where several things meet.

    Attributes:
        kind: "input", "layer" or "join".
        name: of an input; of a layer its parameter's; of a join its operation's, such as ``add``.
        channels: how many it gives.
        reads: blocks that it reads, by their numbers.
        heads: of a layer that attention reads, groups of targets: of queries, keys and values one after the other where one
            layer makes all three; 1 of any other.
        heads_read: of a layer that reads attention, groups of sources; 1 of any other.
        x, y: where its middle lies, from 0 to 1.
    """

    kind: str
    name: str
    channels: int
    reads: tuple[int, ...] = ()
    heads: int = 1
    heads_read: int = 1
    x: float = 0.0
    y: float = 0.5


def flow_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], example: Sequence[Tensor] | None) -> tuple[Block, ...]:
    """The blocks of a network, each after those that it reads.

    Args:
        model: the network.
        shapes: of the layers to show, ``(targets, sources, ...)``, by the name of their parameter. All others with weights of
            two dimensions or more are shown as well, where it is captured.
        example: inputs; without them, and where the model cannot be captured, each layer reads the one before.
    """
    blocks = None if example is None else _captured(model, shapes, tuple(example))
    if blocks is None or not shapes.keys() <= {block.name for block in blocks}:
        blocks = [Block("input", "input", next(iter(shapes.values()), (1, 1))[1])]
        blocks += [Block("layer", name, shape[0], (i,)) for i, (name, shape) in enumerate(shapes.items())]
    return _placed([_as_read(block, i, blocks, shapes) for i, block in enumerate(blocks)])


def _as_read(block: Block, number: int, blocks: Sequence[Block], shapes: Mapping[str, tuple[int, ...]]) -> Block:
    """An input with as many channels as layers see of it: a flattened image has as many as pixels."""
    if block.kind != "input":
        return block
    reading = [other for other in blocks if number in other.reads and other.name in shapes]
    seen = [shapes[other.name][1] for other in reading if other.channels == shapes[other.name][0]]  # no embedding
    return replace(block, channels=max(seen, default=block.channels))


def _captured(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], example: tuple[Tensor, ...]) -> list[Block] | None:
    with evaluating(model), silence():
        try:
            return _Flow(model, shapes, torch.export.export(model, example, strict=False)).blocks
        except Exception:  # whatever the model raises while it is traced, or is made of: then the order of names has to do
            return None


class _Flow:
    """One pass over a captured graph: what each value comes from."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], exported: torch.export.ExportedProgram) -> None:
        self.blocks: list[Block] = []
        self._origins: dict[fx.Node, tuple[int, ...]] = {}
        self._weights: dict[fx.Node, tuple[str, ...]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shown = {id(parameters[name]): name for name in shapes if name in parameters}
        self._names = {name: shown.get(id(parameter), name) for name, parameter in parameters.items()}
        self._matrices = {name for name, parameter in parameters.items() if parameter.ndim > 1}
        self._shapes = shapes
        held = exported.graph_signature.inputs_to_parameters
        inputs = set(exported.graph_signature.user_inputs)
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                name = held.get(node.name)
                self._weights[node] = () if name is None else (self._names.get(name, name),)
                is_input = node.name in inputs and isinstance(node.meta.get("val"), Tensor)
                self._origins[node] = (self._add(Block("input", node.name, _width(node))),) if is_input else ()
            elif node.op == "call_function":
                self._call(node)

    def _add(self, block: Block) -> int:
        self.blocks.append(block)
        return len(self.blocks) - 1

    def _call(self, node: fx.Node) -> None:
        given = node.all_input_nodes
        origins = tuple(dict.fromkeys(origin for one in given for origin in self._origins.get(one, ())))
        weights = dict.fromkeys(name for one in given if not self._origins.get(one) for name in self._weights.get(one, ()))
        self._weights[node] = tuple(weights)
        self._origins[node] = origins
        operation = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        multiplies = any(part in operation for part in _PRODUCTS)
        layers = [name for name in weights if name in self._shapes or (multiplies and name in self._matrices)]
        if not origins:
            return
        heads = _heads(node) if "attention" in operation else 0
        for name in layers:
            reads = self._origins[node]
            attends = next((self.blocks[i].heads_read for i in reads if self.blocks[i].kind == "join"), 1)
            is_known = name in self._shapes and "embedding" not in operation  # whose targets are tokens
            channels = self._shapes[name][0] if is_known else _width(node, of_images="conv" in operation)
            block = Block("layer", name, channels, reads, heads_read=attends if len(reads) == 1 else 1)
            self._origins[node] = (self._add(block),)
        if heads:
            self._attention(node, heads, origins)
        elif not layers and len(origins) > 1:
            self._origins[node] = (self._add(Block("join", operation.rstrip("_"), _width(node), origins)),)

    def _attention(self, node: fx.Node, heads: int, origins: tuple[int, ...]) -> None:
        """The layers that attention reads make its heads, and the layer that reads it, too."""
        for i in origins:
            block = self.blocks[i]
            times = sum(self._origins.get(one) == (i,) for one in node.all_input_nodes[:3])
            if block.kind == "layer" and block.channels % (heads * max(1, times)) == 0:
                self.blocks[i] = replace(block, heads=heads * max(1, times))
        join = Block("join", "attention", heads * _width(node, of_images=False), origins, heads_read=heads)
        self._origins[node] = (self._add(join),)


def _heads(node: fx.Node) -> int:
    value: Any = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    return int(value.shape[1]) if isinstance(value, Tensor) and value.ndim == 4 else 1


def _width(node: fx.Node, *, of_images: bool | None = None) -> int:
    """The channels of a value: its second dimension if it is one of images, else its last; by default images have four."""
    value: Any = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        return 1
    return int(value.shape[1] if (value.ndim == 4 if of_images is None else of_images) else value.shape[-1])


def _placed(blocks: list[Block]) -> tuple[Block, ...]:
    """The blocks where a picture has them: as far right as what they read asks, those at the same place one above the other."""
    at: list[float] = []
    for block in blocks:
        step = 0.6 if block.kind == "join" else 1.0
        at.append(max((at[i] for i in block.reads), default=-step) + step)
    last = max(at, default=0.0) or 1.0
    rows = [0.5] * len(blocks)
    for _, same in groupby(sorted(range(len(blocks)), key=lambda i: (round(at[i], 6), i)), key=lambda i: round(at[i], 6)):
        beside = list(same)
        heights = {i: sum(rows[j] for j in blocks[i].reads) / max(1, len(blocks[i].reads)) for i in beside}
        for k, i in enumerate(sorted(beside, key=lambda i: (heights[i], i))):
            rows[i] = (k + 0.5) / len(beside)
    return tuple(replace(block, x=x / last, y=y) for block, x, y in zip(blocks, at, rows, strict=True))
