"""Passkeys hidden in a novel that is repeated to a million tokens, asked of the served demo checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from gpu.demo_text import load_tokenizer, text_ids
from gpu.engine import running
from gpu.results import spread
from gpu.settings import CHECKPOINT, SHARED_MEMORY_FRAC, Scale

if TYPE_CHECKING:
    from gpu.engine import Timed
    from gpu.results import Recorder
    from sala_training.eval.retrieval import Case

ANSWER_TOKENS = 32
SEED = 7


def cases(num: int, num_tokens: int) -> list[Case]:
    """Make prompts of exactly ``num_tokens`` tokens: the novel, again and again, and four passkeys in it."""
    from sala_training.data.stream import TokenStream
    from sala_training.eval.retrieval import placements

    tokenizer, novel = load_tokenizer(), text_ids(None)
    repeats = 2 + num_tokens // len(novel)
    haystack = TokenStream(np.tile(np.array(novel, np.uint16), repeats), tokenizer)
    return placements(num, num_tokens, SEED, tokenizer, haystack)


async def run(record: Recorder, scale: Scale) -> None:
    """Ask each case alone, in bfloat16 as served; prompts go far beyond the 16,384 tokens of the training."""
    from sala_training.eval.retrieval import is_right

    tokenizer = load_tokenizer()
    eos = set(json.loads((CHECKPOINT / "config.json").read_text())["eos_token_id"])
    max_model_len = max(scale.needle_lengths) + ANSWER_TOKENS
    arguments = {
        "model": str(CHECKPOINT),
        "dtype": scale.dtype,
        "max_model_len": max_model_len,
        "hf_overrides": {"max_position_embeddings": max_model_len},
    }
    arguments |= scale.common_engine | scale.sala_engine | scale.one_request_engine
    arguments["gpu_memory_utilization"] = SHARED_MEMORY_FRAC

    def text(timed: Timed) -> str:
        end = next((i for i, token in enumerate(timed.tokens) if token in eos), None)
        return tokenizer.decode(timed.tokens[:end])

    async with running(arguments) as engine:
        for num_tokens, num in sorted(scale.needle_lengths.items()):
            asked = cases(num, num_tokens)
            runs = [await engine.timed(list(case.prompt_ids), ANSWER_TOKENS) for case in asked]
            wrong = [
                {"depth_frac": round(case.depth_frac, 3), "expected": case.answer, "got": text(run)}
                for case, run in zip(asked, runs, strict=True)
                if not is_right(text(run), case)
            ]
            record.write(
                "needle",
                prompt_tokens=num_tokens,
                cases=num,
                right_frac=round(1 - len(wrong) / num, 3),
                wrong=wrong,
                ttft_s=spread([run.ttft_s for run in runs]),
            )
