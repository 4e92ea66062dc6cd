from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sala_kernels.lightning import torch_impl, triton_impl
from sala_kernels.lightning.op import StateBatch, lightning_attention
from sala_kernels.lightning.reference import lightning_chunked, lightning_recurrent
from sala_kernels.testing import relative_rms

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

# both sides are float32; the chunked form sums in another order
BOUND = 2e-6
OUTPUT_BOUND = {torch.float32: BOUND, torch.float16: 1e-3, torch.bfloat16: 4e-3}
STATE_BOUND = {torch.float32: BOUND, torch.float16: 1e-3, torch.bfloat16: 2e-5}
MUTANT_FACTOR = 3
"""A planted mistake exceeds the bound by this much."""
HEADS, DIM, SCALE = 2, 16, 0.2
SLOPES = torch.tensor([0.8409, 0.03])
SEGMENT = 128


@dataclass
class Kernel:
    """One implementation and where its tensors live."""

    module: ModuleType
    device: str

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, batch: StateBatch, slopes: Tensor
    ) -> Tensor:
        """Run on copies on the device; ``state`` is updated in place with its layout."""
        pool = torch.empty_strided(state.shape, state.stride(), device=self.device).copy_(state)
        fields = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        batch = replace(batch, **{name: value.to(self.device) for name, value in fields.items()})
        q, k, v, slopes = (x.to(self.device) for x in (q, k, v, slopes))
        output = self.module.lightning_attention(q, k, v, slopes, SCALE, pool, batch)
        assert output.is_contiguous()
        state.copy_(pool)
        return output.cpu()


@pytest.fixture(params=["torch", "triton"])
def kernel(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_impl, "SEGMENT_TOKENS", SEGMENT)
    return Kernel(torch_impl, "cpu") if request.param == "torch" else Kernel(triton_impl, device)


def state_batch(
    query_lens: list[int],
    slots: list[list[int]],
    contexts: list[bool],
    initial_column: list[int] | None = None,
    num_decodes: int = 0,
) -> StateBatch:
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return StateBatch(
        starts,
        # neither rows nor columns are contiguous
        torch.tensor(slots, dtype=torch.int32).repeat_interleave(2, 1)[:, ::2],
        torch.tensor(contexts),
        max(query_lens),
        None if initial_column is None else torch.tensor(initial_column, dtype=torch.int32),
        num_decodes,
        sum(query_lens[:num_decodes]),
    )


def random_qkv(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Slices of one packed projection."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(tokens, 3 * HEADS * DIM, generator=generator).to(dtype)
    return [x.unflatten(-1, (HEADS, DIM)) for x in packed.chunk(3, dim=-1)]


def poisoned_state(slots: int) -> Tensor:
    # every other slot of a larger pool, as when pages are padded
    return torch.full((2 * slots, HEADS, DIM, DIM), torch.nan)[::2]


def run_steps(kernel: Kernel, tokens: int, steps: list[int], slopes: Tensor = SLOPES) -> Tensor:
    """Output of one sequence in slot 1 that arrives in ``steps``, from poisoned memory."""
    q, k, v = random_qkv(tokens)
    state, outputs, start = poisoned_state(3), [], 0
    for size in steps:
        new = slice(start, start + size)
        batch = state_batch([size], [[1]], [start > 0], num_decodes=int(size == 1))
        outputs.append(kernel(q[new], k[new], v[new], state, batch, slopes))
        start += size
    assert state[[0, 2]].isnan().all()
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "steps", [[1], [2], [63], [64], [65], [200], [64, 64, 72], [1] * 20, [100, 1, 37, 1, 1]]
)
def test_matches_the_recurrence(kernel: Kernel, steps: list[int]) -> None:
    tokens = sum(steps)
    expected, _ = lightning_recurrent(*random_qkv(tokens), SLOPES, SCALE)
    assert relative_rms(run_steps(kernel, tokens, steps), expected) < BOUND


def test_the_fastest_head_does_not_overflow(kernel: Kernel) -> None:
    # exp(+s j) split off from exp(-s i) is infinite after 104 tokens at this slope
    slopes = torch.full((HEADS,), 0.8409)
    expected, _ = lightning_recurrent(*random_qkv(300), slopes, SCALE)
    assert relative_rms(run_steps(kernel, 300, [300], slopes), expected) < BOUND


def worst_of_a_mixed_step(kernel: Kernel, dtype: torch.dtype, num_decodes: int = 3) -> float:
    """Run every kind of sequence in one step; return the largest error as a multiple of its bound.

    Infinite when a slot of no sequence was written.
    """
    lens = [1, 3, 0, 2, 260, 140, 90, 1, 128, 5, 0]
    slots = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(len(lens))]
    slots[2][0] = slots[9][0] = slots[10][0] = -1
    contexts = [True, True, False, False, True, False, True, True, True, True, False]
    columns = [2, 1, 0, 2, 1, 2, 0, 2, 1, 0, 0]
    q, k, v = random_qkv(sum(lens) + 7, dtype)
    before = poisoned_state(3 * len(lens))
    generator = torch.Generator().manual_seed(1)
    for row, column, has_context in zip(slots, columns, contexts, strict=True):
        if has_context:
            before[row[column]] = torch.randn(HEADS, DIM, DIM, generator=generator)
    state = poisoned_state(3 * len(lens)).copy_(before)
    batch = state_batch(lens, slots, contexts, columns, num_decodes)
    output = kernel(q, k, v, state, batch, SLOPES)

    ratios, start, expected_state = [], 0, before.clone()
    for i, size in enumerate(lens):
        new = slice(start, start + size)
        start += size
        if slots[i][0] < 0 or size == 0:
            continue
        initial = before[slots[i][columns[i]]] if contexts[i] else None
        expected, after = lightning_recurrent(q[new], k[new], v[new], SLOPES, SCALE, initial)
        ratios.append(relative_rms(output[new], expected) / OUTPUT_BOUND[dtype])
        expected_state[slots[i][0]] = after
        for j in range(size if i < num_decodes else 0):
            part = slice(new.start, new.start + j + 1)
            _, after = lightning_recurrent(q[part], k[part], v[part], SLOPES, SCALE, initial)
            expected_state[slots[i][j]] = after
    assert output.dtype == dtype
    written = ~expected_state.isnan().flatten(1).any(1)
    if not state[~written].isnan().all():
        return torch.inf
    for actual, expected in zip(state[written], expected_state[written], strict=True):
        ratios.append(relative_rms(actual, expected) / STATE_BOUND[dtype])
    return max(ratios)


@pytest.mark.parametrize("num_decodes", [0, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_mixed_step_equals_each_sequence_alone(
    kernel: Kernel, dtype: torch.dtype, num_decodes: int
) -> None:
    if kernel.module is triton_impl and kernel.device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    assert worst_of_a_mixed_step(kernel, dtype, num_decodes) < 1


def test_rejected_drafts_leave_no_trace(kernel: Kernel) -> None:
    q, k, v = random_qkv(20)
    expected, _ = lightning_recurrent(q, k, v, SLOPES, SCALE)
    state, slots = poisoned_state(6), [[4, 0, 3, 1, 5]]
    kernel(q[:10], k[:10], v[:10], state, state_batch([10], slots, [False], [3]), SLOPES)
    # a token and four drafts, the last two of them wrong; then again from the column of the second draft
    wrong = [torch.cat((x[10:13], 7 * x[:2])) for x in (q, k, v)]
    output = kernel(*wrong, state, state_batch([5], slots, [True], [0], num_decodes=1), SLOPES)
    assert relative_rms(output[:3], expected[10:13]) < BOUND
    for start, column in ((13, 2), (18, 4)):
        new = slice(start, min(start + 5, 20))
        batch = state_batch([new.stop - start], slots, [True], [column], num_decodes=1)
        output = kernel(q[new], k[new], v[new], state, batch, SLOPES)
        assert relative_rms(output, expected[new]) < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_head_widths_of_several_tiles(
    device: str, monkeypatch: pytest.MonkeyPatch, dim: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DIM", dim)
    monkeypatch.setattr(triton_impl, "SEGMENT_TOKENS", SEGMENT)
    q, k, v = random_qkv(101, dtype)
    initial = torch.randn(2, HEADS, dim, dim, generator=torch.Generator().manual_seed(1))
    batch = state_batch([1, 100], [[0], [1]], [True, True], num_decodes=1)
    state = initial.clone()
    output = Kernel(triton_impl, device)(q, k, v, state, batch, SLOPES)
    for i, new in enumerate((slice(0, 1), slice(1, 101))):
        expected, after = lightning_recurrent(q[new], k[new], v[new], SLOPES, SCALE, initial[i])
        assert relative_rms(output[new], expected) < OUTPUT_BOUND[dtype]
        assert relative_rms(state[i], after) < STATE_BOUND[dtype]


def test_both_references_agree() -> None:
    q, k, v = random_qkv(150)
    expected, _ = lightning_recurrent(q, k, v, SLOPES, SCALE)
    chunked = lightning_chunked(q[None], k[None], v[None], SLOPES, SCALE)[0]
    assert relative_rms(chunked, expected) < BOUND


MUTANTS = {
    "growing state": lambda: -SLOPES,
    "slopes of another head": lambda: SLOPES.roll(1),
    "layer factor of the original paper": lambda: SLOPES * (1 - 1 / 31 + 1e-5),
    "no decay": lambda: torch.zeros(HEADS),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("steps", [[70], [1] * 70], ids=["prefill", "decode"])
def test_the_bound_rejects(mutant: str, steps: list[int]) -> None:
    expected, _ = lightning_recurrent(*random_qkv(70), SLOPES, SCALE)
    error = relative_rms(
        run_steps(Kernel(torch_impl, "cpu"), 70, steps, MUTANTS[mutant]()), expected
    )
    assert not error < 10 * BOUND


def test_the_bound_rejects_a_trusted_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "_initial_state", lambda stored, has_context: stored)
    expected, _ = lightning_recurrent(*random_qkv(70), SLOPES, SCALE)
    assert not relative_rms(run_steps(Kernel(torch_impl, "cpu"), 70, [70]), expected) < 10 * BOUND


SOURCE_MUTANTS = {
    "decode: growing state": ("tl.exp(-tl.load(slopes + head))", "tl.exp(tl.load(slopes + head))"),
    "decode: the current token decays": (
        "decay * current + k_t[:, None] * v_t[None, :]",
        "decay * (current + k_t[:, None] * v_t[None, :])",
    ),
    "decode: every state in column 0": ("+ column * slots_column).to(tl.int64)", ").to(tl.int64)"),
    "the initial column is ignored": ("tl.load(initial_column + seq)", "0"),
    "slots of new sequences are trusted": ("if tl.load(has_context + seq):", "if True:"),
    "the current token decays": ("(position + 1)", "position"),
    "the current token is left out": ("distance >= 0", "distance > 0"),
    "no decay inside a chunk": ("-slope * tl.maximum(distance, 0)", "0.0 * distance"),
    "a last chunk decays as a whole one": ("-slope * size", "-slope * chunk_tokens"),
    "a last chunk is written as a whole one": (
        "tl.maximum(size - 1 -",
        "tl.maximum(chunk_tokens - 1 -",
    ),
    "a segment decays by half": ("head) * segment_tokens", "head) * segment_tokens / 2"),
    "segments are summed without decay": ("chunk_decay * total", "total"),
    "segments start from a zero state": (
        "current = tl.load(state + slot * state_slot + head * state_head + element)",
        "pass",
    ),
    "workspace rows of two sequences overlap": ("return (2 * (start", "return (1 * (start"),
}


@pytest.mark.parametrize("mutant", SOURCE_MUTANTS)
def test_the_bound_rejects_a_kernel_with(mutant: str, device: str, tmp_path: Path) -> None:
    # the widest bounds that the device allows
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    source, (correct, mistaken) = inspect.getsource(triton_impl), SOURCE_MUTANTS[mutant]
    assert correct in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(correct, mistaken))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SEGMENT_TOKENS = SEGMENT
    assert not worst_of_a_mixed_step(Kernel(module, device), dtype) < MUTANT_FACTOR


def test_wrong_arguments_are_named() -> None:
    q, k, v = random_qkv(4)
    batch = state_batch([4], [[0]], [False])
    state = torch.zeros(1, HEADS, DIM, DIM)
    with pytest.raises(ValueError, match="state: expected torch.float32, got torch.bfloat16"):
        lightning_attention(q, k, v, SLOPES, SCALE, state.bfloat16(), batch)
    with pytest.raises(ValueError, match=r"slopes: expected shape \(2,\), got \(1,\)"):
        lightning_attention(q, k, v, SLOPES[:1], SCALE, state, batch)
    with pytest.raises(ValueError, match="k: expected a contiguous last axis"):
        lightning_attention(q, k.mT.contiguous().mT, v, SLOPES, SCALE, state, batch)
    with pytest.raises(ValueError, match="state: expected contiguous matrices"):
        lightning_attention(q, k, v, SLOPES, SCALE, state.mT, batch)
    with pytest.raises(ValueError, match="head_dim: expected a power of two from 16 to 256, got 8"):
        triton_impl.lightning_attention(
            q[..., :8], k[..., :8], v[..., :8], SLOPES, SCALE, state[..., :8, :8], batch
        )
    with pytest.raises(ValueError, match="has_context: expected torch.bool, got torch.int32"):
        replace(batch, has_context=batch.state_slots[:, 0])
    with pytest.raises(ValueError, match="initial_column: expected torch.int32, got torch.int64"):
        replace(batch, initial_column=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_decodes: expected 0 to 1, got 2"):
        replace(batch, num_decodes=2)
    with pytest.raises(ValueError, match="num_decode_tokens: expected 0 to 1, got 4"):
        replace(batch, num_decodes=1, num_decode_tokens=4)
    with pytest.raises(
        NotImplementedError, match="lightning_attention: expected tensors on cpu or cuda"
    ):
        lightning_attention(*(x.to("meta") for x in (q, k, v)), SLOPES, SCALE, state, batch)
