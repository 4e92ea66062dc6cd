"""Evict a long prompt from the GPU and come back to it from CPU memory: `python offload_on_gpu.py CHECKPOINT`.

Run by hand on a CUDA GPU; vLLM cannot offload from a CPU. Prints one JSON line: seconds for 8 tokens after the
prompt when it is new, recomputed after eviction (no offloading), and brought back; hits; whether tokens agree.
`--load-format dummy` runs the shapes of a folder that holds a config.json only.
"""

import argparse
import json
import os
import random
import sys
import time

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

BLOCK_TOKENS = 2048
STATE_BLOCKS = 32  # of the lightning groups: running ones and snapshots


def ask(llm: LLM, num_tokens: int, seed: int) -> tuple[float, list[int], int]:
    """Send a random prompt; return seconds, greedy tokens and how many prompt tokens were cached."""
    generator = random.Random(seed)
    highest = llm.llm_engine.vllm_config.model_config.get_vocab_size() - 3
    prompt = [generator.randrange(3, highest) for _ in range(num_tokens)]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return seconds, list(output.outputs[0].token_ids), output.num_cached_tokens or 0


def come_back(options: argparse.Namespace, offload_gib: float | None) -> dict[str, object]:
    """Ask, evict by other prompts, ask again."""
    llm = LLM(
        model=options.checkpoint,
        load_format=options.load_format,
        skip_tokenizer_init=True,
        max_model_len=options.tokens + BLOCK_TOKENS,
        block_size=BLOCK_TOKENS,
        enable_prefix_caching=True,
        max_num_seqs=4,
        # room for one prompt, so that any other one evicts it
        num_gpu_blocks_override=options.tokens // BLOCK_TOKENS + STATE_BLOCKS,
        kv_offloading_size=offload_gib,
        disable_log_stats=False,
    )
    ask(llm, options.tokens, seed=0)  # kernels are compiled here
    first_s, first_tokens, _ = ask(llm, options.tokens, seed=1)
    for seed in (2, 3):
        ask(llm, options.tokens, seed)
    again_s, again_tokens, cached = ask(llm, options.tokens, seed=1)
    counters = {
        metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    del llm
    cleanup_dist_env_and_memory()
    return {
        "first_s": first_s,
        "again_s": again_s,
        "again_cached_tokens": cached,
        "external_hit_tokens": counters.get("vllm:external_prefix_cache_hits"),
        "equal": first_tokens == again_tokens,
        "tokens": again_tokens,
    }


def main() -> int:
    """Return 1 unless the prompt came back from CPU memory with equal tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--offload-gib", type=float, default=16)
    parser.add_argument("--load-format", default="auto")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # frees the GPU between the two
    recomputed = come_back(options, offload_gib=None)
    offloaded = come_back(options, offload_gib=options.offload_gib)
    agree = recomputed["tokens"] == offloaded["tokens"]
    print(json.dumps({"recomputed": recomputed, "offloaded": offloaded, "agree": agree}))  # noqa: T201
    return 0 if agree and offloaded["equal"] and offloaded["external_hit_tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
