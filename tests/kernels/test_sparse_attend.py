from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sala_kernels.cache_write.op import write_cache
from sala_kernels.sparse_attend import reference
from sala_kernels.sparse_attend.op import attend_blocks
from sala_kernels.sparse_index.op import select_blocks
from sala_kernels.spec import SparseSpec
from sala_kernels.testing import (
    paged_batch,
    poisoned_cache,
    relative_rms,
    shuffled_block_table,
)

if TYPE_CHECKING:
    from sala_kernels.paged import PagedBatch, PagedCache

# both sides are float32 (bfloat16: the output is rounded to 8 bits); summation order differs
BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
LENGTHS = [1, 65, 700, 333]
SPARSE = SparseSpec(topk=4, window_tokens=64, init_blocks=1, dense_len=400)


def filled(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], PagedCache, PagedBatch]:
    """Queries, keys, values of LENGTHS, in poisoned pages, and the batch that prefills them all."""
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (
        [torch.randn(n, h, dim, generator=generator).to(dtype) for n in LENGTHS]
        for h in (heads, kv_heads, kv_heads)
    )
    q = [2 * x for x in q]
    table = shuffled_block_table(LENGTHS, seed=0)
    cache = poisoned_cache(int(table.max()) + 1, kv_heads, dim, dtype)
    batch = paged_batch(LENGTHS, LENGTHS, table)
    write_cache(torch.cat(k), torch.cat(v), cache, batch)
    return q, k, v, cache, batch


def expected_output(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, dense_len: int
) -> torch.Tensor:
    positions = torch.arange(len(q))
    num_blocks = -(-len(q) // 64)
    selected = (blocks[..., None] == torch.arange(num_blocks)).any(-2)
    selected |= (positions + 1 < dense_len)[:, None, None]
    return reference.attend_blocks(q.float(), k.float(), v.float(), positions, selected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 24), (16, 1, 64)])
def test_matches_reference(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v, cache, batch = filled(heads, kv_heads, dim, dtype)
    blocks = select_blocks(torch.cat(q), cache, batch, SPARSE)
    outputs = attend_blocks(torch.cat(q), cache, batch, blocks, SPARSE.dense_len).split(LENGTHS)
    for *qkv, chosen, output in zip(q, k, v, blocks.split(LENGTHS), outputs, strict=True):
        expected = expected_output(*qkv, chosen, SPARSE.dense_len)
        assert relative_rms(output, expected) < BOUND[dtype]


@pytest.mark.parametrize("num_new", [1, 2, 77])
def test_a_continuation_equals_the_same_rows_of_one_pass(num_new: int) -> None:
    q, k, v, cache, batch = filled(4, 2, 32, torch.float32)
    blocks = select_blocks(torch.cat(q), cache, batch, SPARSE)
    one_pass = attend_blocks(torch.cat(q), cache, batch, blocks, SPARSE.dense_len).split(LENGTHS)
    news = [min(num_new, n) for n in LENGTHS]
    last = paged_batch(news, LENGTHS, batch.block_table)
    q_last = torch.cat([x[-n:] for x, n in zip(q, news, strict=True)])
    blocks = select_blocks(q_last, cache, last, SPARSE)
    output = attend_blocks(q_last, cache, last, blocks, SPARSE.dense_len)
    expected = torch.cat([x[-n:] for x, n in zip(one_pass, news, strict=True)])
    assert relative_rms(output, expected) < BOUND[torch.float32]


MUTANTS = {
    "dense one token longer": lambda blocks: (blocks, SPARSE.dense_len + 1),
    "dense one token shorter": lambda blocks: (blocks, SPARSE.dense_len - 1),
    "all dense": lambda blocks: (blocks, 10_000),
    "one block short": lambda blocks: (blocks[..., 1:].contiguous(), SPARSE.dense_len),
    "KV heads swapped": lambda blocks: (blocks.flip(1), SPARSE.dense_len),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_bound_rejects(mutant: str) -> None:
    q, k, v, cache, batch = filled(4, 2, 32, torch.float32)
    blocks = select_blocks(torch.cat(q), cache, batch, SPARSE)
    mutated = MUTANTS[mutant](blocks)
    output = attend_blocks(torch.cat(q), cache, batch, *mutated).split(LENGTHS)[2]
    expected = expected_output(q[2], k[2], v[2], blocks.split(LENGTHS)[2], SPARSE.dense_len)
    assert relative_rms(output, expected) > 10 * BOUND[torch.float32]


def test_wrong_arguments_are_named() -> None:
    q, _, _, cache, batch = filled(4, 2, 32, torch.float32)
    packed = torch.cat(q)
    blocks = torch.full((len(packed), 2, 3), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match="blocks: expected torch.int32, got torch.int64"):
        attend_blocks(packed, cache, batch, blocks.long(), 0)
    with pytest.raises(ValueError, match="blocks: expected shape"):
        attend_blocks(packed, cache, batch, blocks[:, :1], 0)
    with pytest.raises(NotImplementedError, match="attend_blocks runs on the CPU only"):
        attend_blocks(packed.to("meta"), cache, batch, blocks, 0)
