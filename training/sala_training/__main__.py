"""``sala-train``: prepare the data, train a recipe, export, score and describe the checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sala_training.config import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sala_training.config import Recipe, Stage
    from sala_training.loop import BatchFn


EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
"""Training stopped before its end (SIGTERM, ``--max-seconds``) and saved: run it again to go on."""

PLACEMENTS = (
    "passkey:16384:200",
    "passkey:32768:100",
    "passkey:65536:100",
    "single:16384:100",
    "named:16384:100",
    "unseen:16384:100",
)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2 = bad input, 3 = stopped before the end)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"sala-train: {error}\n")
        return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sala-train", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_data_commands(commands.add_parser("data", help="make the data folder").add_subparsers())

    train = commands.add_parser("train", help="train a recipe; run again to resume")
    train.add_argument("recipe", help="name of the recipe")
    train.add_argument("--data", type=Path, required=True, help="what `sala-train data` wrote")
    train.add_argument("--run-dir", type=Path, required=True, help="state and log of the run")
    train.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides")
    train.add_argument("--device", default="cuda", help="cuda or cpu")
    train.add_argument("--max-seconds", type=float, help="save and stop after this long")
    train.add_argument("--no-compile", action="store_true", help="on a GPU: do not compile layers")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="write a servable checkpoint of a finished run")
    export.add_argument("recipe")
    export.add_argument("--data", type=Path, required=True)
    export.add_argument("--run-dir", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    export.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides"
    )
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("evaluate", help="score a checkpoint with the plain model")
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument("--data", type=Path, required=True)
    evaluate.add_argument("--out", type=Path, required=True, help="JSON file for the scores")
    evaluate.add_argument("--device", default="cuda")
    evaluate.add_argument("--bits-windows", type=int, default=100, metavar="NUM")
    evaluate.add_argument(
        "--placements", nargs="+", metavar="VARIANT:LENGTH:NUM", default=list(PLACEMENTS)
    )
    evaluate.set_defaults(run=_evaluate)

    card = commands.add_parser("card", help="write the model card, the manifest and the curve")
    card.add_argument("checkpoint", type=Path, help="folder that gets README.md and the manifest")
    card.add_argument(
        "--results",
        type=Path,
        required=True,
        help="folder with run.json, log.jsonl, scores.json, provenance.json and, if there is one, notes.md",
    )
    card.set_defaults(run=_card)
    return parser


def _add_data_commands(commands: Any) -> None:
    commands.required = True
    full = commands.add_parser("prepare", help="download text, train the tokenizer, write tokens")
    full.add_argument("--out", type=Path, required=True, help="folder for the token files")
    full.add_argument("--cache", type=Path, default=Path("build/data-cache"), help="for packages")
    full.add_argument("--max-text-bytes", type=int, help="use at most this much training text")
    full.add_argument("--num-workers", type=int, default=2, help="processes that extract text")
    full.set_defaults(run=_prepare)

    small = commands.add_parser("miniature", help="a small data folder without any download")
    small.add_argument("--out", type=Path, required=True)
    small.add_argument("--vocab-size", type=int, default=1024)
    small.add_argument("files", nargs="*", type=Path, help="UTF-8 text; none: Python's help texts")
    small.set_defaults(run=_miniature)

    pack = commands.add_parser("pack", help="write the token files xz-compressed")
    pack.add_argument("folder", type=Path)
    pack.set_defaults(run=_pack)
    unpack = commands.add_parser("unpack", help="write the token files of a packed folder")
    unpack.add_argument("folder", type=Path)
    unpack.set_defaults(run=_unpack)


def _prepare(arguments: argparse.Namespace) -> int:
    from sala_training.data.prepare import prepare

    prepare(arguments.out, arguments.cache, arguments.max_text_bytes, arguments.num_workers)
    return 0


def _miniature(arguments: argparse.Namespace) -> int:
    from sala_training.data.miniature import miniature

    miniature(arguments.out, arguments.files, arguments.vocab_size)
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from sala_training.data.prepare import compress

    compress(arguments.folder)
    return 0


def _unpack(arguments: argparse.Namespace) -> int:
    from sala_training.data.prepare import decompress

    decompress(arguments.folder)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from sala_training.loop import train

    recipe = _recipe(arguments)
    device = _device(arguments)
    finished = train(
        recipe,
        arguments.run_dir,
        _batches(arguments.data, recipe.seed),
        device,
        arguments.max_seconds,
        "inductor" if device.type == "cuda" and not arguments.no_compile else None,
    )
    return 0 if finished else EXIT_STOPPED


def _export(arguments: argparse.Namespace) -> int:
    from sala_training.export import export

    export(_recipe(arguments), arguments.run_dir, arguments.data, arguments.out)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from sala_training.eval.report import evaluate

    placements = []
    for text in arguments.placements:
        try:
            variant, length, num = text.split(":")
            placements.append((variant, int(length), int(num)))
        except ValueError:
            raise ValueError(
                f"--placements: expected VARIANT:LENGTH:NUM such as {PLACEMENTS[0]}, got {text!r}"
            ) from None
    evaluate(
        arguments.checkpoint,
        arguments.data,
        arguments.out,
        _device(arguments).type,
        placements,
        arguments.bits_windows,
    )
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from sala_training.card import write

    write(arguments.checkpoint, arguments.results)
    return 0


def _device(arguments: argparse.Namespace) -> torch.device:
    import torch

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; pass --device cpu")
    return device


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
