"""Attention over selected key blocks: exact softmax under a mask, differentiable in q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sala_kernels.spec import BLOCK_TOKENS


def attend_blocks(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, selected: Tensor | None
) -> Tensor:
    """Attend the tokens at or before each query that lie in its selected blocks.

    Args:
        q: [queries, heads, dim].
        keys: [tokens, kv_heads, dim], all keys up to the last query.
        values: as ``keys``.
        positions: [queries] int64, 0-based position of each query.
        selected: [queries, kv_heads, blocks] bool; None attends every block (dense).

    Returns:
        [queries, heads, dim] in the dtype of ``q``; softmax scale 1/sqrt(dim).
    """
    queries, heads, dim = q.shape
    tokens, kv_heads, _ = keys.shape
    group = heads // kv_heads
    token = torch.arange(tokens, device=q.device)
    mask = (token <= positions[:, None]).unsqueeze(0)
    if selected is not None:
        mask = mask & selected.permute(1, 0, 2)[:, :, token // BLOCK_TOKENS]
    output = scaled_dot_product_attention(
        q.view(queries, kv_heads, group, dim).permute(1, 2, 0, 3),
        keys.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1),
        values.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1),
        attn_mask=mask[:, None].expand(kv_heads, group, -1, -1),
    )
    return output.permute(2, 0, 1, 3).reshape(queries, heads, dim)
