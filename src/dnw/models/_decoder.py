"""A small decoder of bytes or other tokens, made to be read: every activation that a weight reads or writes has a name.

Source: the shape of GPT-2 (pre-norm, learned positions, GELU), with norms that have no weights and, where asked, activations of
which only the largest are kept, as in Gao et al., "Weight-sparse transformers have interpretable circuits" (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Nodes(nn.Module):
    """The activations of a layer's nodes, ``[..., nodes]``: as they are, or the largest magnitudes of each vector alone.

    It stands wherever one may want to look, or to step in with a hook.

    Args:
        share: of the nodes that are kept at a time; None for all.
    """

    def __init__(self, share: float | None = None) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if self.share is None:
            return x
        kept = x.abs().topk(max(1, round(self.share * x.shape[-1])), dim=-1).indices
        return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


class Attention(nn.Module):
    """Causal attention of several heads; its nodes are channels of ``read``, ``query``, ``key``, ``value`` and ``write``."""

    def __init__(self, width: int, heads: int, share: float | None) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm, self.read = nn.RMSNorm(width, elementwise_affine=False), Nodes(share)
        self.to_query, self.to_key, self.to_value = (nn.Linear(width, width) for _ in range(3))
        self.query, self.key, self.value = (Nodes(share) for _ in range(3))
        self.to_write, self.write = nn.Linear(width, width), Nodes(share)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(self.norm(x))
        parts = self.query(self.to_query(x)), self.key(self.to_key(x)), self.value(self.to_value(x))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.write(self.to_write(mixed.transpose(1, 2).flatten(2)))


class Neurons(nn.Module):
    """A hidden layer of neurons; its nodes are those of ``read``, ``hidden`` and ``write``."""

    def __init__(self, width: int, hidden: int, share: float | None) -> None:
        super().__init__()
        self.norm, self.read = nn.RMSNorm(width, elementwise_affine=False), Nodes(share)
        self.to_hidden, self.hidden = nn.Linear(width, hidden), Nodes(share)
        self.to_write, self.write = nn.Linear(hidden, width), Nodes(share)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(self.norm(x))
        return self.write(self.to_write(self.hidden(F.gelu(self.to_hidden(x)))))


class Block(nn.Module):
    """Attention and neurons, each added to the residual stream."""

    def __init__(self, width: int, heads: int, hidden: int, share: float | None) -> None:
        super().__init__()
        self.attention, self.neurons = Attention(width, heads, share), Neurons(width, hidden, share)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.neurons(x)


class Decoder(nn.Module):
    """Predicts the next token at every place: ``[batch, tokens]`` of int64 to logits ``[batch, tokens, vocabulary]``.

    Args:
        vocabulary: how many tokens there are; 256 for bytes.
        width: of the residual stream.
        depth: blocks, each of attention and neurons.
        heads: of attention in each block, a divisor of the width.
        hidden: neurons in each block; by default four times the width.
        context: the most tokens that it reads at a time.
        share: of the activations of all nodes but the embedding, those of largest magnitude that are kept; None for all.

    Raises:
        ValueError: a width that the heads do not divide, or a share outside (0, 1]; later more tokens than ``context``.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        hidden: int | None = None,
        context: int = 128,
        share: float | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} and heads={heads}: the width has to be a multiple of the number of heads")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share={share}: allowed is a share of the activations above 0 and up to 1, or None for all")
        self.context = context
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.embedded = Nodes()
        self.blocks = nn.ModuleList(Block(width, heads, hidden or 4 * width, share) for _ in range(depth))
        self.norm, self.read = nn.RMSNorm(width, elementwise_affine=False), Nodes(share)
        self.to_logits = nn.Linear(width, vocabulary)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                scale = (2 * depth) ** -0.5 if name.endswith("to_write.weight") else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.context:
            raise ValueError(f"{tokens.shape[1]} tokens: the decoder reads at most context={self.context} at a time")
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedded(self.embed(tokens) + self.place(places))
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.read(self.norm(x)))

    def wires(self) -> dict[str, tuple[str, str]]:
        """Of each weight the nodes that it reads and writes, as names of modules; "" where it reads or writes tokens."""
        found = {"embed.weight": ("", "embedded")}
        for i in range(len(self.blocks)):
            attention, neurons = f"blocks.{i}.attention", f"blocks.{i}.neurons"
            for part in ("query", "key", "value"):
                found[f"{attention}.to_{part}.weight"] = (f"{attention}.read", f"{attention}.{part}")
            found[f"{attention}.to_write.weight"] = (f"{attention}.value", f"{attention}.write")
            found[f"{neurons}.to_hidden.weight"] = (f"{neurons}.read", f"{neurons}.hidden")
            found[f"{neurons}.to_write.weight"] = (f"{neurons}.hidden", f"{neurons}.write")
        return found | {"to_logits.weight": ("read", "")}
