"""The whole job in miniature, through the command line: data, training, checkpoint, scores, card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from sala_training import checkpoint
from sala_training.__main__ import EXIT_BAD_INPUT, EXIT_STOPPED, main

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
SET = ["--set", "model.vocab_size=1024", "--set", "stages.0.num_steps=4", "--set"]
SET += ["stages.1.num_steps=2", "--set", "log_every_steps=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job."""
    folder = tmp_path_factory.mktemp("job")
    data, run, out, results = (str(folder / n) for n in ("data", "run", "out", "results"))
    assert main(["data", "miniature", "--out", data]) == 0
    train = ["train", "tiny", "--data", data, "--run-dir", run, "--device", "cpu", *SET]
    assert main([*train, "--max-seconds", "0"]) == EXIT_STOPPED
    assert main(train) == 0
    assert main(["export", "tiny", "--data", data, "--run-dir", run, "--out", out, *SET]) == 0
    (folder / "results").mkdir()
    for path in (
        folder / "run/run.json",
        folder / "run/log.jsonl",
        folder / "data/provenance.json",
    ):
        shutil.copy(path, results)
    evaluate = ["evaluate", out, "--data", data, "--device", "cpu", "--bits-windows", "1"]
    scores = ["--out", f"{results}/scores.json", "--placements", "passkey:512:2", "unseen:512:1"]
    assert main([*evaluate, *scores]) == 0
    assert main(["card", out, "--results", results]) == 0
    return folder


def test_the_checkpoint_is_complete_and_loads(folder: Path) -> None:
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "sala_manifest.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model = checkpoint.load(folder / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    generation = json.loads((folder / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 4]


def test_the_scores_are_those_of_a_model_that_has_learned_little(folder: Path) -> None:
    scores = json.loads((folder / "results/scores.json").read_text())
    # 1,024 tokens by chance are 10 bits; a token is two bytes or three
    assert 2 < scores["bits_per_byte"] < 6
    assert [row["exact_frac"] for row in scores["retrieval"]] == [0, 0]
    assert [row["num_cases"] for row in scores["retrieval"]] == [2, 1]


def test_the_card_and_the_manifest_describe_this_run(folder: Path) -> None:
    card = (folder / "out/README.md").read_text()
    assert card.startswith("---\n")
    assert "| 512 | 2 | 2,048 | selected blocks |" in card
    assert "| `passkey`: passkey of a place" in card
    manifest = json.loads((folder / "out/sala_manifest.json").read_text())
    run = json.loads((folder / "results/run.json").read_text())
    assert manifest["tokens"] == 6 * 1024
    assert manifest["recipe_digest"] == run["recipe_digest"]
    assert [part["last_step"] for part in manifest["made_by"]] == [1, 6]
    assert manifest["data"]["files"]["train.bin"]["sha256"]
    assert (folder / "results/loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_data_travels_compressed(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(folder / "data", packed)
    assert main(["data", "pack", str(packed)]) == 0
    for name in ("train.bin", "heldout.bin"):
        (packed / name).unlink()
    assert main(["data", "unpack", str(packed)]) == 0
    for name in ("train.bin", "heldout.bin"):
        assert (packed / name).read_bytes() == (folder / "data" / name).read_bytes()


def test_bad_input_is_one_line_and_status_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, out = (str(folder / name) for name in ("data", "run", "out"))
    new = str(tmp_path / "new")
    cases: list[tuple[Sequence[str], str]] = [
        (["train", "huge", "--data", data, "--run-dir", new], "expected one of ['demo', 'tiny']"),
        (["train", "tiny", "--data", data, "--run-dir", new, "--set", "sed=1"], "no field 'sed'"),
        (
            ["train", "tiny", "--data", data, "--run-dir", run, "--device", "cpu"],
            "belongs to another recipe",
        ),
        (["train", "tiny", "--data", new, "--run-dir", new, "--device", "cpu"], "No such file"),
        (["export", "tiny", "--data", data, "--run-dir", run, "--out", out, *SET], "not exist yet"),
        (["export", "tiny", "--data", data, "--run-dir", new, "--out", new + "o"], "finished run"),
        (["evaluate", new, "--data", data, "--out", new, "--device", "cpu"], "does not exist"),
        (
            ["evaluate", out, "--data", data, "--out", new, "--device", "cpu"]
            + ["--placements", "passkey"],
            "expected VARIANT:LENGTH:NUM",
        ),
        (["card", out, "--results", new], "No such file"),
    ]
    if not torch.cuda.is_available():
        cases.append((["train", "tiny", "--data", data, "--run-dir", new], "no CUDA device"))
    for arguments, message in cases:
        assert main(list(arguments)) == EXIT_BAD_INPUT, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert error.startswith("sala-train: ")
        assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="would train for minutes")
def test_making_the_demo_checkpoint_needs_a_gpu(tmp_path: Path) -> None:
    result = subprocess.run(
        [ROOT / "scripts/demo-checkpoint"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "sees no GPU" in result.stderr
    assert not list(tmp_path.iterdir())
