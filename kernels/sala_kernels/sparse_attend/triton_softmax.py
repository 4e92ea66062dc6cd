"""What the attention kernels share: reading a page, one step of online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
"""Scores are kept in units of log(2), so that exp2 replaces exp."""
NO_MAX = tl.constexpr(-1e30)
"""Maximum of no score. Finite: the difference of two of them is 0, not NaN."""


def num_stages(dim: int, element_bytes: int) -> int:
    """Return how many blocks may be in flight, so that their keys and values fit the shared memory."""
    return {256: 3, 512: 2, 1024: 1}[max(256, dim * element_bytes)]


@triton.jit
def page_cells(head_cells, page, page_stride, block_tokens: tl.constexpr, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return pointers to a page's [block_tokens, dim] keys or values; rows are contiguous."""
    cell = tl.arange(0, block_tokens)[:, None] * dim + tl.arange(0, dim)[None, :]
    return head_cells + page.to(tl.int64) * page_stride + cell


@triton.jit
def accumulate(scores, values, attended, weighted, row_max, row_sum, precision: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take one block into the online softmax.

    Args:
        scores: [rows, keys] float32 in units of log(2), -inf where hidden.
        values: [keys, dim].
        attended: [rows] whether the row attends this block at all.
        weighted: [rows, dim] float32, sum of exp2(score - row_max) * value.
        row_max: [rows] largest score so far.
        row_sum: [rows] sum of exp2(score - row_max).
        precision: of the product.

    Returns:
        weighted, row_max, row_sum with the block.
    """
    block_max = tl.where(attended, tl.max(scores, 1), NO_MAX)
    new_max = tl.maximum(row_max, block_max)
    # a row that does not attend gets probabilities 0 by its shift: no select per score
    shift = tl.where(attended, new_max, float("inf"))
    probability = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(probability, 1)
    weighted = weighted * rescale[:, None]
    weighted = tl.dot(probability.to(values.dtype), values, weighted, input_precision=precision)
    return weighted, new_max, row_sum
