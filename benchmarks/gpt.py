"""The benchmark's model and data: a GPT of given size, and random tokens that every implementation sees alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8


@dataclass(frozen=True)
class Size:
    """The default is 33.6 M parameters: 134 MB in fp32."""

    hidden: int = 512
    layers: int = 8
    vocab: int = 8192
    length: int = 128


class Layer(nn.Module):
    """Causal attention and a feed-forward part, each behind a norm, without biases."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.project = nn.Linear(hidden, hidden, bias=False)
        self.widen = nn.Linear(hidden, 4 * hidden, bias=False)
        self.narrow = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        num_sentences, length, hidden = x.shape
        heads = self.qkv(self.attention_norm(x)).view(num_sentences, length, 3, HEADS, hidden // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(x.shape))
        return x + self.narrow(F.gelu(self.widen(self.feed_norm(x))))


class GPT(nn.Module):
    """`forward(tokens [sentences, length + 1])` returns the mean next-token loss in fp32."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(size.vocab, size.hidden), nn.Embedding(size.length, size.hidden)
        self.layers = nn.ModuleList(Layer(size.hidden) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.hidden), nn.Linear(size.hidden, size.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens[:, :-1]) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


def build(size: Size) -> GPT:
    torch.manual_seed(0)
    return GPT(size)


def tokens(size: Size, num_sentences: int, at: int, rank: int) -> Tensor:
    """Return micro-batch number `at` of `rank`: [num_sentences, length + 1]."""
    generator = torch.Generator().manual_seed(1_000_003 * rank + at)
    return torch.randint(0, size.vocab, (num_sentences, size.length + 1), generator=generator)
