"""``sala-train``: prepare the data, train a recipe, export and score the checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sala_training.config import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from sala_training.config import Recipe, Stage
    from sala_training.loop import BatchFn


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2 = bad input, 3 = stopped before the end)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return int(arguments.run(arguments))
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"sala-train: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sala-train", description=__doc__)
    commands = parser.add_subparsers(required=True)

    data = commands.add_parser("data", help="download text, train the tokenizer, write token files")
    data.add_argument("--out", type=Path, required=True, help="folder for the token files")
    data.add_argument("--cache", type=Path, required=True, help="folder for downloaded packages")
    data.set_defaults(run=_data)

    train = commands.add_parser("train", help="train a recipe; run again to resume")
    train.add_argument("recipe", help="name of the recipe")
    train.add_argument("--data", type=Path, required=True, help="what `sala-train data` wrote")
    train.add_argument("--run-dir", type=Path, required=True, help="state and log of the run")
    train.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides")
    train.add_argument("--device", default="cuda", help="cuda or cpu")
    train.add_argument("--max-seconds", type=float, help="save and stop after this long")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="write a servable checkpoint of a finished run")
    export.add_argument("recipe")
    export.add_argument("--data", type=Path, required=True)
    export.add_argument("--run-dir", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    export.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides"
    )
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("evaluate", help="score a checkpoint with the plain model")
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument("--data", type=Path, required=True)
    evaluate.add_argument("--out", type=Path, required=True, help="JSON file for the scores")
    evaluate.add_argument("--device", default="cuda")
    evaluate.add_argument(
        "--placements",
        nargs="+",
        metavar="VARIANT:LENGTH:NUM",
        default=[
            "passkey:16384:200",
            "passkey:32768:100",
            "passkey:65536:100",
            "single:16384:100",
            "named:16384:100",
            "unseen:16384:100",
        ],
    )
    evaluate.set_defaults(run=_evaluate)
    return parser


def _data(arguments: argparse.Namespace) -> int:
    from sala_training.data.prepare import prepare

    prepare(arguments.out, arguments.cache)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    import torch

    from sala_training.loop import train

    recipe = _recipe(arguments)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; pass --device cpu")
    finished = train(
        recipe,
        arguments.run_dir,
        _batches(arguments.data, recipe.seed),
        device,
        arguments.max_seconds,
    )
    return 0 if finished else 3


def _export(arguments: argparse.Namespace) -> int:
    from sala_training.export import export

    export(_recipe(arguments), arguments.run_dir, arguments.data, arguments.out)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from sala_training.eval.report import evaluate

    placements = []
    for text in arguments.placements:
        variant, length, num = text.split(":")
        placements.append((variant, int(length), int(num)))
    evaluate(arguments.checkpoint, arguments.data, arguments.out, arguments.device, placements)
    return 0


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from sala_training.config import with_overrides
    from sala_training.recipes import RECIPES

    if arguments.recipe not in RECIPES:
        raise RecipeError(f"recipe: expected one of {sorted(RECIPES)}, got {arguments.recipe!r}")
    return with_overrides(RECIPES[arguments.recipe](), arguments.overrides)


def _batches(data: Path, seed: int) -> BatchFn:
    """Return the recipe's data as a function of the step."""
    import torch

    from sala_training.data.tasks import Mix, SampleStream

    stream = SampleStream.open(data, seed)

    def batch(step: int, stage: Stage, num_seqs: int) -> tuple[Tensor, Tensor]:
        mix = Mix(
            text=1 - stage.recall_frac - stage.chat_frac,
            recall=stage.recall_frac,
            chat=stage.chat_frac,
            max_facts=64,
            max_turns=32,
        )
        tokens, weights = stream.batch(step, num_seqs, stage.length_tokens, mix)
        return torch.from_numpy(tokens.astype("int64")), torch.from_numpy(weights)

    return batch


if __name__ == "__main__":
    raise SystemExit(main())
