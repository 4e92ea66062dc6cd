from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sala_kernels.cache_write.op import write_cache
from sala_kernels.paged import PagedBatch, PagedCache
from sala_kernels.sparse_attend import (
    reference,
    triton_decode,
    triton_impl,
    triton_prefill,
    triton_softmax,
)
from sala_kernels.sparse_attend.op import attend_blocks
from sala_kernels.sparse_attend.triton_prefill import Tiling
from sala_kernels.sparse_index.op import select_blocks
from sala_kernels.spec import SparseSpec
from sala_kernels.testing import (
    paged_batch,
    poisoned_cache,
    relative_rms,
    shuffled_block_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# both sides are float32 (otherwise the output is rounded, to 8 or 11 bits, by tiles twice); summation order differs
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
LENGTHS = [1, 65, 700, 333]
SPARSE = SparseSpec(topk=4, window_tokens=64, init_blocks=1, dense_len=400)


def filled(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, lengths: list[int] = LENGTHS
) -> tuple[list[Tensor], list[Tensor], list[Tensor], PagedCache, PagedBatch]:
    """Queries, keys, values of ``lengths``, in poisoned pages, and the batch that prefills them all."""
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (
        [torch.randn(n, h, dim, generator=generator).to(dtype) for n in lengths]
        for h in (heads, kv_heads, kv_heads)
    )
    q = [2 * x for x in q]
    table = shuffled_block_table(lengths, seed=0)
    cache = poisoned_cache(int(table.max()) + 1, kv_heads, dim, dtype)
    batch = paged_batch(lengths, lengths, table)
    write_cache(torch.cat(k), torch.cat(v), cache, batch)
    return q, k, v, cache, batch


def expected_output(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, dense_len: int, hidden_tokens: int = 0
) -> Tensor:
    """Output of a sequence's last queries by the reference; a mutant hides their last tokens."""
    positions = torch.arange(len(k))[-len(q) :]
    num_blocks = -(-len(k) // 64)
    selected = (blocks[..., None] == torch.arange(num_blocks)).any(-2)
    selected |= (positions + 1 < dense_len)[:, None, None]
    visible = positions - hidden_tokens
    return reference.attend_blocks(q.float(), k.float(), v.float(), visible, selected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 24), (16, 1, 64)])
def test_matches_reference(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v, cache, batch = filled(heads, kv_heads, dim, dtype)
    blocks = select_blocks(torch.cat(q), cache, batch, SPARSE)
    outputs = attend_blocks(torch.cat(q), cache, batch, blocks, SPARSE).split(LENGTHS)
    for *qkv, chosen, output in zip(q, k, v, blocks.split(LENGTHS), outputs, strict=True):
        expected = expected_output(*qkv, chosen, SPARSE.dense_len)
        assert relative_rms(output, expected) < BOUND[dtype]


@pytest.mark.parametrize("num_new", [1, 2, 77])
def test_a_continuation_equals_the_same_rows_of_one_pass(num_new: int) -> None:
    q, k, v, cache, batch = filled(4, 2, 32, torch.float32)
    blocks = select_blocks(torch.cat(q), cache, batch, SPARSE)
    one_pass = attend_blocks(torch.cat(q), cache, batch, blocks, SPARSE).split(LENGTHS)
    news = [min(num_new, n) for n in LENGTHS]
    last = paged_batch(news, LENGTHS, batch.block_table)
    q_last = torch.cat([x[-n:] for x, n in zip(q, news, strict=True)])
    blocks = select_blocks(q_last, cache, last, SPARSE)
    output = attend_blocks(q_last, cache, last, blocks, SPARSE)
    expected = torch.cat([x[-n:] for x, n in zip(one_pass, news, strict=True)])
    assert relative_rms(output, expected) < BOUND[torch.float32]


MUTANTS: dict[str, Callable[[Tensor], tuple[Tensor, SparseSpec]]] = {
    "dense one token longer": lambda blocks: (blocks, replace(SPARSE, dense_len=401)),
    "dense one token shorter": lambda blocks: (blocks, replace(SPARSE, dense_len=399)),
    "all dense": lambda blocks: (blocks, replace(SPARSE, dense_len=10_000)),
    "one block short": lambda blocks: (blocks[..., 1:].contiguous(), SPARSE),
    "KV heads swapped": lambda blocks: (blocks.flip(1), SPARSE),
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
    with pytest.raises(ValueError, match=r"blocks: expected torch.int32, got torch.int64"):
        attend_blocks(packed, cache, batch, blocks.long(), SPARSE)
    with pytest.raises(ValueError, match="blocks: expected shape"):
        attend_blocks(packed, cache, batch, blocks[:, :1], SPARSE)
    with pytest.raises(ValueError, match="output: expected shape"):
        attend_blocks(packed, cache, batch, blocks, SPARSE, packed[1:])
    with pytest.raises(NotImplementedError, match="attend_blocks: expected tensors on cpu or cuda"):
        attend_blocks(packed.to("meta"), cache, batch, blocks, SPARSE)


# The Triton kernels. The interpreter is slow: few queries late in their sequences, and one dtype or shape a test.


def moved(batch: PagedBatch, device: str) -> PagedBatch:
    tensors = ("query_start_loc", "seq_lens", "block_table")
    return replace(batch, **{name: getattr(batch, name).to(device) for name in tensors})


def random_blocks(
    positions: Tensor, kv_heads: int, sparse: SparseSpec, generator: torch.Generator
) -> Tensor:
    """Lists as select_blocks returns, with random scores: what is chosen differs between neighbours."""
    own = (positions // 64)[:, None, None]
    block = torch.arange(int(own.max()) + 1)
    score = torch.rand(len(positions), kv_heads, len(block), generator=generator)
    forced = (block < sparse.init_blocks) | (block >= own - sparse.local_blocks)
    score = score.masked_fill(forced, 2.0).masked_fill(block > own, -1.0)
    best = score.topk(min(sparse.num_selected_blocks, len(block)), -1)
    never = len(block)
    chosen = best.indices.masked_fill(best.values < 0, never)
    missing = sparse.num_selected_blocks - chosen.shape[-1]
    chosen = torch.nn.functional.pad(chosen, (0, missing), value=never).sort(-1).values
    chosen = chosen.masked_fill(chosen == never, -1)
    chosen[positions + 1 < sparse.dense_len] = -1
    return chosen.int()


class Step:
    """New tokens of several sequences, some of which may be padding, and the reference's output."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        sparse: SparseSpec,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        hidden_tokens: int = 0,
    ) -> None:
        """Draw a step.

        Args:
            rows: (new tokens, tokens after the step) of each sequence.
            sparse: the selection's parameters.
            heads: query heads.
            kv_heads: KV heads.
            dim: head width.
            dtype: of the model.
            hidden_tokens: mutant of the expected output: a query does not attend its last tokens.
        """
        news, lengths = (list(column) for column in zip(*rows, strict=True))
        q, k, v, self.cache, batch = filled(heads, kv_heads, dim, dtype, lengths)
        self.sparse = sparse
        self.batch = paged_batch(news, lengths, batch.block_table)
        generator = torch.Generator().manual_seed(1)
        blocks, expected = [], []
        self.q = torch.cat([x[len(x) - new :] for x, new in zip(q, news, strict=True)])
        for query, key, value, new in zip(q, k, v, news, strict=True):
            if new:
                last = slice(len(query) - new, None)
                chosen = random_blocks(torch.arange(len(query))[last], kv_heads, sparse, generator)
                blocks.append(chosen)
                expected.append(
                    expected_output(
                        query[last], key, value, chosen, sparse.dense_len, hidden_tokens
                    )
                )
        self.blocks, self.expected = torch.cat(blocks), torch.cat(expected)

    def pad(self, tokens: int) -> None:
        """Append tokens of no sequence."""
        self.q = torch.cat([self.q, self.q.new_full((tokens, *self.q.shape[1:]), torch.nan)])
        garbage = self.blocks.new_full((tokens, *self.blocks.shape[1:]), 1 << 30)
        self.blocks = torch.cat([self.blocks, garbage])

    def error(self, device: str, attend: Callable[..., Any] = triton_impl.attend_blocks) -> float:
        """Run the kernels; return their error against the reference."""
        # a strided view, as the slice of a fused projection
        q = torch.cat([self.q, self.q], -1).to(device)[..., : self.q.shape[-1]]
        cache = PagedCache(*(part.to(device) for part in self.cache))
        output = torch.full(self.q.shape, torch.nan, dtype=q.dtype, device=device)
        batch = moved(self.batch, device)
        attend(q, cache, batch, self.blocks.to(device), self.sparse, output)
        assert output[len(self.expected) :].isnan().all()
        return relative_rms(output.cpu()[: len(self.expected)], self.expected)


SMALL = SparseSpec(topk=3, window_tokens=64, init_blocks=1, dense_len=400)
MIXED_ROWS = [(5, 5), (3, 65), (6, 402), (0, 64), (5, 707), (0, 1)]
"""Short; on a block's edge; across dense_len; padding; far in the sparse range; padding."""


@pytest.mark.parametrize("queries", [1, 4, 8])
def test_tiles_match_reference(queries: int, device: str) -> None:
    step = Step(MIXED_ROWS, SMALL)
    step.pad(3)

    def attend(*arguments: Any) -> None:
        triton_prefill.attend_prefill(
            *arguments, shared=Tiling(16, 4, 2), chosen=Tiling(queries, 4, 2)
        )

    assert step.error(device, attend) < BOUND[torch.float32]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 64), (3, 1, 32), (16, 1, 128), (32, 1, 16), (2, 1, 256)]
)
@pytest.mark.parametrize("decodes", [False, True], ids=["tiled", "split"])
def test_shapes_match_reference(
    heads: int, kv_heads: int, dim: int, decodes: bool, device: str
) -> None:
    step = Step([(1, 130), (1, 640), (1, 399)], SMALL, heads=heads, kv_heads=kv_heads, dim=dim)
    if decodes:
        step.batch = replace(step.batch, num_decodes=3, num_decode_tokens=3)
    assert step.error(device) < BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_matches_reference(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter does not compute in bfloat16")
    step = Step([(1, 500), *MIXED_ROWS], SMALL, dtype=dtype)
    step.batch = replace(step.batch, num_decodes=1, num_decode_tokens=1)
    assert step.error(device) < BOUND[dtype]


@pytest.mark.parametrize(
    "sparse",
    [
        SparseSpec(topk=2, window_tokens=64, init_blocks=0, dense_len=0),
        SparseSpec(topk=5, window_tokens=128, init_blocks=3, dense_len=600),
        SparseSpec(topk=11, window_tokens=64, init_blocks=1, dense_len=0),
    ],
    ids=["no initial block", "several initial blocks", "fewer blocks than selected"],
)
@pytest.mark.parametrize("decodes", [False, True], ids=["tiled", "split"])
def test_selections_match_reference(sparse: SparseSpec, decodes: bool, device: str) -> None:
    step = Step([(2, 64), (4, 602), (1, 320)], sparse)
    if decodes:
        step.batch = replace(step.batch, num_decodes=3, num_decode_tokens=7)
    assert step.error(device) < BOUND[torch.float32]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 398, 399, 400, 401])
def test_a_decode_of_any_length_matches_reference(length: int, device: str) -> None:
    step = Step([(1, length), (0, 64)], SMALL)
    step.batch = replace(step.batch, num_decodes=2, num_decode_tokens=2)
    step.pad(1)
    assert step.error(device) < BOUND[torch.float32]


@pytest.mark.parametrize("num_splits", [1, 4, 32])
def test_any_number_of_splits_matches_reference(num_splits: int, device: str) -> None:
    step = Step([(1, 399), (2, 700), (1, 1)], SMALL)
    step.batch = replace(step.batch, num_decodes=3, num_decode_tokens=4)

    def attend(*arguments: Any) -> None:
        triton_decode.attend_decodes(*arguments, num_splits=num_splits)

    assert step.error(device, attend) < BOUND[torch.float32]


def test_decodes_before_prefills(device: str) -> None:
    step = Step([(1, 450), (1, 70), (3, 450), (2, 2)], SMALL)
    step.batch = replace(step.batch, num_decodes=2, num_decode_tokens=2)
    assert step.error(device) < BOUND[torch.float32]


@pytest.mark.parametrize("window_tokens", [0, 128])
@pytest.mark.parametrize("decodes", [False, True], ids=["tiled", "split"])
def test_the_kernels_bound_rejects_another_selection(
    window_tokens: int, decodes: bool, device: str
) -> None:
    """The local window one block off; decodes take it from the list, so there the list is cut."""
    step = Step([(3, 707)], SMALL)
    if decodes:
        step.batch = replace(step.batch, num_decodes=1, num_decode_tokens=3)
        step.blocks = step.blocks[..., 1:].contiguous()
    else:
        # a list without the local block, or a forced block that no list holds
        step.sparse = replace(SMALL, window_tokens=window_tokens)
        own = torch.arange(704, 707)[:, None, None] // 64
        step.blocks = step.blocks.masked_fill(step.blocks == own - 1, 0).sort(-1).values
    assert step.error(device) > 10 * BOUND[torch.float32]


@pytest.mark.parametrize("decodes", [False, True], ids=["tiled", "split"])
def test_the_kernels_bound_rejects_a_mask_one_token_off(decodes: bool, device: str) -> None:
    step = Step([(3, 707)], SMALL, hidden_tokens=1)
    if decodes:
        step.batch = replace(step.batch, num_decodes=1, num_decode_tokens=3)
    assert step.error(device) > 10 * BOUND[torch.float32]


def without_rescaling(original: Any) -> Any:
    def accumulate(scores, values, attended, weighted, row_max, row_sum, precision):
        _, new_max, _ = original(scores, values, attended, weighted, row_max, row_sum, precision)
        added = original(scores, values, attended, weighted * 0, new_max, row_sum * 0, precision)
        return weighted + added[0], new_max, row_sum + added[2]

    return accumulate


@pytest.mark.parametrize("decodes", [False, True], ids=["tiled", "split"])
def test_the_kernels_bound_rejects_a_sum_that_is_not_rescaled(
    decodes: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("kernels are replaced in the interpreter")
    step = Step([(3, 707)], SMALL)
    if decodes:
        step.batch = replace(step.batch, num_decodes=1, num_decode_tokens=3)
    mutant = without_rescaling(triton_softmax.accumulate)
    for module in (triton_prefill, triton_decode):
        monkeypatch.setattr(module, "accumulate", mutant)
    assert step.error(device) > 10 * BOUND[torch.float32]


def test_unsupported_shapes_are_named(device: str) -> None:
    step = Step([(1, 1)], SMALL, dim=24)
    with pytest.raises(
        ValueError, match="head_dim: expected a power of two from 16 to 256, got 24"
    ):
        step.error(device)
    step = Step([(1, 1)], SMALL, heads=65, kv_heads=1)
    with pytest.raises(ValueError, match="q: expected at most 64 heads a KV head, got 65"):
        step.error(device)
