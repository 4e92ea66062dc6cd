from __future__ import annotations

import pytest
import torch

from sala_kernels.cache_write import torch_impl
from sala_kernels.cache_write.op import write_cache
from sala_kernels.paged import PagedBatch, PagedCache, cell_elements, view_pages
from sala_kernels.sparse_index.reference import compress_keys
from sala_kernels.testing import paged_batch, poisoned_cache, shuffled_block_table

LENGTHS = [1, 31, 32, 127, 128, 129, 64, 463]


def written_in_steps(
    step: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor], PagedCache, torch.Tensor]:
    """Write sequences of LENGTHS, ``step`` tokens of each at a time; dim 24 leaves padding cells."""
    generator = torch.Generator().manual_seed(step)
    keys = [torch.randn(n, 2, 24, generator=generator).to(dtype) for n in LENGTHS]
    values = [torch.randn(n, 2, 24, generator=generator).to(dtype) for n in LENGTHS]
    table = shuffled_block_table(LENGTHS, seed=step)
    cache = poisoned_cache(int(table.max()) + 1, 2, 24, dtype)
    for start in range(0, max(LENGTHS), step):
        ends = [min(start + step, n) for n in LENGTHS]
        news = [max(0, end - start) for end in ends]
        k, v = (
            torch.cat([x[start : start + step] for x in packed if len(x) > start])
            for packed in (keys, values)
        )
        write_cache(k, v, cache, paged_batch(news, ends, table))
    return keys, values, cache, table


def rows(cells: torch.Tensor, table_row: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A sequence's [blocks * rows, kv_heads, dim] of one part of the pages."""
    return cells[table_row[:num_blocks].long()].transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 7, 16, 64, 100, 500])
def test_pages_hold_keys_values_and_every_whole_mean(step: int, dtype: torch.dtype) -> None:
    keys, values, cache, table = written_in_steps(step, dtype)
    for k, v, row in zip(keys, values, table, strict=True):
        num_blocks = -(-len(k) // 64)
        assert torch.equal(rows(cache.keys, row, num_blocks)[: len(k)], k)
        assert torch.equal(rows(cache.values, row, num_blocks)[: len(k)], v)
        for part, window, stride in ((cache.fine_means, 32, 16), (cache.coarse_means, 128, 64)):
            expected = compress_keys(k, window, stride)
            stored = rows(part, row, num_blocks)
            torch.testing.assert_close(
                stored[1 : len(expected) + 1], expected, rtol=1e-2, atol=1e-6
            )
            # nothing else was written: no window before the first, none that is not whole
            assert stored[:1].isnan().all()
            assert stored[len(expected) + 1 :].isnan().all()


@pytest.mark.parametrize(
    ("window", "stride"), [(31, 16), (16, 16), (32, 32)], ids=["short", "no overlap", "sparse"]
)
def test_means_reject_other_windows(
    window: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_impl, "K1_WINDOW_TOKENS", window)
    monkeypatch.setattr(torch_impl, "K1_STRIDE_TOKENS", stride)
    with pytest.raises(AssertionError):
        test_pages_hold_keys_values_and_every_whole_mean(100, torch.float32)


def test_a_shared_page_keeps_its_means_for_both_sequences() -> None:
    # two sequences share their first two pages, as after a prefix hit
    k = torch.randn(192, 1, 32)
    cache = poisoned_cache(4, 1, 32, torch.float32)
    write_cache(
        k, k, cache, paged_batch([192], [192], torch.tensor([[0, 1, 2]], dtype=torch.int32))
    )
    before = cache.fine_means[:3].clone()
    tail = torch.randn(64, 1, 32)
    second = paged_batch([64], [192], torch.tensor([[0, 1, 3]], dtype=torch.int32))
    write_cache(tail, tail, cache, second)
    assert torch.equal(cache.fine_means[:3].nan_to_num(), before.nan_to_num())
    whole = torch.cat((k[:128], tail))
    expected = compress_keys(whole, 32, 16)[7:]
    torch.testing.assert_close(cache.fine_means[3].transpose(0, 1), expected)


def test_padding_rows_write_nothing() -> None:
    cache = poisoned_cache(2, 1, 32, torch.float32)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    batch = PagedBatch(
        torch.tensor([0, 5, 5], dtype=torch.int32),
        torch.tensor([5, 0], dtype=torch.int32),
        table,
        max_query_len=5,
        max_seq_len=5,
    )
    write_cache(torch.ones(8, 1, 32), torch.ones(8, 1, 32), cache, batch)
    assert cache.keys[1].isnan().all()
    assert cache.keys[0, 0, 5:].isnan().all()


def test_a_page_has_no_padding_at_the_released_shape() -> None:
    assert cell_elements(128) == 266
    cells = torch.zeros(3, 2, 64, 266)
    parts = view_pages(cells, 128)
    assert sum(part.numel() for part in parts) == cells.numel()
    assert {part.untyped_storage().data_ptr() for part in parts} == {
        cells.untyped_storage().data_ptr()
    }


def test_wrong_arguments_are_named() -> None:
    cache = poisoned_cache(1, 2, 32, torch.float32)
    batch = paged_batch([3], [3], shuffled_block_table([3], seed=0))
    good = torch.zeros(3, 2, 32)
    with pytest.raises(ValueError, match=r"v: expected shape \(3, 2, 32\), got \(4, 2, 32\)"):
        write_cache(good, torch.zeros(4, 2, 32), cache, batch)
    with pytest.raises(ValueError, match=r"seq_lens: expected torch.int32, got torch.int64"):
        PagedBatch(batch.query_start_loc, batch.seq_lens.long(), batch.block_table, 3, 3)
    with pytest.raises(ValueError, match=r"cells: expected shape \(1, 2, 64, 67\)"):
        view_pages(torch.zeros(1, 2, 64, 64), 32)
    with pytest.raises(NotImplementedError, match="write_cache runs on the CPU only"):
        write_cache(good.to("meta"), good.to("meta"), cache, batch)
