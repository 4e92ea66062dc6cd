from __future__ import annotations

import pytest
import torch

from sala_kernels.cache_write import torch_impl, triton_impl
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


def whole_cache(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    lengths: list[int],
    table: torch.Tensor,
    coarse_window: int = 128,
    shift: int = 0,
) -> PagedCache:
    """What the pages hold when ``lengths`` tokens of each sequence are written, one cell after another."""
    kv_heads, dim = keys[0].shape[1:]
    cache = poisoned_cache(int(table.max()) + 1, kv_heads, dim, keys[0].dtype)
    for k, v, length, row in zip(keys, values, lengths, table.tolist(), strict=True):
        for position in range(length):
            page, cell = row[position // 64], position % 64
            cache.keys[page, :, cell] = k[position]
            cache.values[page, :, cell] = v[position]
        for part, window, stride in (
            (cache.fine_means, 32, 16),
            (cache.coarse_means, coarse_window, 64),
        ):
            for end in range(window, length + 1, stride):
                mean = k[end - window + shift : end].double().mean(0)
                part[row[(end - 1) // 64], :, (end - 1) % 64 // stride] = mean.to(k.dtype)
    return cache


# (context, new tokens) of each sequence; a page, windows and steps begin and end everywhere in each other
STEPS = {
    "prompts": [(0, 1), (0, 63), (0, 64), (0, 65), (0, 0), (0, 200)],
    "one prompt": [(0, 130)],
    "chunks": [(37, 64), (63, 2), (128, 0), (100, 130), (127, 1), (15, 17), (190, 3), (1, 190)],
    "decodes": [(0, 1), (15, 1), (31, 1), (30, 1), (127, 1), (128, 0), (191, 1), (64, 1), (46, 1)],
    "drafts": [(30, 3), (126, 3), (63, 3), (62, 2), (0, 0), (0, 0)],
}


def triton_step(
    steps: list[tuple[int, int]], kv_heads: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[PagedCache, list[torch.Tensor], list[torch.Tensor], list[int], torch.Tensor]:
    """Write one step after brute-force contexts; k and v are slices of a projection with padding tokens."""
    generator = torch.Generator().manual_seed(len(steps))
    lengths = [context + new for context, new in steps]
    keys, values = (
        [torch.randn(max(n, 1), kv_heads, dim, generator=generator).to(dtype) for n in lengths]
        for _ in range(2)
    )
    table = shuffled_block_table(lengths, seed=len(steps))
    cache = whole_cache(keys, values, [context for context, _ in steps], table)
    new = [
        torch.cat([x[context : context + n] for x, (context, n) in zip(packed, steps, strict=True)])
        for packed in (keys, values)
    ]
    qkv = torch.full((len(new[0]) + 5, 4, kv_heads, dim), torch.nan, dtype=dtype)
    qkv[:-5, 2], qkv[:-5, 3] = new
    qkv = qkv.to(device)
    batch = paged_batch([n for _, n in steps], lengths, table)
    batch = PagedBatch(
        *(x.to(device) for x in (batch.query_start_loc, batch.seq_lens, batch.block_table)),
        batch.max_query_len,
        batch.max_seq_len,
    )
    cells = view_pages(whole_cells(cache).to(device), dim)
    triton_impl.write_cache(qkv[:, 2], qkv[:, 3], cells, batch)
    return view_pages(whole_cells(cells).cpu(), dim), keys, values, lengths, table


def whole_cells(cache: PagedCache) -> torch.Tensor:
    """The tensor that the parts are views of."""
    pages, kv_heads, _, dim = cache.keys.shape
    shape = (pages, kv_heads, 64, cell_elements(dim))
    return cache.keys.as_strided(shape, (*cache.keys.stride()[:2], cell_elements(dim), 1))


def assert_same_cells(actual: PagedCache, expected: PagedCache) -> None:
    """Keys and values exactly, means up to a rounding of sums in another order; unwritten cells still hold their NaN."""
    for part in ("keys", "values"):
        assert torch.equal(
            getattr(actual, part).nan_to_num(9), getattr(expected, part).nan_to_num(9)
        )
    for part in ("fine_means", "coarse_means"):
        means = getattr(expected, part)
        bound = torch.finfo(means.dtype).eps
        torch.testing.assert_close(
            getattr(actual, part), means, rtol=bound, atol=5e-7, equal_nan=True
        )


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 32), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_writes_what_brute_force_does(
    name: str, kv_heads: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    actual, keys, values, lengths, table = triton_step(STEPS[name], kv_heads, dim, dtype, device)
    assert_same_cells(actual, whole_cache(keys, values, lengths, table))


@pytest.mark.parametrize("mutation", [{"coarse_window": 64}, {"shift": 1}], ids=str)
def test_kernel_rejects_other_windows(mutation: dict[str, int], device: str) -> None:
    actual, *written = triton_step(STEPS["chunks"], 2, 32, torch.float16, device)
    keys, values, lengths, table = written
    with pytest.raises(AssertionError):
        assert_same_cells(actual, whole_cache(keys, values, lengths, table, **mutation))


def test_kernel_rejects_a_token_too_many(device: str) -> None:
    actual, keys, values, lengths, table = triton_step([(5, 9)], 2, 32, torch.float16, device)
    with pytest.raises(AssertionError):
        assert_same_cells(actual, whole_cache(keys, values, [lengths[0] - 1], table))


def test_kernel_gives_the_same_means_whatever_the_steps(device: str) -> None:
    keys = torch.randn(130, 1, 32, generator=torch.Generator().manual_seed(0)).half().to(device)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    caches = []
    for steps in ([130], [126, *[1] * 4]):
        cache = view_pages(torch.zeros(3, 1, 64, cell_elements(32), device=device).half(), 32)
        length = 0
        for new in steps:
            batch = paged_batch([new], [length + new], table)
            starts, lens, blocks = (
                x.to(device) for x in (batch.query_start_loc, batch.seq_lens, batch.block_table)
            )
            k = keys[length : length + new]
            triton_impl.write_cache(
                k, k, cache, PagedBatch(starts, lens, blocks, new, length + new)
            )
            length += new
        caches.append(cache)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


@pytest.mark.gpu
def test_kernel_reaches_pages_past_two_to_the_31_elements(device: str) -> None:
    num_pages = 2**31 // (2 * 64 * 266) + 2
    cells = torch.empty(num_pages, 2, 64, 266, dtype=torch.bfloat16, device=device)
    cache = view_pages(cells, 128)
    cache.keys[-2:] = torch.nan
    k = torch.randn(70, 2, 128, device=device).bfloat16()
    starts, lens, table = (
        torch.tensor(x, dtype=torch.int32, device=device)
        for x in ([0, 70], [70], [[num_pages - 1, num_pages - 2]])
    )
    triton_impl.write_cache(k, k, cache, PagedBatch(starts, lens, table, 70, 70))
    stored = torch.cat((cache.keys[-1], cache.keys[-2]), dim=1)
    assert torch.equal(stored[:, :70].transpose(0, 1), k)


def test_kernel_names_the_head_widths_it_takes(device: str) -> None:
    cache = poisoned_cache(1, 2, 24, torch.float32)
    batch = paged_batch([3], [3], shuffled_block_table([3], seed=0))
    with pytest.raises(
        ValueError, match="head_dim: expected a power of two from 16 to 256, got 24"
    ):
        triton_impl.write_cache(torch.zeros(3, 2, 24), torch.zeros(3, 2, 24), cache, batch)


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
    with pytest.raises(
        NotImplementedError, match="write_cache: expected tensors on cpu or cuda, got meta"
    ):
        write_cache(good.to("meta"), good.to("meta"), cache, batch)
