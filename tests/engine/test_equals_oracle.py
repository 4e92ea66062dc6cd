"""Every greedy token of the engine equals the oracle's, however the work is cut up."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# fixtures in conftest.py; their classes are not importable from here
Engine = Oracle = EngineRun = Any


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 499, (length,), generator=generator).tolist()


@pytest.mark.parametrize("step_tokens", [8192, 2048, 100, 64])
def test_in_steps_of(
    step_tokens: int, engine: Engine, oracle: Oracle, prompts: list[list[int]]
) -> None:
    run = engine.generate(prompts, max_num_batched_tokens=step_tokens, max_num_seqs=8)
    oracle.assert_greedy(run, prompts)


def test_dense_attention_would_give_other_tokens(oracle: Oracle, prompts: list[list[int]]) -> None:
    # otherwise the tests here could not tell a wrong selection from the right one
    for prompt in prompts[1:5]:
        body, tail = prompt[:-64], prompt[-64:]
        sparse = oracle.next_tokens(body, tail)
        dense = oracle.next_tokens(body, tail, dense=True)
        num_other = sum(a != b for a, b in zip(sparse, dense, strict=True))
        assert num_other > 16


@pytest.mark.parametrize(("prefix_caching", "num_blocks"), [(True, 30), (False, 34)])
def test_after_preemption(
    prefix_caching: bool, num_blocks: int, engine: Engine, oracle: Oracle
) -> None:
    # they fit as they arrive; each needs one more block of 128 while it generates
    batch = [random_prompt(length, seed=length) for length in (890, 889, 885, 880)]
    run = engine.generate(
        batch,
        enable_prefix_caching=prefix_caching,
        num_gpu_blocks_override=num_blocks,
        max_model_len=1024,
        max_num_seqs=8,
    )
    assert run.preemptions > 0
    oracle.assert_greedy(run, batch)


def test_with_prefix_hits_inside_blocks_and_pages(engine: Engine, oracle: Oracle) -> None:
    first = random_prompt(1500, seed=1)
    branch = first[:1400] + random_prompt(60, seed=2)
    batches = [[first], [first], [branch], [branch], [first, branch]]
    run = engine.generate(*batches, prefix_match_unit=16)
    cached = [[output["cached"] for output in outputs] for outputs in run.batches]
    assert cached[0] == [0]
    # the last multiple of 16 before the prompt's end: in the middle of a page of 64 and a block of 128
    assert cached[1] == [1488]
    assert cached[4] == [1488, 1456]
    oracle.assert_greedy(run, *batches)


def test_on_two_ranks(engine: Engine, oracle: Oracle, prompts: list[list[int]]) -> None:
    batch = prompts[:2]
    run = engine.generate(
        batch,
        tensor_parallel_size=2,
        max_tokens=8,
    )
    oracle.assert_greedy(run, batch)


def test_always_sparse(engine: Engine, oracle: Oracle, always_sparse_oracle: Oracle) -> None:
    batch = [random_prompt(length, seed=length) for length in (400, 470, 500)]
    run = engine.generate(batch, hf_overrides={"always_sparse": True})
    always_sparse_oracle.assert_greedy(run, batch)
    # below dense_len the two functions differ
    outputs = run.batches[0]
    assert any(
        output["tokens"] != oracle.next_tokens(prompt, output["tokens"])
        for prompt, output in zip(batch, outputs, strict=True)
    )


def test_a_model_of_another_shape(engine: Engine, odd_checkpoint: tuple[Path, Oracle]) -> None:
    path, oracle = odd_checkpoint
    batch = [random_prompt(length, seed=length) for length in (3, 129, 500, 801)]
    run = engine.generate(batch, model=str(path), max_num_batched_tokens=200, max_num_seqs=8)
    oracle.assert_greedy(run, batch)


def test_bfloat16_rounds_no_more_than_the_plain_model(engine: Engine, oracle: Oracle) -> None:
    prompt = random_prompt(900, seed=1)
    run = engine.generate([prompt], max_tokens=1, prompt_logprobs=True, dtype="bfloat16")
    exact = oracle.log_probability(prompt)
    plain = type(oracle)(copy.deepcopy(oracle.model).bfloat16()).log_probability(prompt)
    engine_error = torch.tensor(run.batches[0][0]["prompt_logprobs"]) - exact
    plain_error = plain - exact
    assert engine_error.square().mean() < 1.5 * plain_error.square().mean()


def test_on_the_newer_model_runner(
    engine: Engine, oracle: Oracle, newer_runner: dict[str, str]
) -> None:
    # what vLLM uses on CUDA; its Triton kernels are interpreted here, so the work is small
    batches = [[random_prompt(700, seed=1), random_prompt(5, seed=2)], [random_prompt(700, seed=1)]]
    run = engine.generate(
        *batches,
        max_tokens=6,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        environment=newer_runner,
    )
    assert "Using V2 Model Runner" in run.log
    assert run.batches[1][0]["cached"] == 640
    oracle.assert_greedy(run, *batches)
