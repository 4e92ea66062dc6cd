from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from sala_training.data import corpus, extract, prepare
from sala_training.data.corpus import Document
from sala_training.data.sources import SOURCES, Format, Source
from sala_training.data.tokenizer import EOS_ID

SENTENCE = (
    "This is a paragraph about the harbour, long enough to be told from the others by its words"
)


def _document(text: str, is_held_out: bool = False) -> Document:
    return Document("package", "1", "path", "licence", is_held_out, text)


def test_held_out_paragraphs_are_never_in_training() -> None:
    shared = [f"{SENTENCE}, number {i}." for i in range(20)]
    own = [f"{SENTENCE}, but of training, number {i}." for i in range(20)]
    documents = [
        _document("\n\n".join(shared), is_held_out=True),
        # the same words with other case and spacing count as the same paragraph
        _document("\n\n".join([*own, *(s.upper().replace(" ", "  ") for s in shared)])),
    ]
    held_out, train = corpus.deduplicate(documents)
    keys = [
        {corpus.paragraph_key(p) for p in document.text.split("\n\n")}
        for document in (held_out, train)
    ]
    assert len(keys[0]) == 20
    assert len(keys[1]) == 20
    assert not keys[0] & keys[1]


def test_furniture_of_pages_is_kept_only_so_often() -> None:
    text = "\n\n".join(f"{SENTENCE}, number {i}.\n\nSee also" for i in range(150))
    (kept,) = corpus.deduplicate([_document(text)])
    assert kept.text.count("See also") == corpus.MAX_REPEATS


def test_prepared_files_share_no_paragraph(data_folder: Path, tokenizer) -> None:
    keys = []
    for name in ("train.bin", "heldout.bin"):
        ids = np.fromfile(data_folder / name, "<u2")
        text = "".join(
            tokenizer.decode(part.tolist(), skip_special_tokens=True) + "\n\n"
            for part in np.split(ids, np.flatnonzero(ids == EOS_ID) + 1)
        )
        long = [p for p in text.split("\n\n") if len(p) >= corpus.MIN_DUPLICATE_CHARS]
        keys.append({corpus.paragraph_key(p) for p in long})
    assert len(keys[0]) > 500
    assert len(keys[1]) > 20
    assert not keys[0] & keys[1]


def test_prepared_files_are_the_same_each_time(data_folder: Path, tmp_path: Path) -> None:
    from sala_training.data.miniature import miniature

    miniature(tmp_path)
    names = ("train.bin", "heldout.bin", "words.json", "tokenizer/tokenizer.json")
    for name in (*names, "provenance.json"):
        assert (tmp_path / name).read_bytes() == (data_folder / name).read_bytes()


def test_packed_folder_unpacks_to_the_same_tokens(data_folder: Path, tmp_path: Path) -> None:
    for name in prepare.BUNDLE_NAMES:
        (tmp_path / name).write_bytes((data_folder / name).read_bytes())
    assert prepare.compress(tmp_path) > 0
    for name in prepare.BUNDLE_NAMES:
        (tmp_path / name).unlink()
    prepare.decompress(tmp_path)
    for name in prepare.BUNDLE_NAMES:
        assert (tmp_path / name).read_bytes() == (data_folder / name).read_bytes()


def test_write_refuses_an_empty_side(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 1 and 0"):
        prepare.write([_document("text")], tmp_path)


def test_provenance_counts_what_was_written(data_folder: Path) -> None:
    provenance = json.loads((data_folder / "provenance.json").read_text())
    tokens = {
        name: (data_folder / name).stat().st_size // 2 for name in ("train.bin", "heldout.bin")
    }
    assert {name: file["num_tokens"] for name, file in provenance["files"].items()} == tokens
    for row in provenance["sources"]:
        assert row["licence"]


def test_sources_name_each_package_once_and_hold_some_out() -> None:
    packages = [source.package for source in SOURCES]
    assert len(set(packages)) == len(packages)
    assert all(source.licence and source.patterns for source in SOURCES)
    assert [s.package for s in SOURCES if s.is_held_out] == ["debian-handbook"]
    assert [s.package for s in SOURCES if s.held_out_titles] == ["r-cran-janeaustenr"]


def test_read_source_reads_sorted_pages_and_joins_them(tmp_path: Path) -> None:
    page = "<html><body><nav>Home</nav><h1>{}</h1><p>It is the text of the page, as it should be.</p></body></html>"
    for name in ("b", "a", "index"):
        (tmp_path / f"{name}.html").write_text(page.format(f"Page {name}"))
    source = Source("p", ("*.html",), "MIT", exclude=(r"/index\.html$",), join_pages=True)
    (document,) = corpus.read_source(source, tmp_path, "1.0")
    text = "It is the text of the page, as it should be."
    assert document.text == f"Page a\n\n{text}\n\nPage b\n\n{text}"
    assert (document.path, document.version) == ("a.html", "1.0")


def test_html_keeps_prose_and_drops_navigation_and_long_listings() -> None:
    listing = "\n".join(f"line {i}" for i in range(30))
    html = f"""<body><div class="navheader">Next</div><div id="main"><h1>Title<a class="headerlink">#</a></h1>
    <p>First &ldquo;quoted&rdquo;
    words &mdash; <b>bold</b>.</p><ul><li><p>one</p></li><li>two</li></ul>
    <pre>short  code
  indented</pre><pre>{listing}</pre><script>x</script></div></body>"""
    assert extract.html_to_text(html, "div#main", "") == (
        'Title\n\nFirst "quoted" words - bold.\n\n- one\n\n- two\n\nshort  code\n  indented'
    )
    assert extract.html_to_text(html, "div#other", "") == ""


def test_pod_keeps_prose_and_strips_markup() -> None:
    pod = "=head1 NAME\n\nperl - the B<I<language>> of L<perlre|perlre> E<lt>x>\n\n    short code\n\n=over\n\n=item one\n\ntext C<< $x->y >>\n\n=back\n\n=cut\n"
    assert extract.pod_to_text(pod) == (
        "NAME\n\nperl - the language of perlre <x>\n\n    short code\n\n- one\n\ntext $x->y"
    )


def test_dict_entries_become_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "x.dict.dz"
    path.write_bytes(
        gzip.compress(b"head\n\n   A {linked} word\n   wrapped .\n\nother\n\n   Second.")
    )
    assert list(extract.dict_to_texts(path)) == [
        "head\n\nA linked word wrapped.\n\nother\n\nSecond."
    ]


def test_r_character_vectors_are_read_from_an_rdb(tmp_path: Path) -> None:
    lines = [b"EMMA", b"", b"by Jane", b"Austen"]
    body = b"X\n" + struct.pack(">4i", 3, 0x40200, 0x30500, 5) + b"UTF-8"
    body += struct.pack(">2i", 16, len(lines))
    body += b"".join(struct.pack(">2i", 9, len(line)) + line for line in lines)
    record = struct.pack(">I", len(body)) + zlib.compress(body)
    path = tmp_path / "books.rdb"
    path.write_bytes(record + record)
    assert list(extract.r_strings_to_texts(path)) == ["EMMA\n\nby Jane Austen"] * 2
    source = Source(
        "books", ("*.rdb",), "public domain", Format.R_STRINGS, held_out_titles=("EMMA",)
    )
    assert all(document.is_held_out for document in corpus.read_source(source, tmp_path, "1"))


def test_pages_that_are_not_english_are_left_out() -> None:
    assert corpus.is_english("This is the page that you can read, and it is in the language of us.")
    assert not corpus.is_english("Diese Seite kann man nur auf Deutsch lesen, sonst leider nicht.")
    assert not corpus.is_english("0x00 0x01 ---")


def test_page_of_the_data_names_every_source_and_its_licence() -> None:
    page = (Path(__file__).parents[2] / "docs" / "demo-data.md").read_text(encoding="utf-8")
    for source in SOURCES:
        row = next(line for line in page.splitlines() if line.startswith(f"| {source.package} |"))
        assert f"| {source.licence} |" in row
