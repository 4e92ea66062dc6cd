"""Turn documentation files into clean text: HTML, POD, dictd databases and R character vectors.

Text comes out as paragraphs separated by one empty line, without trailing spaces, with ASCII quotes and
dashes: a vocabulary of a few thousand entries should not spend any on typography.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selectolax.lexbor import LexborNode

MAX_CODE_LINES = 12
"""Longer verbatim blocks are listings, not prose: they are left out."""
MAX_TABLE_ROWS = 40

_BLOCKS = frozenset(
    {
        "p",
        "div",
        "section",
        "article",
        "main",
        "body",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
    }
    | {"dl", "dt", "dd", "table", "thead", "tbody", "tr", "caption", "blockquote", "figure", "hr"}
    | {"figcaption", "address", "title", "page", "steps", "list", "note", "terms", "center"}
)
_DROPPED = (
    "script, style, nav, head > *, svg, img, form, button, footer, noscript, object, iframe, "
    "a.headerlink, a.anchor, .navheader, .navfooter, .NAVHEADER, .NAVFOOTER, .toc, .TOC, .related, "
    ".sphinxsidebar, .contents, .toctree-wrapper, .breadcrumb, .breadcrumbs, .book-navigation, "
    ".page-links, .titlepage .author, .legalnotice, .copyright, .docnav, sup.footnote, .visually-hidden"
)
_TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201a": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u2010": "-",
        "\u2011": "-",
        "\u2012": "-",
        "\u2013": "-",
        "\u2212": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u2002": " ",
        "\u2003": " ",
        "\u200b": "",
        "\u00ad": "",
        "\ufeff": "",
        "\u00b6": "",
        "\u2022": "-",
        "\u00b7": "-",
        "\u2190": "<-",
        "\u2192": "->",
        "\u21d2": "=>",
        "\ufb01": "fi",
        "\ufb02": "fl",
        "\t": "    ",
        "\r": "",
        "\x0c": "",
    }
)
_LINE_MARK = "\x00"
_SPACE_MARK = "\x01"
_ITEM = "\n- "


def normalise(text: str) -> str:
    """Return ``text`` with ASCII typography, no trailing spaces and at most one empty line in a row."""
    text = text.translate(_TYPOGRAPHY)
    text = re.sub(r" ?\u2014 ?", " - ", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def html_to_text(html: str, root: str, drop: str) -> str:
    """Return the prose below the first element that matches ``root``; empty where none does.

    Args:
        html: a whole page.
        root: CSS selector; of the elements that match, the one with the most text is read.
        drop: further CSS selectors to remove first; may be empty.
    """
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(html)
    for node in tree.css(f"{_DROPPED}, {drop}" if drop else _DROPPED):
        node.decompose()
    for table in tree.css("table"):
        if len(table.css("tr")) > MAX_TABLE_ROWS:
            table.decompose()
    roots = tree.css(root)
    if not roots:
        return ""
    node = max(roots, key=lambda found: len(found.text(deep=True)))
    parts: list[str] = []
    _walk(node, parts)
    paragraphs = []
    for block in "".join(parts).split("\n"):
        line = " ".join(block.split())
        line = line.replace(_LINE_MARK, "\n").replace(_SPACE_MARK, " ").strip("\n").rstrip()
        if line:
            paragraphs.append(line)
    return normalise("\n\n".join(paragraphs))


def _walk(node: LexborNode, parts: list[str]) -> None:
    for child in node.iter(include_text=True):
        tag = child.tag or "-"
        if tag == "-text":
            text = (child.text_content or "").replace("\n", " ")
            # space between an item's mark and its first paragraph would separate the two
            if not (text.isspace() and parts and parts[-1] == _ITEM):
                parts.append(text)
        elif tag in ("pre", "screen"):
            code = child.text(deep=True).strip("\n")
            lines = [line.rstrip() for line in code.split("\n")]
            if len(lines) <= MAX_CODE_LINES:
                kept = _LINE_MARK.join(lines).replace("\t", "    ").replace(" ", _SPACE_MARK)
                parts.append(f"\n{kept}\n")
        elif tag == "br":
            parts.append(" ")
        elif tag == "li" or tag == "item":
            parts.append(_ITEM)
            _walk(child, parts)
            parts.append("\n")
        elif tag in _BLOCKS:
            # a paragraph that opens a list item stays on the item's line
            opens_item = bool(parts) and parts[-1] == _ITEM
            if not opens_item:
                parts.append("\n")
            _walk(child, parts)
            parts.append("\n")
        elif tag == "td" or tag == "th":
            _walk(child, parts)
            parts.append("  ")
        elif not tag.startswith(("-", "_", "!")):
            _walk(child, parts)


_POD_OPEN = re.compile(r"([A-Z])(<(?:<+ )?)")
_POD_ESCAPES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}


def pod_to_text(pod: str) -> str:
    """Return the prose of a Perl POD page: headings, paragraphs, items and short examples."""
    paragraphs = []
    verbatim: list[str] = []
    in_begin = False
    for block in [*re.split(r"\n[ \t]*\n", pod), "end"]:
        block = block.strip("\n")
        if block.startswith((" ", "\t")) and not in_begin:
            verbatim.append(block.rstrip())
            continue
        if verbatim:
            code = "\n\n".join(verbatim)
            if code.count("\n") < MAX_CODE_LINES:
                paragraphs.append(code)
            verbatim = []
        if block.startswith("="):
            command, _, rest = block.partition(" ")
            in_begin = command == "=begin" or (in_begin and command != "=end")
            if command.startswith("=head"):
                paragraphs.append(_pod_inline(rest))
            elif command == "=item" and rest.strip() not in ("*", "-", ""):
                paragraphs.append("- " + _pod_inline(rest).removeprefix("* "))
        elif not in_begin:
            paragraphs.append(_pod_inline(block))
    return normalise("\n\n".join(p for p in paragraphs[:-1] if p.strip()))


def _pod_inline(text: str) -> str:
    plain, _ = _pod_until(" ".join(text.split()), 0, None)
    return plain


def _pod_until(text: str, at: int, end: str | None) -> tuple[str, int]:
    """Read formatting codes from ``at`` to ``end`` (or the text's); return plain text and position."""
    parts: list[str] = []
    while at < len(text):
        if end is not None and text.startswith(end, at):
            return "".join(parts), at + len(end)
        opening = _POD_OPEN.match(text, at)
        if opening is None:
            parts.append(text[at])
            at += 1
            continue
        code, bracket = opening.groups()
        # C<< x >> ends at a space and as many brackets as opened it
        close = ">" if bracket == "<" else " " + ">" * (len(bracket) - 1)
        inner, at = _pod_until(text, opening.end(), close)
        if code == "E":
            inner = _POD_ESCAPES.get(inner, "")
        elif code == "L":
            inner = inner.split("|", 1)[0]
        parts.append("" if code in "XZ" else inner)
    return "".join(parts), at


def dict_to_texts(path: Path, entries_per_document: int = 200) -> Iterator[str]:
    """Yield documents of consecutive entries of a dictd database.

    Args:
        path: ``NAME.dict.dz``.
        entries_per_document: entries joined into one document.
    """
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    # the database's own description precedes the entries
    lines = [line.expandtabs() for line in text.split("\n")]
    paragraphs: list[str] = []
    num_entries = 0
    current: list[str] = []

    def flush() -> None:
        if current:
            line = re.sub(r"[{}]", "", " ".join(" ".join(current).split()))
            paragraphs.append(re.sub(r" ([,.;:])", r"\1", line))
            current.clear()

    for index, line in enumerate(lines):
        if not line.strip():
            flush()
            continue
        is_headword = not line.startswith(" ") and (index == 0 or not lines[index - 1].strip())
        if is_headword:
            flush()
            num_entries += 1
            if num_entries % entries_per_document == 0:
                yield normalise("\n\n".join(paragraphs))
                paragraphs.clear()
        current.append(line)
    flush()
    yield normalise("\n\n".join(paragraphs))


def r_strings_to_texts(path: Path) -> Iterator[str]:
    """Yield each character vector of an R lazy-load database as one text, its lines re-flowed.

    An ``.rdb`` file is a row of records: a big-endian length, then zlib data that holds one object in
    R's XDR serialisation (format 3). Only character vectors without attributes occur here.
    """
    data = path.read_bytes()
    offset = 0
    while offset < len(data):
        inflate = zlib.decompressobj()
        record = inflate.decompress(data[offset + 4 :])
        offset = len(data) - len(inflate.unused_data)
        yield reflow(_r_character_vector(record))


def _r_character_vector(record: bytes) -> list[str]:
    if record[:2] != b"X\n":
        raise ValueError(f"expected an R object in XDR format, got {record[:2]!r}")
    _, _, _, encoding_bytes = struct.unpack_from(">4i", record, 2)
    at = 2 + 16 + encoding_bytes
    flags, num_strings = struct.unpack_from(">2i", record, at)
    if flags & 0xFF != 16:
        raise ValueError(f"expected an R character vector (type 16), got type {flags & 0xFF}")
    at += 8
    lines = []
    for _ in range(num_strings):
        _, num_bytes = struct.unpack_from(">2i", record, at)
        at += 8
        num_bytes = max(num_bytes, 0)  # -1 is R's missing value
        lines.append(record[at : at + num_bytes].decode("utf-8"))
        at += num_bytes
    return lines


def reflow(lines: list[str]) -> str:
    """Join hard-wrapped lines into paragraphs; an empty line ends one."""
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    return normalise("\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip()))
