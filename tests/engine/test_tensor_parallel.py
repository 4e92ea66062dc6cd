"""Two ranks give the tokens of one, whether each has KV heads of its own or they share one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# fixtures in conftest.py; their classes are not importable from here
Engine = Oracle = Any


def test_ranks_that_share_a_kv_head(
    engine: Engine, one_kv_head_checkpoint: tuple[Path, Oracle], prompts: list[list[int]]
) -> None:
    # blocks are chosen by the sum over all query heads of the KV head, half of which are on the other rank
    path, oracle = one_kv_head_checkpoint
    batch = [prompts[1], prompts[3]]
    run = engine.generate(
        batch,
        model=str(path),
        tensor_parallel_size=2,
        max_num_batched_tokens=1000,
    )
    for prompt, output in zip(batch, run.batches[0], strict=True):
        assert output["tokens"] == oracle.next_tokens(prompt, output["tokens"])
