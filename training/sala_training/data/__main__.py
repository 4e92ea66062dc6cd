"""``python -m sala_training.data``: prepare the data folder, pack it for another machine, unpack it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sala_training.data.miniature import miniature
from sala_training.data.prepare import compress, decompress, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sala_training.data", description=__doc__)
    commands = parser.add_subparsers(required=True)

    full = commands.add_parser("prepare", help="download text, train the tokenizer, write tokens")
    full.add_argument("--out", type=Path, required=True)
    full.add_argument("--cache", type=Path, default=Path("build/data-cache"))
    full.add_argument("--max-text-bytes", type=int)
    full.add_argument("--num-workers", type=int, default=2)
    full.set_defaults(
        run=lambda a: prepare(a.out, a.cache, a.max_text_bytes, num_workers=a.num_workers)
    )

    small = commands.add_parser("miniature", help="a small data folder without any download")
    small.add_argument("--out", type=Path, required=True)
    small.add_argument("files", nargs="*", type=Path, help="UTF-8 text; none: Python's help texts")
    small.set_defaults(run=lambda a: miniature(a.out, a.files))

    packing: tuple[tuple[str, str, Callable[[Path], object]], ...] = (
        ("pack", "write the token files xz-compressed", compress),
        ("unpack", "write the token files of a packed folder", decompress),
    )
    for name, text, function in packing:
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path)
        command.set_defaults(run=lambda a, function=function: function(a.folder))

    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options.run(options)
    except (RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
