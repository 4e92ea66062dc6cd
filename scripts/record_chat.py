"""Draw a terminal's screen, read with its colours from standard input, as an SVG file."""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("svg", type=Path)
    path = parser.parse_args().svg
    screen = Text.from_ansi(sys.stdin.read())
    # without the prompt for one more question
    screen = screen[: len(screen.plain.rstrip("\n >"))]
    width = max(len(line) for line in screen.split())
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(screen)
    svg = console.export_svg(title="sala-serve chat")
    # a drawing must not fetch fonts from elsewhere; the reader's own monospace will do
    path.write_text(re.sub(r"@font-face {.*?}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
