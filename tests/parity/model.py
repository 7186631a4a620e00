"""A language model small enough for twenty steps in milliseconds, with what trips a sharding engine built in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH, SENTENCES = 64, 16, 8, 2


@dataclass(frozen=True)
class Traits:
    """What the model has beyond the plain: a tied head, a parameter nothing uses, a frozen one."""

    has_tied_head: bool = False
    has_unused: bool = True
    has_frozen: bool = True


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_in, self.norm_mid = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_in(x)).view(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


class TinyGPT(nn.Module):
    """`forward(tokens [sentences, length + 1])` returns the mean next-token loss in fp32."""

    def __init__(self, traits: Traits) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if traits.has_tied_head:
            self.head.weight = self.embed.weight
        if traits.has_unused:
            self.unused = nn.Parameter(torch.ones(7))
        if traits.has_frozen:
            self.position.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.embed.weight.device)
        x = self.embed(tokens[:, :-1]) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


def tiny_gpt(traits: Traits = Traits()) -> TinyGPT:
    """Return the model every process builds alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyGPT(traits)


def batch(step: int, micro: int, rank: int) -> Tensor:
    """Return what `rank` sees: tokens [sentences, length + 1]."""
    generator = torch.Generator().manual_seed(1_000_000 + 10_000 * step + 100 * micro + rank)
    # few distinct tokens: something to learn within twenty steps
    return torch.randint(0, VOCAB // 4, (SENTENCES, LENGTH + 1), generator=generator)
