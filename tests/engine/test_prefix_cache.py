"""What later requests reuse of earlier ones, for the ways in which prompts share a beginning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

# fixtures in conftest.py; their classes are not importable from here
Engine = Oracle = Any

BLOCK = 256
UNIT = 64
INTERVAL = 3 * BLOCK
"""No multiple of what a step computes: chunks have to be cut for it."""
NUM_ANSWER_TOKENS = 4


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 499, (length,), generator=generator).tolist()


def one_after_another(name: str, *prompts: list[int]) -> dict[str, list[list[int]]]:
    return {f"{name} {n}": [prompt] for n, prompt in enumerate(prompts)}


def test_what_is_reused(engine: Engine, oracle: Oracle) -> None:
    document = text(2030, seed=1)
    answered = text(1500, seed=2)
    extended = text(2200, seed=3)
    family = text(1300, seed=4)
    inside = 4 * BLOCK + UNIT
    prompts = (
        one_after_another("follow-up", answered, answered + text(60, seed=5))
        # the first question carries the prompt over a block boundary, at 2048
        | one_after_another("questions", *(document + text(60, seed=10 + n) for n in range(4)))
        | one_after_another(
            "diverging", *(document[:1111] + text(300, seed=20 + n) for n in range(3))
        )
        | one_after_another("extended", extended[:1500], extended[:1800], extended)
        | {"family": [family[: inside + 1]]}
        | {"offsets": [family[: inside + n] + text(30, seed=30 + n) for n in range(UNIT)]}
    )
    run = engine.generate(
        *prompts.values(),
        max_tokens=NUM_ANSWER_TOKENS,
        block_size=BLOCK,
        prefix_match_unit=UNIT,
        prefix_cache_retention_interval=INTERVAL,
        max_num_batched_tokens=4 * BLOCK,
        max_num_seqs=64,
        kv_cache_memory_bytes=256 << 20,
    )
    cached = {
        name: [output["cached"] for output in outputs]
        for name, outputs in zip(prompts, run.batches, strict=True)
    }
    # the last multiple of 64 before the prompt's end
    assert cached["follow-up 0"] == [0]
    assert cached["follow-up 1"] == [1472]
    # a whole block before the last boundary; vLLM alone gives the second question nothing
    assert cached["questions 0"] == [0]
    assert [cached[f"questions {n}"] for n in (1, 2, 3)] == [[1792]] * 3
    # the first finds a snapshot of the interval; where it left the document one is kept for the others
    assert cached["diverging 0"] == [INTERVAL]
    assert [cached[f"diverging {n}"] for n in (1, 2)] == [[1024]] * 2
    assert cached["extended 0"] == [0]
    assert cached["extended 1"] == [1472]
    assert cached["extended 2"] == [1792]
    assert cached["offsets"] == [inside] * UNIT
    oracle.assert_greedy(run, *prompts.values())


def test_chat_reuses_the_turns_before(engine: Engine, oracle: Oracle) -> None:
    # the turns that follow are the model's own, so they are asked of the oracle first
    turns, prompt = [], text(300, seed=40)
    for n in range(4):
        turns.append(prompt)
        answer: list[int] = []
        for _ in range(NUM_ANSWER_TOKENS):
            answer += oracle.next_tokens(prompt + answer, [0])
        prompt = prompt + answer + text(120, seed=41 + n)
    run = engine.generate(
        *([turn] for turn in turns), max_tokens=NUM_ANSWER_TOKENS, prefix_match_unit=UNIT
    )
    cached = [outputs[0]["cached"] for outputs in run.batches]
    assert cached == [0, *((len(turn) - 1) // UNIT * UNIT for turn in turns[:-1])]
    oracle.assert_greedy(run, *([turn] for turn in turns))


def test_answers_after_eviction(engine: Engine, oracle: Oracle) -> None:
    documents = [text(900, seed=50 + n) for n in range(4)]
    questions = [
        [documents[d] + text(70, seed=60 + n)]
        for n, d in enumerate((0, 1, 0, 2, 3, 0, 1, 3, 2, 0, 0))
    ]
    # three of the documents fit, not all of their states
    run = engine.generate(
        *questions,
        max_tokens=NUM_ANSWER_TOKENS,
        max_model_len=1024,
        num_gpu_blocks_override=30,
        max_num_seqs=2,
    )
    cached = [outputs[0]["cached"] for outputs in run.batches]
    # an early repetition hits, one after three other documents no longer, and a fresh one again
    assert cached[2] > 0
    assert cached[5] < cached[2]
    assert cached[-1] > 0
    oracle.assert_greedy(run, *questions)


@pytest.mark.slow
def test_hits_inside_a_block_on_the_newer_runner(
    engine: Engine, oracle: Oracle, newer_runner: dict[str, str]
) -> None:
    family = text(250, seed=70)
    prompts = {"family": [family], "branches": [family[:n] + text(20, seed=n) for n in (192, 215)]}
    run = engine.generate(
        *prompts.values(),
        max_tokens=NUM_ANSWER_TOKENS,
        max_num_seqs=4,
        prefix_match_unit=UNIT,
        environment=newer_runner,
    )
    assert "Using V2 Model Runner" in run.log
    assert [output["cached"] for output in run.batches[1]] == [192, 192]
    oracle.assert_greedy(run, *prompts.values())
