"""Scores of a checkpoint by the plain model: retrieval placements and bits per byte."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sala_training import checkpoint
from sala_training.batch import CuSeqlens
from sala_training.data.prepare import HELD_OUT_NAME
from sala_training.data.stream import TokenStream
from sala_training.data.tokenizer import EOS_IDS, encode, load
from sala_training.eval import retrieval
from sala_training.eval.bits import bits_per_byte
from sala_training.eval.retrieval import Case, Variant
from sala_training.loop import device_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from sala_training.model.sala import SalaForCausalLM

logger = logging.getLogger(__name__)

MAX_ANSWER_TOKENS = 48
_SEED = 1


def evaluate(
    path: Path,
    data: Path,
    out: Path,
    device_name: str,
    placements: Sequence[tuple[str, int, int]],
    bits_windows: int = 100,
) -> dict[str, Any]:
    """Score a checkpoint and write the scores to ``out`` as JSON.

    Args:
        path: checkpoint folder.
        data: holds the held-out text and the tokenizer.
        out: file to write.
        device_name: "cuda" computes under bfloat16 autocast, "cpu" in float32.
        placements: (variant, prompt tokens, cases) triples.
        bits_windows: windows of 4,096 held-out tokens for bits per byte.
    """
    device = torch.device(device_name)
    model = checkpoint.load(path, torch.float32).to(device).eval()
    tokenizer = load(data / "tokenizer")
    held_out = TokenStream.open(data / HELD_OUT_NAME, tokenizer)

    def hidden(tokens: Sequence[int]) -> Tensor:
        """Return the last hidden states of one sequence: [tokens, hidden]."""
        row = torch.tensor(tokens, dtype=torch.int64, device=device)
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            return model.model(row, CuSeqlens.of([len(tokens)], device))

    def log_probs(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        logits = model.logits(hidden(tokens[:-1].tolist()).float())
        targets = torch.from_numpy(tokens[1:]).to(device)
        chosen = logits.log_softmax(-1).gather(-1, targets[:, None])
        return chosen[:, 0].detach().double().cpu().numpy()

    def generate(case: Case) -> str:
        draft = encode(tokenizer, case.reply)
        ids = _greedy(model, hidden, list(case.prompt_ids), draft)
        return tokenizer.decode(ids, skip_special_tokens=True)

    scores: dict[str, Any] = {"device": device_text(device), "torch": torch.__version__}
    bits = bits_per_byte(log_probs, held_out.tokens, tokenizer, 4096, bits_windows)
    scores["bits_per_byte"] = round(bits.bits_per_byte, 4)
    scores["bits_per_byte_tokens"] = bits.num_tokens
    logger.info("bits per byte %.3f", bits.bits_per_byte)
    scores["retrieval"] = []
    for variant, length_tokens, num in placements:
        started_at_s = time.monotonic()
        cases = retrieval.placements(
            num, length_tokens, _SEED, tokenizer, held_out, Variant(variant)
        )
        report = retrieval.evaluate(cases, generate)
        scores["retrieval"].append(report.to_json())
        seconds = time.monotonic() - started_at_s
        logger.info(
            "%s %d: %.3f of %d (%.0f s)", variant, length_tokens, report.exact_frac, num, seconds
        )
        checkpoint.write_json(out, scores)
    return scores


def _greedy(model: SalaForCausalLM, hidden: Any, prompt: list[int], draft: list[int]) -> list[int]:
    """Generate greedily; the draft saves passes where it is right and changes nothing where not."""
    answer: list[int] = []
    while len(answer) < MAX_ANSWER_TOKENS:
        states = hidden(prompt + answer + draft)[len(prompt) + len(answer) - 1 :]
        chosen = model.logits(states.float()).argmax(-1).tolist()
        num_right = 0
        while num_right < len(draft) and draft[num_right] == chosen[num_right]:
            num_right += 1
        for token in chosen[: num_right + 1]:
            if token in EOS_IDS:
                return answer
            answer.append(token)
        draft = []
    return answer
