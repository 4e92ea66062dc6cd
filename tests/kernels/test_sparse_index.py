from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from sala_kernels.cache_write.op import write_cache
from sala_kernels.sparse_index import op, reference, torch_impl
from sala_kernels.spec import SparseSpec
from sala_kernels.testing import paged_batch, poisoned_cache, shuffled_block_table

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = runpy.run_path(str(GOLDEN / "inputs.py"))
RELEASED = SparseSpec(topk=64, window_tokens=2048, init_blocks=1, dense_len=0)
SMALL = SparseSpec(topk=3, window_tokens=128, init_blocks=1, dense_len=0)


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
    with pytest.raises(NotImplementedError, match="select_blocks runs on the CPU only"):
        op.select_blocks(torch.zeros(64, 4, 32, device="meta"), cache, batch, SMALL)
