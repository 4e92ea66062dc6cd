from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from sala_kernels.cache_write.op import write_cache
from sala_kernels.paged import PagedCache
from sala_kernels.sparse_index import op, reference, torch_impl, triton_impl
from sala_kernels.spec import SparseSpec
from sala_kernels.testing import paged_batch, poisoned_cache, shuffled_block_table

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = runpy.run_path(str(GOLDEN / "inputs.py"))
RELEASED = SparseSpec(topk=64, window_tokens=2048, init_blocks=1, dense_len=0)
SMALL = SparseSpec(topk=3, window_tokens=128, init_blocks=1, dense_len=0)
CHOICE = SparseSpec(topk=5, window_tokens=64, init_blocks=1, dense_len=0)
"""Three blocks by score."""


def golden(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, queries, their positions and the released kernels' sets of one case."""
    seed, num_keys, is_decode = INPUTS["CASES"][case]
    keys, positions, q = INPUTS["inputs"](seed, num_keys)
    if is_decode:
        positions, q = positions[-1:], q[-1:]
    stored = np.load(GOLDEN / "selection.npz")
    assert (stored[f"{case}_pos"] == positions).all()
    blocks = torch.from_numpy(stored[f"{case}_blocks"].astype(np.int32))
    keys, q = (torch.from_numpy(x).bfloat16() for x in (keys, q))
    return keys, q, torch.from_numpy(positions), blocks


def as_sets(selected: torch.Tensor, width: int) -> torch.Tensor:
    """Block numbers, ascending, then -1, of a [queries, kv_heads, blocks] mask."""
    number = torch.where(selected, torch.arange(selected.shape[-1]), 1 << 30)
    number = torch.nn.functional.pad(number, (0, width), value=1 << 30).sort(dim=-1).values
    return torch.where(number == 1 << 30, -1, number)[..., :width].to(torch.int32)


def run_paged(
    q: torch.Tensor, keys: torch.Tensor, sparse: SparseSpec, steps: list[int]
) -> torch.Tensor:
    """Select for every token of one sequence that arrives in ``steps``."""
    table = shuffled_block_table([len(keys)], seed=1)
    cache = poisoned_cache(table.numel(), *keys.shape[1:], keys.dtype)
    chunks, end = [], 0
    for num_new in steps:
        new = slice(end, end + num_new)
        end += num_new
        batch = paged_batch([num_new], [end], table)
        write_cache(keys[new], keys[new], cache, batch)
        chunks.append(op.select_blocks(q[new], cache, batch, sparse))
    return torch.cat(chunks)


@pytest.mark.parametrize("case", INPUTS["CASES"])
def test_reference_selects_as_released(case: str) -> None:
    keys, q, positions, expected = golden(case)
    # a query sees its own past only: the reference must not mind later keys
    selected = reference.select_blocks(q, keys, positions, RELEASED)
    assert torch.equal(as_sets(selected, RELEASED.num_selected_blocks), expected)


@pytest.mark.parametrize("case", INPUTS["CASES"])
def test_paged_op_selects_as_released_token_by_token(case: str) -> None:
    keys, q, positions, expected = golden(case)
    table = shuffled_block_table([len(keys)], seed=0)
    cache = poisoned_cache(table.numel(), 2, 128, torch.bfloat16)
    write_cache(keys, keys, cache, paged_batch([len(keys)], [len(keys)], table))
    # each sampled query is a sequence of its own over the same pages
    tables = table.expand(len(positions), -1).contiguous()
    batch = paged_batch([1] * len(positions), (positions + 1).tolist(), tables)
    assert torch.equal(op.select_blocks(q, cache, batch, RELEASED), expected)


def test_paged_op_selects_as_released_in_chunks() -> None:
    keys, q, positions, expected = golden("prefill_8192")
    everywhere = torch.zeros(len(keys), 32, 128, dtype=torch.bfloat16)
    everywhere[positions] = q
    blocks = run_paged(everywhere, keys, RELEASED, steps=[5000, 1, 3191])
    assert torch.equal(blocks[positions], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 24), (16, 1, 64)])
@pytest.mark.parametrize("steps", [[1100], [64] * 17 + [12], [577, 1, 1, 521], [31, 96, 973]])
def test_paged_op_matches_reference(
    steps: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(heads)
    q = (3 * torch.randn(1100, heads, dim, generator=generator)).to(dtype)
    keys = torch.randn(1100, kv_heads, dim, generator=generator).to(dtype)
    expected = reference.select_blocks(q, keys, torch.arange(1100), SMALL)
    assert torch.equal(run_paged(q, keys, SMALL, steps), as_sets(expected, 5))


@pytest.mark.parametrize("steps", [[700], [65] * 10 + [50]])
@pytest.mark.parametrize(
    "sparse",
    [
        SparseSpec(topk=2, window_tokens=64, init_blocks=0, dense_len=0),
        SparseSpec(topk=5, window_tokens=64, init_blocks=4, dense_len=300),
        SparseSpec(topk=40, window_tokens=64, init_blocks=1, dense_len=0),
    ],
    ids=["no initial block", "only one by score", "more blocks than there are"],
)
def test_other_parameters_match_reference(sparse: SparseSpec, steps: list[int]) -> None:
    # as many KV heads as heads
    q, keys = 3 * torch.randn(700, 2, 32), torch.randn(700, 2, 32)
    positions = torch.arange(700)
    expected = reference.select_blocks(q, keys, positions, sparse)
    expected &= (positions + 1 >= sparse.dense_len)[:, None, None]
    width = sparse.num_selected_blocks
    assert torch.equal(run_paged(q, keys, sparse, steps), as_sets(expected, width))


@pytest.mark.parametrize(("dtype", "peak"), [(torch.float16, 60.0), (torch.bfloat16, 300.0)])
def test_scores_beyond_the_dtype_do_not_displace_forced_blocks(
    dtype: torch.dtype, peak: float
) -> None:
    # short bursts in blocks 2 to 6: their fine windows overflow, the coarse ones that normalise do not
    keys, q = torch.zeros(1024, 1, 32), torch.zeros(1024, 1, 32)
    q[..., 0] = 1.0
    for block in range(2, 7):
        keys[64 * block + 16 : 64 * block + 48, 0, 0] = peak * 32**0.5
    q, keys = q.to(dtype), keys.to(dtype)
    last = run_paged(q, keys, SMALL, [1024])[-1, 0]
    assert last.tolist() == [0, 2, 13, 14, 15]
    selected = reference.select_blocks(q[-1:], keys, torch.tensor([1023]), SMALL)
    assert torch.equal(as_sets(selected, 5)[0, 0], last)


def test_equal_scores_go_to_the_lower_block() -> None:
    # equal keys everywhere: every block that is not forced ties
    keys, q = torch.ones(1024, 1, 32), torch.ones(1024, 2, 32)
    blocks = run_paged(q, keys, SMALL, [1024])
    assert blocks[-1, 0].tolist() == [0, 1, 13, 14, 15]


def test_dense_tokens_select_nothing() -> None:
    sparse = SparseSpec(topk=3, window_tokens=128, init_blocks=1, dense_len=200)
    q, keys = torch.randn(300, 2, 32), torch.randn(300, 1, 32)
    blocks = run_paged(q, keys, sparse, [300])
    assert (blocks[:199] == -1).all()
    assert (blocks[199:, :, 0] == 0).all()


MUTANTS = {
    "32 local blocks instead of 33": ("local_blocks", lambda self: self.window_tokens // 64 - 1),
    "one block short": ("num_selected_blocks", lambda self: self.topk + self.local_blocks - 1),
    "one block more": ("num_selected_blocks", lambda self: self.topk + self.local_blocks + 1),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_golden_sets_reject_parameters_off_by_one(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value = MUTANTS[mutant]
    monkeypatch.setattr(SparseSpec, name, property(value))
    assert_golden_fails()


def test_golden_sets_reject_the_fine_normaliser(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_impl._group_scores

    def by_fine(
        q: torch.Tensor, fine: torch.Tensor, coarse: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        return original(q, fine, fine[:, : coarse.shape[1]], position)

    monkeypatch.setattr(torch_impl, "_group_scores", by_fine)
    assert_golden_fails()


def test_golden_sets_reject_windows_visible_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_impl._num_visible

    def early(position: torch.Tensor, window_tokens: int, stride_tokens: int) -> torch.Tensor:
        return (original(position, window_tokens, stride_tokens) - 1).clamp(min=0)

    monkeypatch.setattr(torch_impl, "_num_visible", early)
    assert_golden_fails()


def assert_golden_fails() -> None:
    keys, q, positions, expected = golden("prefill_12345")
    table = shuffled_block_table([len(keys)], seed=0)
    cache = poisoned_cache(table.numel(), 2, 128, torch.bfloat16)
    write_cache(keys, keys, cache, paged_batch([len(keys)], [len(keys)], table))
    tables = table.expand(len(positions), -1).contiguous()
    batch = paged_batch([1] * len(positions), (positions + 1).tolist(), tables)
    blocks = op.select_blocks(q, cache, batch, RELEASED)
    assert blocks.shape != expected.shape or not torch.equal(blocks, expected)


def test_wrong_arguments_are_named() -> None:
    table = shuffled_block_table([64], seed=0)
    batch = paged_batch([64], [64], table)
    cache = poisoned_cache(1, 2, 32, torch.float32)
    with pytest.raises(ValueError, match=r"q: expected shape \(64, 4, 32\), got \(64, 4, 16\)"):
        op.select_blocks(torch.zeros(64, 4, 16), cache, batch, SMALL)
    with pytest.raises(ValueError, match=r"q: expected torch.float32, got torch.bfloat16"):
        op.select_blocks(torch.zeros(64, 4, 32).bfloat16(), cache, batch, SMALL)
    with pytest.raises(ValueError, match="q: expected a multiple of 2 KV heads, got 3 heads"):
        op.select_blocks(torch.zeros(64, 3, 32), cache, batch, SMALL)


def test_other_devices_are_refused() -> None:
    batch = paged_batch([64], [64], shuffled_block_table([64], seed=0))
    cache = poisoned_cache(1, 2, 32, torch.float32)
    with pytest.raises(
        NotImplementedError, match="select_blocks: expected tensors on cpu or cuda, got meta"
    ):
        op.select_blocks(torch.zeros(64, 4, 32, device="meta"), cache, batch, SMALL)


def run_triton(
    device: str,
    q: torch.Tensor,
    keys: list[torch.Tensor],
    new: list[int],
    sparse: SparseSpec,
    num_decodes: int = 0,
    padding: int = 0,
    max_seq_len: int = 0,
) -> torch.Tensor:
    """Select by the kernels for the last ``new`` tokens of each sequence, ``padding`` sequences after them."""
    lens = [len(k) for k in keys]
    table = shuffled_block_table(lens, seed=1)
    cache = poisoned_cache(table.numel(), *keys[0].shape[1:], keys[0].dtype)
    write_cache(torch.cat(keys), torch.cat(keys), cache, paged_batch(lens, lens, table))
    batch = paged_batch(
        new + [0] * padding,
        lens + [1] * padding,
        torch.nn.functional.pad(table, (0, 0, 0, padding), value=-1),
    )
    batch = dataclasses.replace(
        batch,
        query_start_loc=batch.query_start_loc.to(device),
        seq_lens=batch.seq_lens.to(device),
        block_table=batch.block_table.to(device),
        max_seq_len=max(max_seq_len, *lens),
        num_decodes=num_decodes,
        num_decode_tokens=sum(new[:num_decodes]),
    )
    cache = PagedCache(*(part.to(device) for part in cache))
    return triton_impl.select_blocks(q.to(device), cache, batch, sparse).cpu()


def random_step(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, lens: list[int], new: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Packed queries and each sequence's keys."""
    generator = torch.Generator().manual_seed(heads + dim)
    q = (3 * torch.randn(sum(new), heads, dim, generator=generator)).to(dtype)
    keys = [torch.randn(n, kv_heads, dim, generator=generator).to(dtype) for n in lens]
    return q, keys


def by_reference(
    q: torch.Tensor, keys: list[torch.Tensor], new: list[int], sparse: SparseSpec
) -> torch.Tensor:
    """Select by brute force, each sequence alone."""
    rows = []
    for queries, k in zip(q.split(new), keys, strict=True):
        positions = torch.arange(len(k) - len(queries), len(k))
        selected = reference.select_blocks(queries, k, positions, sparse)
        selected &= (positions + 1 >= sparse.dense_len)[:, None, None]
        rows.append(as_sets(selected, sparse.num_selected_blocks))
    return torch.cat(rows)


def mismatch(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the blocks in ``expected`` that are not in ``actual``'s set; ``actual`` must be ordered."""
    number = torch.where(actual < 0, 1 << 30, actual)
    assert (number.diff() > 0).logical_or(number[..., 1:] == 1 << 30).all(), (
        "not ascending, then -1"
    )
    assert ((actual >= 0).sum(-1) == (expected >= 0).sum(-1)).all()
    missing = (expected[..., None] != actual[..., None, :]).all(-1)
    return float(missing.sum() / (expected >= 0).sum())


# float32 sums in another order may turn a rounding of a 16-bit score; a planted fault moves 5 % and more
TOLERANCE = 0.002
STEPS = {  # name: (lengths, new tokens, decoding sequences, sequences of padding)
    "chunk": ([700, 5], [19, 5], 0, 0),
    "decode": ([700, 64, 1100, 449], [1, 1, 1, 1], 4, 2),
    "drafts": ([700, 900], [3, 5], 2, 1),
    "mixed": ([900, 1, 65, 1030, 63, 515], [1, 1, 2, 11, 5, 17], 3, 2),
}


def dtypes(device: str) -> list[torch.dtype]:
    # Triton's interpreter computes bfloat16 wrongly
    exact = [torch.float32, torch.float16]
    return [*exact, torch.bfloat16] if device == "cuda" else exact


@pytest.fixture(autouse=True)
def few_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one after another what fills a GPU: fewer shares of the keys, still several."""
    if device == "cpu":
        monkeypatch.setattr(triton_impl, "DECODE_PROGRAMS", 16)


@functools.cache
def step_result(
    device: str, step: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    lens, new, num_decodes, padding = STEPS[step]
    q, keys = random_step(dtype, heads, kv_heads, dim, lens, new)
    return run_triton(device, q, keys, new, CHOICE, num_decodes, padding), q, keys


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 16), (17, 1, 64)])
def test_kernels_match_reference(
    device: str, step: str, heads: int, kv_heads: int, dim: int
) -> None:
    if device == "cpu" and heads == 17 and step != "mixed":
        pytest.skip(
            "the other steps are a GPU's work, not the interpreter's; a mixed one has them all"
        )
    for dtype in dtypes(device) if dim == 32 or device == "cuda" else [torch.float16]:
        blocks, q, keys = step_result(device, step, dtype, heads, kv_heads, dim)
        expected = by_reference(q, keys, STEPS[step][1], CHOICE)
        assert mismatch(blocks, expected) <= (0 if dtype == torch.float32 else TOLERANCE)


def without_window(first: int, last: int) -> object:
    """Pool windows 4b - 1 + first to 4b + 3 - last."""

    def pool(scores: torch.Tensor, num_blocks: int) -> torch.Tensor:
        padded = torch.nn.functional.pad(scores, (1, num_blocks * 4 - scores.shape[-1]))
        return padded.unfold(-1, 5, 4)[..., first : 5 - last].amax(-1)

    return pool


def one_row_late(keys: torch.Tensor, window_tokens: int, stride_tokens: int) -> torch.Tensor:
    return ORIGINAL_COMPRESS(keys, window_tokens, stride_tokens).roll(1, 0)


def fine_for_coarse(keys: torch.Tensor, window_tokens: int, stride_tokens: int) -> torch.Tensor:
    return ORIGINAL_COMPRESS(keys, 32, 16)[:: stride_tokens // 16]


ORIGINAL_COMPRESS = reference.compress_keys
FAULTS = {
    "without the window before": (reference, "_pool_to_blocks", without_window(1, 0)),
    "without the window after": (reference, "_pool_to_blocks", without_window(0, 1)),
    "rows read one late": (reference, "compress_keys", one_row_late),
    "normalised by fine windows": (reference, "compress_keys", fine_for_coarse),
    "a local block short": (SparseSpec, "local_blocks", property(lambda self: 0)),
}


@pytest.mark.parametrize("step", ["chunk", "drafts"])
@pytest.mark.parametrize("fault", FAULTS)
def test_tolerance_rejects_planted_faults(
    device: str, step: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, q, keys = step_result(device, step, torch.float16, 4, 2, 32)
    monkeypatch.setattr(*FAULTS[fault])
    monkeypatch.setattr(SparseSpec, "num_selected_blocks", property(lambda self: 6))
    assert mismatch(blocks, by_reference(q, keys, STEPS[step][1], CHOICE)) > 5 * TOLERANCE


def test_decode_selects_as_prefill(device: str) -> None:
    lens, new = [1100, 515, 640], [1, 1, 1]
    for dtype in dtypes(device):
        q, keys = random_step(dtype, 4, 1, 64, lens, new)
        prefill = run_triton(device, q, keys, new, CHOICE)
        # replayed in a graph that was captured for longer sequences
        decode = run_triton(device, q, keys, new, CHOICE, num_decodes=3, max_seq_len=200_000)
        assert mismatch(decode, prefill) <= TOLERANCE


@pytest.mark.parametrize("num_decodes", [0, 1])
def test_slices_of_a_chunk_do_not_change_it(
    device: str, num_decodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tiles of 8 queries, so slices of 8 tokens: the second has tokens of two sequences, the third is a rest
    lens, new = [600, 650, 500], [1, 11, 7]
    q, keys = random_step(torch.float32, 4, 1, 16, lens, new)
    whole = run_triton(device, q, keys, new, CHOICE, num_decodes)
    monkeypatch.setattr(triton_impl, "WORKSPACE_BYTES", 1)
    assert torch.equal(run_triton(device, q, keys, new, CHOICE, num_decodes), whole)


@pytest.mark.parametrize("num_decodes", [0, 1])
@pytest.mark.parametrize(
    "sparse",
    [
        SparseSpec(topk=2, window_tokens=64, init_blocks=0, dense_len=0),
        SparseSpec(topk=5, window_tokens=64, init_blocks=4, dense_len=697),
        SparseSpec(topk=40, window_tokens=64, init_blocks=1, dense_len=0),
    ],
    ids=["no initial block", "some dense", "more blocks than there are"],
)
def test_kernels_take_other_parameters(device: str, num_decodes: int, sparse: SparseSpec) -> None:
    q, keys = random_step(torch.float32, 2, 2, 32, [700], [6])
    blocks = run_triton(device, q, keys, [6], sparse, num_decodes)
    assert torch.equal(blocks, by_reference(q, keys, [6], sparse))


@pytest.mark.parametrize("num_decodes", [0, 1])
def test_kernels_give_ties_to_the_lower_block(device: str, num_decodes: int) -> None:
    for dtype in dtypes(device):
        q, keys = torch.ones(1, 2, 32, dtype=dtype), torch.ones(1024, 1, 32, dtype=dtype)
        blocks = run_triton(device, q, [keys], [1], CHOICE, num_decodes)
        assert blocks[0, 0].tolist() == [0, 1, 2, 3, 14, 15]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("num_decodes", [0, 1])
def test_kernels_saturate(device: str, num_decodes: int) -> None:
    peaks = {torch.float16: 60.0, torch.bfloat16: 300.0, torch.float32: 300.0}
    for dtype in dtypes(device):
        keys, q = torch.zeros(1024, 1, 32), torch.zeros(1, 1, 32)
        q[..., 0] = 1.0
        for block in range(2, 7):
            keys[64 * block + 16 : 64 * block + 48, 0, 0] = peaks[dtype] * 32**0.5
        blocks = run_triton(device, q.to(dtype), [keys.to(dtype)], [1], CHOICE, num_decodes)
        assert blocks[0, 0].tolist() == [0, 2, 3, 4, 14, 15]


@pytest.mark.parametrize("num_decodes", [False, True])
@pytest.mark.parametrize("case", INPUTS["CASES"])
def test_kernels_select_as_released(device: str, case: str, num_decodes: bool) -> None:
    if device == "cpu":
        pytest.skip("bfloat16 and 20,000 keys: a GPU's work, not the interpreter's")
    keys, q, positions, expected = golden(case)
    table = shuffled_block_table([len(keys)], seed=0)
    cache = poisoned_cache(table.numel(), 2, 128, torch.bfloat16)
    write_cache(keys, keys, cache, paged_batch([len(keys)], [len(keys)], table))
    num_seqs = len(positions)
    tables = table.expand(num_seqs, -1).contiguous()
    batch = paged_batch([1] * num_seqs, (positions + 1).tolist(), tables)
    batch = dataclasses.replace(
        batch,
        query_start_loc=batch.query_start_loc.to(device),
        seq_lens=batch.seq_lens.to(device),
        block_table=batch.block_table.to(device),
        num_decodes=num_seqs if num_decodes else 0,
        num_decode_tokens=num_seqs if num_decodes else 0,
    )
    cache = PagedCache(*(part.to(device) for part in cache))
    blocks = op.select_blocks(q.to(device), cache, batch, RELEASED).cpu()
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize(
    ("heads", "dim", "window_tokens", "max_seq_len", "message"),
    [
        (2, 24, 128, 64, "head_dim: expected a power of two from 16 to 256, got 24"),
        (65, 16, 128, 64, "q: expected at most 64 heads a KV head, got 65"),
        (2, 16, 0, 64, "window_tokens: expected at least 64, got 0"),
        (2, 16, 128, 1 << 23, "max_seq_len: expected at most 4194304 tokens, got 8388608"),
    ],
)
def test_kernels_name_what_they_cannot_do(
    heads: int, dim: int, window_tokens: int, max_seq_len: int, message: str
) -> None:
    sparse = dataclasses.replace(CHOICE, window_tokens=window_tokens)
    batch = paged_batch([64], [64], shuffled_block_table([64], seed=0))
    batch = dataclasses.replace(batch, max_seq_len=max_seq_len)
    cache = poisoned_cache(1, 1, dim, torch.float32)
    with pytest.raises(ValueError, match=message):
        triton_impl.select_blocks(torch.zeros(64, heads, dim), cache, batch, sparse)
