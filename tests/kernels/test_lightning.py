from __future__ import annotations

import pytest
import torch

from sala_kernels.lightning import torch_impl
from sala_kernels.lightning.op import StateBatch, lightning_attention
from sala_kernels.lightning.reference import lightning_chunked, lightning_recurrent
from sala_kernels.spec import decay_slopes
from sala_kernels.testing import relative_rms

# both sides are float32; the chunked form sums in another order
BOUND = 2e-6
HEADS, DIM = 8, 24
SLOPES = torch.tensor(decay_slopes(HEADS))


def state_batch(query_lens: list[int], slots: list[int], contexts: list[bool]) -> StateBatch:
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    slot = torch.tensor(slots, dtype=torch.int32)
    return StateBatch(starts, slot, torch.tensor(contexts), max(query_lens))


def random_qkv(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, HEADS, DIM, generator=generator) for _ in range(3)]


def poisoned_state(slots: int) -> torch.Tensor:
    # every other slot of a larger pool, as when pages are padded
    return torch.full((2 * slots, HEADS, DIM, DIM), torch.nan)[::2]


def run_steps(tokens: int, steps: list[int], slopes: torch.Tensor = SLOPES) -> torch.Tensor:
    """Output of one sequence in slot 1 that arrives in ``steps``, from poisoned memory."""
    q, k, v = random_qkv(tokens)
    state, outputs, start = poisoned_state(3), [], 0
    for size in steps:
        new = slice(start, start + size)
        batch = state_batch([size], [1], [start > 0])
        outputs.append(lightning_attention(q[new], k[new], v[new], slopes, 0.2, state, batch))
        start += size
    assert state[[0, 2]].isnan().all()
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "steps", [[1], [2], [63], [64], [65], [200], [64, 64, 72], [1] * 130, [100, 1, 37, 1, 1]]
)
def test_matches_the_recurrence(steps: list[int]) -> None:
    tokens = sum(steps)
    expected, _ = lightning_recurrent(*random_qkv(tokens), SLOPES, 0.2)
    assert relative_rms(run_steps(tokens, steps), expected) < BOUND


def test_a_batch_equals_each_sequence_alone() -> None:
    lens, contexts = [1, 70, 1, 3, 1], [False, True, True, False, False]
    q, k, v = random_qkv(sum(lens))
    state = torch.randn(8, HEADS, DIM, DIM)
    before = state.clone()
    slots = [6, 2, 0, 5, 3]
    output = lightning_attention(q, k, v, SLOPES, 0.2, state, state_batch(lens, slots, contexts))
    start = 0
    for size, slot, has_context in zip(lens, slots, contexts, strict=True):
        new = slice(start, start + size)
        start += size
        initial = before[slot] if has_context else None
        expected, after = lightning_recurrent(q[new], k[new], v[new], SLOPES, 0.2, initial)
        assert relative_rms(output[new], expected) < BOUND
        assert relative_rms(state[slot], after) < BOUND
    assert torch.equal(state[[1, 4, 7]], before[[1, 4, 7]])


def test_padding_rows_neither_decay_nor_write() -> None:
    q, k, v = random_qkv(4)
    state = torch.ones(2, HEADS, DIM, DIM)
    batch = state_batch([2, 0, 1], [1, -1, -1], [False, False, False])
    output = lightning_attention(q, k, v, SLOPES, 0.2, state, batch)
    assert torch.equal(state[0], torch.ones(HEADS, DIM, DIM))
    assert (output[2:] == 0).all()


def test_the_fastest_head_does_not_overflow() -> None:
    # exp(+s j) split off from exp(-s i) is infinite after 104 tokens at this slope
    slopes = torch.full((HEADS,), 0.8409)
    expected, _ = lightning_recurrent(*random_qkv(400), slopes, 0.2)
    assert relative_rms(run_steps(400, [400], slopes), expected) < BOUND


def test_half_precision_inputs_are_computed_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in random_qkv(150))
    expected, after = lightning_recurrent(q, k, v, SLOPES, 0.2)
    state = poisoned_state(1)
    output = lightning_attention(q, k, v, SLOPES, 0.2, state, state_batch([150], [0], [False]))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.bfloat16()) or relative_rms(output, expected) < 4e-3
    assert relative_rms(state[0], after) < BOUND


def test_both_references_agree() -> None:
    q, k, v = random_qkv(150)
    expected, _ = lightning_recurrent(q, k, v, SLOPES, 0.2)
    assert (
        relative_rms(lightning_chunked(q[None], k[None], v[None], SLOPES, 0.2)[0], expected) < BOUND
    )


MUTANTS = {
    "growing state": lambda: -SLOPES,
    "slopes of another head": lambda: SLOPES.roll(1),
    "layer factor of the original paper": lambda: SLOPES * (1 - 1 / 31 + 1e-5),
    "no decay": lambda: torch.zeros(HEADS),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("steps", [[70], [1] * 70], ids=["prefill", "decode"])
def test_the_bound_rejects(mutant: str, steps: list[int]) -> None:
    expected, _ = lightning_recurrent(*random_qkv(70), SLOPES, 0.2)
    error = relative_rms(run_steps(70, steps, MUTANTS[mutant]()), expected)
    assert not error < 10 * BOUND


def test_the_bound_rejects_a_trusted_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "_initial_state", lambda stored, has_context: stored)
    expected, _ = lightning_recurrent(*random_qkv(70), SLOPES, 0.2)
    assert not relative_rms(run_steps(70, [70]), expected) < 10 * BOUND


def test_wrong_arguments_are_named() -> None:
    q, k, v = random_qkv(4)
    batch = state_batch([4], [0], [False])
    state = torch.zeros(1, HEADS, DIM, DIM)
    with pytest.raises(ValueError, match="state: expected torch.float32, got torch.bfloat16"):
        lightning_attention(q, k, v, SLOPES, 0.2, state.bfloat16(), batch)
    with pytest.raises(ValueError, match=r"slopes: expected shape \(8,\), got \(4,\)"):
        lightning_attention(q, k, v, SLOPES[:4], 0.2, state, batch)
    with pytest.raises(ValueError, match="has_context: expected torch.bool, got torch.int32"):
        StateBatch(batch.query_start_loc, batch.state_slots, batch.state_slots, 4)
    with pytest.raises(NotImplementedError, match="lightning_attention runs on the CPU only"):
        lightning_attention(*(x.to("meta") for x in (q, k, v)), SLOPES, 0.2, state, batch)
