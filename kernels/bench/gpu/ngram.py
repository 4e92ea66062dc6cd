"""Drafts looked up in the prompt: what they save on the demo checkpoint, and that they change nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gpu.demo_text import ids_of, text_ids
from gpu.engine import running
from gpu.environment import ROOT
from gpu.results import spread
from gpu.settings import CHECKPOINT, Scale

if TYPE_CHECKING:
    from gpu.engine import Engine, Timed
    from gpu.results import Recorder

NUM_DRAFTS = 3
SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": NUM_DRAFTS,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
OUTPUT_TOKENS = 192
REPEATS = 3
DOCUMENT_TOKENS = 1500
REPEATED_TOKENS = 200
CODE = ROOT / "kernels/sala_kernels/paged.py"


def prompts() -> dict[str, list[int]]:
    """A text and a program, each followed by its own beginning: the answer is in the prompt."""
    code = ids_of(CODE.read_text(encoding="utf-8"))
    documents = {"extraction": text_ids(DOCUMENT_TOKENS), "code editing": code[:DOCUMENT_TOKENS]}
    return {name: ids + ids[:REPEATED_TOKENS] for name, ids in documents.items()}


async def _generate(arguments: dict[str, Any]) -> tuple[dict[str, list[Timed]], Engine]:
    async with running(arguments) as engine:
        runs: dict[str, list[Timed]] = {}
        for name, ids in prompts().items():
            await engine.timed(ids, OUTPUT_TOKENS)
            runs[name] = [await engine.timed(ids, OUTPUT_TOKENS) for _ in range(REPEATS)]
        return runs, engine


def run(record: Recorder, scale: Scale) -> None:
    """Generate with and without drafts in float32, in which greedy tokens must be equal."""
    arguments = {
        "model": str(CHECKPOINT),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 4096,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False,
        "enforce_eager": scale.device == "cpu",
    }
    plain, _ = asyncio.run(_generate(arguments))
    drafted, engine = asyncio.run(_generate(arguments | {"speculative_config": SPECULATION}))
    accepted = engine.stats.num_accepted_tokens / max(engine.stats.num_draft_tokens, 1)
    for name, runs in plain.items():
        pairs = zip(runs, drafted[name], strict=True)
        ratio = [before.tpot_s / after.tpot_s for before, after in pairs]
        record.write(
            "drafts",
            prompt=name,
            speed_up=spread(ratio),
            tpot_s=spread([run.tpot_s for run in drafted[name]]),
            plain_tpot_s=spread([run.tpot_s for run in runs]),
            num_drafts=NUM_DRAFTS,
            accepted_frac_all_prompts=round(accepted, 4),
            equal_tokens=all(run.tokens == runs[0].tokens for run in drafted[name]),
        )
