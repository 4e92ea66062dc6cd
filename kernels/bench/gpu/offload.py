"""A long prompt that was evicted from the GPU: computed again, or brought back from CPU memory."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from gpu.results import Recorder
    from gpu.settings import Scale

BLOCK_TOKENS = 2048
STATE_BLOCKS = 32
"""Of the lightning layers: running states and snapshots."""
PROMPT_TOKENS = 131_072
OFFLOAD_GIB = 16.0


def ask(llm: Any, num_tokens: int, seed: int) -> tuple[float, list[int], int]:
    """Send a random prompt; return seconds, greedy tokens and how many prompt tokens were cached."""
    from vllm import SamplingParams

    generator = random.Random(seed)
    highest = llm.llm_engine.vllm_config.model_config.get_vocab_size() - 3
    prompt = [generator.randrange(3, highest) for _ in range(num_tokens)]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    start_s = time.perf_counter()
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start_s
    return seconds, list(output.outputs[0].token_ids), output.num_cached_tokens or 0


def come_back(arguments: dict[str, Any], offload_gib: float | None) -> dict[str, Any]:
    """Ask, evict by other prompts, ask again."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        **arguments,
        block_size=BLOCK_TOKENS,
        # room for one prompt, so that any other one evicts it
        num_gpu_blocks_override=PROMPT_TOKENS // BLOCK_TOKENS + STATE_BLOCKS,
        kv_offloading_size=offload_gib,
        disable_log_stats=False,
    )
    ask(llm, PROMPT_TOKENS, seed=0)
    first_s, first_tokens, _ = ask(llm, PROMPT_TOKENS, seed=1)
    for seed in (2, 3):
        ask(llm, PROMPT_TOKENS, seed)
    again_s, again_tokens, cached = ask(llm, PROMPT_TOKENS, seed=1)
    counters = {
        metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    del llm
    cleanup_dist_env_and_memory()
    return {
        "first_s": round(first_s, 4),
        "again_s": round(again_s, 4),
        "again_cached_tokens": cached,
        "external_hit_tokens": counters.get("vllm:external_prefix_cache_hits"),
        "equal": first_tokens == again_tokens,
    }


def run(record: Recorder, scale: Scale, folder: Path) -> None:
    """Compare coming back with and without offloading, on the released shape.

    Raises:
        RuntimeError: on a CPU, from which vLLM cannot offload.
    """
    if scale.device != "cuda":
        raise RuntimeError("offload: expected a GPU, vLLM cannot offload from a CPU")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # frees the GPU between the two
    arguments = scale.sala_arguments(folder, one_request=True)
    arguments |= {"max_model_len": PROMPT_TOKENS + BLOCK_TOKENS, "max_num_seqs": 4}
    for offload_gib in (None, OFFLOAD_GIB):
        result = come_back(arguments, offload_gib)
        record.write(
            "come_back",
            prompt_tokens=PROMPT_TOKENS,
            offload_gib=offload_gib,
            seconds_of=8,
            **result,
        )
