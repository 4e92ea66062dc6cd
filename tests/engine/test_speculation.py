"""Drafts from the prompt's own text (n-gram speculation) change the speed, never a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# fixtures in conftest.py; their classes are not importable from here
Engine = Oracle = EngineRun = Any

DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 499, (length,), generator=generator).tolist()


def assert_some_of_each(run: EngineRun) -> None:
    """Otherwise the run shows nothing: of accepted drafts, or of rejected ones."""
    assert 0 < run.drafts_accepted < run.drafts


@pytest.fixture
def repeating(engine: Engine, repeating_checkpoint: tuple[Path, Oracle]) -> tuple[Engine, Oracle]:
    path, oracle = repeating_checkpoint
    engine.checkpoint = path
    return engine, oracle


def test_in_steps_of_100(repeating: tuple[Engine, Oracle], prompts: list[list[int]]) -> None:
    # prompts are prefilled in chunks, beside sequences that verify drafts
    engine, oracle = repeating
    batch = [*prompts, random_prompt(403, seed=3) * 2]
    run = engine.generate(
        batch,
        max_tokens=48,
        speculative_config=DRAFTS,
        enable_prefix_caching=False,
        max_num_batched_tokens=100,
        max_num_seqs=8,
    )
    assert_some_of_each(run)
    oracle.assert_greedy(run, batch)


def test_a_prompt_that_ends_in_a_short_step(engine: Engine, oracle: Oracle) -> None:
    # as few tokens as a verification, but none of them can be rejected
    batches = [[random_prompt(length, seed=length)] for length in (103, 602, 604)]
    run = engine.generate(
        *batches,
        max_tokens=24,
        speculative_config=DRAFTS,
        enable_prefix_caching=False,
        max_num_batched_tokens=100,
        max_num_seqs=8,
    )
    oracle.assert_greedy(run, *batches)


def test_after_preemption(repeating: tuple[Engine, Oracle]) -> None:
    engine, oracle = repeating
    batch = [random_prompt(length, seed=length) for length in (890, 889, 885, 880)]
    run = engine.generate(
        batch,
        max_tokens=40,
        speculative_config=DRAFTS,
        enable_prefix_caching=False,
        num_gpu_blocks_override=46,
        max_model_len=1024,
        max_num_seqs=8,
    )
    assert run.preemptions > 0
    assert_some_of_each(run)
    oracle.assert_greedy(run, batch)


def test_on_the_newer_model_runner_with_prefix_hits(
    repeating: tuple[Engine, Oracle], newer_runner: dict[str, str]
) -> None:
    # its Triton kernels are interpreted here, so the work is small
    engine, oracle = repeating
    long, short = random_prompt(700, seed=1), random_prompt(5, seed=2)
    batches = [[long, short], [long, long[:660]]]
    run = engine.generate(
        *batches,
        max_tokens=12,
        speculative_config=DRAFTS,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        environment=newer_runner,
    )
    assert "Using V2 Model Runner" in run.log
    assert run.batches[1][0]["cached"] > 0
    assert_some_of_each(run)
    oracle.assert_greedy(run, *batches)
