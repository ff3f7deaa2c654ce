"""Part "attention": torch's multi-head attention with its projections as ordinary layers, so that heads can go."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, by four linear layers and any number of heads.

    torch's own insists on as many channels inside as outside. Takes the same arguments and gives the same result.

    Parameters
    ----------
    old
        Without key and value biases of its own, and without an added zero; its weights are copied.
    """

    # what torch's transformer layers ask before they take a shortcut that reads the packed weights
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, old: nn.MultiheadAttention):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = old.embed_dim, old.num_heads, old.head_dim
        self.batch_first, self.dropout = old.batch_first, old.dropout
        packed = old.in_proj_weight
        weights = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None,) * 3 if old.in_proj_bias is None else old.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = _linear(old.out_proj.weight, old.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values and, if asked for, the weights; arguments and shapes as torch's own."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = functional.dropout(weights, dropout) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores, (N or 1, heads or 1, queries or 1, keys)."""
        mask = None
        if attn_mask is not None:
            mask = _added(attn_mask, q)
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (len(q), self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def extra_repr(self) -> str:
        """Its settings, so that a printed model tells two apart."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, batch_first={self.batch_first}"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # skip_init draws no random weights, which would move torch's generator under the caller's feet
    layer = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(weight.requires_grad)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
