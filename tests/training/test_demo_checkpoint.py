"""The shipped checkpoint is what its card and manifest say, and does what it was trained for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sala_training import card, checkpoint
from sala_training.data.stream import TokenStream
from sala_training.data.tokenizer import EOS_ID, IM_END_ID, encode, load
from sala_training.eval.retrieval import evaluate, placements
from sala_training.recipes import demo

if TYPE_CHECKING:
    from sala_training.eval.retrieval import Case

DEMO = Path(__file__).parents[2] / "training/demo"
CHECKPOINT, RESULTS = DEMO / "checkpoint", DEMO / "results"
MANIFEST: dict[str, Any] = json.loads((CHECKPOINT / "sala_manifest.json").read_text())


def test_every_file_is_the_one_in_the_manifest() -> None:
    names = {path.name for path in CHECKPOINT.iterdir()} - {"sala_manifest.json"}
    assert names == set(MANIFEST["files"])
    for name, expected in MANIFEST["files"].items():
        content = (CHECKPOINT / name).read_bytes()
        assert len(content) == expected["bytes"], name
        assert hashlib.sha256(content).hexdigest() == expected["sha256"], name


def test_card_and_manifest_are_made_from_the_results() -> None:
    command = "sala-train card training/demo/checkpoint --results training/demo/results"
    assert card.render(CHECKPOINT, RESULTS) == (CHECKPOINT / "README.md").read_text(), command
    assert card.manifest(CHECKPOINT, RESULTS) == MANIFEST, command


def test_the_recipe_is_the_committed_one() -> None:
    assert MANIFEST["recipe_digest"] == demo().digest()
    assert MANIFEST["steps"] == demo().num_steps
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert demo().model.items() <= config.items()


def test_the_folder_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 30_000_000
    assert (RESULTS / "loss.png").stat().st_size < 100_000


def test_the_weights_are_bfloat16() -> None:
    model = checkpoint.load(CHECKPOINT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == MANIFEST["num_parameters"]


def test_passkeys_are_found_by_the_plain_model(tmp_path: Path) -> None:
    tokenizer = load(CHECKPOINT)
    text = (DEMO / "persuasion.txt").read_text()
    stream = tmp_path / "text.bin"
    np.array([*encode(tokenizer, text), EOS_ID], "<u2").tofile(stream)
    cases = placements(5, 2048, 0, tokenizer, TokenStream.open(stream, tokenizer))
    model = checkpoint.load(CHECKPOINT, torch.float32).eval()

    @torch.no_grad()
    def generate(case: Case) -> str:
        # one pass over prompt and expected reply: greedy up to the first token that differs
        reply = [*encode(tokenizer, case.reply), IM_END_ID]
        logits = model(torch.tensor([[*case.prompt_ids, *reply[:-1]]]))[0]
        chosen = logits[len(case.prompt_ids) - 1 :].argmax(-1).tolist()
        is_same = [a == b for a, b in zip(chosen, reply, strict=True)]
        return tokenizer.decode(chosen[: ([*is_same, False]).index(False) + 1])

    report = evaluate(cases, generate)
    # 99.5 % at eight times the length: a second miss in five would be no accident
    assert report.exact_frac >= 0.8, report.failures
