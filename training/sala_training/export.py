"""A finished run becomes a servable folder: weights, config, tokenizer."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch

from sala_training import checkpoint
from sala_training.data.tokenizer import BOS_ID, EOS_IDS, PAD_ID
from sala_training.loop import load_trained

if TYPE_CHECKING:
    from pathlib import Path

    from sala_training.config import Recipe

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export(recipe: Recipe, run_dir: Path, data: Path, out: Path) -> None:
    """Write the checkpoint that the engine serves.

    Args:
        recipe: of the finished run.
        run_dir: where it was trained.
        data: holds the tokenizer it was trained with.
        out: folder to make; bfloat16 weights.

    Raises:
        ValueError: ``out`` is there already.
        ResumeError: the run is unfinished or belongs to another recipe.
    """
    if out.exists():
        raise ValueError(f"{out}: expected a folder that does not exist yet; move it away first")
    tokens = {"bos_token_id": BOS_ID, "eos_token_id": list(EOS_IDS), "pad_token_id": PAD_ID}
    model = load_trained(recipe, run_dir)
    partial = out.with_name(out.name + ".partial")  # a kill leaves no half of a checkpoint at `out`
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.save(model, recipe.model | tokens, partial, dtype=torch.bfloat16)
    # greedy unless a request says otherwise: the model is small and made for retrieval
    checkpoint.write_json(
        partial / "generation_config.json", {"do_sample": False, "temperature": 0.0, **tokens}
    )
    for name in TOKENIZER_NAMES:
        shutil.copyfile(data / "tokenizer" / name, partial / name)
    partial.rename(out)
