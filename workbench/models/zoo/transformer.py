"""A small transformer encoder that classifies sentences given as word ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PADDING = 0  # the id that stands for no word

_INITIAL = 0.02  # spread of the vectors before training, as in BERT
_NEVER = -1e4  # added to a score, in float16 too, it leaves nothing of it after the softmax


class Positions(nn.Module):
    """A learnt vector per place in the sentence, added to the word that stands there.

    Parameters
    ----------
    length, width
        Places, and numbers per place.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.weight, std=_INITIAL)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        return x + self.weight

    def extra_repr(self) -> str:
        """Its settings, so that a printed model tells two apart."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class Attention(nn.Module):
    """Self-attention of several heads, its four projections as ordinary linear layers.

    Parameters
    ----------
    width
        Of what comes in and goes out.
    num_heads
        Each takes an equal part of the channels of `query`, `key` and `value`.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(N, length, width) and what is added to the scores, (N, 1, 1, length), to (N, length, width)."""
        heads = (self.num_heads, -1)
        query, key, value = (
            layer(x).unflatten(-1, heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.projection(mixed.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """Its settings, so that a printed model tells two apart."""
        return f"num_heads={self.num_heads}"


class Block(nn.Module):
    """Attention, then two linear layers, each normalised before and added to what came in."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.relu = nn.ReLU()
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(N, length, width) and what is added to the scores, (N, 1, 1, length), to (N, length, width)."""
        x = x + self.dropout(self.attention(self.norm1(x), bias))
        return x + self.dropout(self.linear2(self.relu(self.linear1(self.norm2(x)))))


class Transformer(nn.Module):
    """Word and place vectors, blocks of attention, and a linear layer on the mean over the words.

    Places whose id is 0 are no words: nothing attends to them and the mean leaves them out.

    Parameters
    ----------
    vocabulary
        Ids in all.
    length
        Ids per sentence.
    width
        Numbers per word, a multiple of `num_heads`.
    num_heads, layers
        Heads of a block, and blocks.
    hidden
        Width between the two linear layers of a block.
    classes
        Outputs.
    dropout
        Share of the numbers left out while training: of the word vectors, and of what each block adds.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        num_heads: int,
        layers: int,
        hidden: int,
        classes: int,
        dropout: float,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.positions = Positions(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        with torch.no_grad():
            self.embed.weight.mul_(_INITIAL)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, length) int64 ids to logits (N, classes)."""
        x = self.dropout(self.positions(self.embed(ids)))
        words = (ids != PADDING).to(x.dtype)
        bias = (1 - words)[:, None, None] * _NEVER
        for block in self.blocks:
            x = block(x, bias)
        weights = words / words.sum(1, keepdim=True).clamp_min(1)  # a sentence without words has a mean of zero
        return self.head((self.norm(x) * weights[:, :, None]).sum(1))


def transformer(
    vocabulary: int = 8192,
    length: int = 32,
    width: int = 128,
    num_heads: int = 4,
    layers: int = 2,
    hidden: int = 512,
    classes: int = 2,
    dropout: float = 0.5,
) -> Transformer:
    """An encoder with normalisation before each part and ReLU, for sentences of up to 32 words.

    Half of the numbers are left out in training, which is what a few thousand sentences ask for.

    After Vaswani et al., "Attention is all you need" (2017), section 3.1; normalised before each part as in Xiong et
    al., "On layer normalization in the transformer architecture" (2020).
    """
    return Transformer(vocabulary, length, width, num_heads, layers, hidden, classes, dropout)
