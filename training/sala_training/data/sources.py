"""The table of text sources: Debian packages whose documentation is free English prose.

Every row names a package of Debian's ``main`` section (so every licence meets the Debian Free Software
Guidelines), the files to read inside it and how to turn them into text. Nothing else is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Format(StrEnum):
    """How the files of one source are written."""

    HTML = "html"
    POD = "pod"
    DICT = "dict"
    """A dictd database: ``NAME.dict.dz`` (gzip) beside ``NAME.index``."""
    R_STRINGS = "r-strings"
    """An R lazy-load database (``.rdb``) of character vectors, one book each."""
    PLAIN = "plain"


@dataclass(frozen=True)
class Source:
    """One package and what to read in it."""

    package: str
    patterns: tuple[str, ...]
    """Glob patterns below the unpacked package, read in this order; each pattern's files sorted."""
    licence: str
    """Licence of the text read, as the package's ``copyright`` file states it."""
    file_format: Format = Format.HTML
    root: str = "body"
    """CSS selector of the element that holds the prose (HTML only); a page without it is skipped."""
    drop: str = ""
    """CSS selectors of navigation inside the root, besides those every page drops."""
    exclude: tuple[str, ...] = ()
    """Regular expressions; a file whose path matches one is not read."""
    join_pages: bool = False
    """Join the pages of one folder into documents: for manuals cut into screenfuls."""
    is_held_out: bool = False
    """All documents of this source are for evaluation and never trained on."""
    held_out_titles: tuple[str, ...] = ()
    """First lines of the documents held out (for a source of which only a part is)."""


_SPHINX = "div.body, div[itemprop=articleBody], div[role=main]"
_SAME_NOTICE = "copies, also changed ones, under the same notice"
"""The notice of GNU manuals before the GFDL."""

SOURCES: tuple[Source, ...] = (
    # held-out sources come first, so that de-duplication removes their paragraphs from the others
    Source(
        "debian-handbook",
        ("usr/share/doc/debian-handbook/html/en-US/*.html",),
        "GPL-2+ or CC-BY-SA-3.0",
        drop="#banner",
        exclude=(r"/(index|ix\d+)\.html$",),
        join_pages=True,
        is_held_out=True,
    ),
    Source(
        "r-cran-janeaustenr",
        ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
        "public domain (the novels), MIT (the package)",
        Format.R_STRINGS,
        held_out_titles=("EMMA", "Persuasion"),
    ),
    Source("anarchism", ("usr/share/doc/anarchism/html/*.html",), "GPL-2"),
    Source(
        "cfi-en",
        ("usr/share/doc/cfi-en/html/*.htm*",),
        "public domain",
        join_pages=True,
    ),
    Source(
        "abs-guide",
        ("usr/share/doc/abs-guide/html/*.html",),
        "public domain",
        drop="div.NAVHEADER, div.NAVFOOTER, div.TOC",
    ),
    Source("dict-jargon", ("usr/share/dictd/jargon.dict.dz",), "public domain", Format.DICT),
    Source("dict-devil", ("usr/share/dictd/devil.dict.dz",), "public domain", Format.DICT),
    Source(
        "dict-foldoc", ("usr/share/dictd/foldoc.dict.dz",), "GFDL-1.1+, no invariants", Format.DICT
    ),
    Source(
        "python3.11-doc",
        tuple(
            f"usr/share/doc/python3.11/html/{part}/*.html"
            for part in (
                "tutorial",
                "howto",
                "faq",
                "whatsnew",
                "using",
                "extending",
                "installing",
                "reference",
                "library",
                "distributing",
                "c-api",
            )
        ),
        "PSF-2.0",
        root="div.body",
        exclude=(r"/(changelog|index)\.html$",),
    ),
    Source(
        "python-django-doc",
        tuple(
            f"usr/share/doc/python-django-doc/html/{part}/**/*.html"
            for part in ("intro", "topics", "howto", "faq", "misc", "internals", "ref", "releases")
        ),
        "BSD-3-Clause",
        root="div#bd div.yui-b, div.body",
        drop="div#sidebar, div.nav",
    ),
    Source(
        "twisted-doc",
        (
            "usr/share/doc/twisted-doc/html/*/howto/**/*.html",
            "usr/share/doc/twisted-doc/html/core/development/**/*.html",
            "usr/share/doc/twisted-doc/html/historic/**/*.html",
        ),
        "MIT",
        root=_SPHINX,
        exclude=(r"/index\.html$",),
    ),
    Source(
        "linux-doc-6.1",
        tuple(
            f"usr/share/doc/linux-doc-6.1/html/{part}/**/*.html"
            for part in (
                "process",
                "admin-guide",
                "maintainer",
                "doc-guide",
                "core-api",
                "dev-tools",
                "filesystems",
                "RCU",
                "scheduler",
                "locking",
                "mm",
                "networking",
                "security",
                "timers",
                "trace",
                "virt",
                "bpf",
                "block",
                "kernel-hacking",
                "kbuild",
                "livepatch",
                "power",
                "PCI",
                "usb",
                "input",
                "hid",
                "sound",
                "cpu-freq",
                "fault-injection",
                "accounting",
                "crypto",
                "driver-api",
                "hwmon",
                "arm64",
                "powerpc",
                "x86",
                "scsi",
                "userspace-api",
                "firmware-guide",
                "leds",
                "i2c",
                "spi",
                "s390",
                "arm",
                "misc-devices",
                "gpu",
            )
        ),
        "GPL-2",
        root="div[itemprop=articleBody]",
        exclude=(r"/index\.html$", r"/kernel-parameters\.html$", r"/devices\.html$"),
    ),
    Source(
        "perl-doc",
        ("usr/share/perl/5.*/pod/*.pod",),
        "GPL-1+ or Artistic",
        Format.POD,
        exclude=(r"/perl(toc|uniprops|cn|jp|ko|tw|apio|intern|modlib)\.pod$",),
    ),
    Source(
        "git-doc",
        ("usr/share/doc/git-doc/*.html", "usr/share/doc/git-doc/*/*.html"),
        "GPL-2",
        root="div#content",
        exclude=(r"/(index|everyday)\.html$",),
    ),
    Source(
        "postgresql-doc-15",
        ("usr/share/doc/postgresql-doc-15/html/*.html",),
        "PostgreSQL",
        exclude=(
            r"/(bookindex|index|release-.*|features-sql-standard|unsupported.*|errcodes-.*)\.html$",
        ),
        join_pages=True,
    ),
    Source(
        "sqlite3-doc",
        ("usr/share/doc/sqlite3/*.html",),
        "public domain",
        drop="div.nosearch, div.imgcontainer, div.fancy_toc, div#toc_header",
        exclude=(
            r"/(changes|chronology|keyword_index|sitemap|doclist|.*_hist|.*matrix.*|news|sqlite)\.html$",
        ),
    ),
    Source(
        "rust-doc",
        tuple(
            f"usr/share/doc/rust-doc/html/{part}/**/*.html"
            for part in (
                "book",
                "nomicon",
                "reference",
                "rust-by-example",
                "edition-guide",
                "embedded-book",
                "rustc",
                "rustdoc",
                "cargo",
            )
        ),
        "MIT or Apache-2.0",
        root="main",
        exclude=(
            r"/print\.html$",
            r"/first-edition/",
            r"/second-edition/",
            r"/2018-edition/",
            r"/toc\.html$",
        ),
    ),
    Source(
        "racket-doc",
        tuple(
            f"usr/share/doc/racket/{part}/*.html"
            for part in (
                "guide",
                "quick",
                "more",
                "continue",
                "htdp",
                "htdp-ptr",
                "style",
                "plai",
                "lazy",
                "web-server",
                "ts-guide",
                "scribble",
                "framework",
                "gui",
                "reference",
                "drracket",
                "redex",
                "datalog",
                "slideshow",
                "math",
                "plot",
                "foreign",
                "inside",
                "syntax",
                "data",
                "pict",
            )
        ),
        "LGPL-2.1+ or Apache-2.0",
        root="div.main",
        drop="div.navsettop, div.navsetbottom, div.SAuthorListBox, div.versionbox, .toclink",
        exclude=(r"/doc-index.*\.html$",),
        join_pages=True,
    ),
    Source(
        "debian-policy", ("usr/share/doc/debian-policy/policy.html/*.html",), "GPL-2+", root=_SPHINX
    ),
    Source(
        "debian-reference-en",
        ("usr/share/debian-reference/ch*.html",),
        "GPL-2+",
    ),
    Source(
        "developers-reference",
        ("usr/share/developers-reference/*.html",),
        "GPL-2+",
        root=_SPHINX,
        exclude=(r"/(index|genindex|search)\.html$",),
    ),
    Source(
        "harden-doc",
        ("usr/share/doc/harden-doc/html/en-US/*.html",),
        "GPL-2+",
        join_pages=True,
    ),
    Source(
        "installation-guide-amd64",
        ("usr/share/doc/installation-guide-amd64/en/*.html",),
        "GPL-2",
        join_pages=True,
    ),
    Source(
        "debian-kernel-handbook",
        ("usr/share/doc/debian-kernel-handbook/kernel-handbook.html/*.html",),
        "GPL-2+",
        join_pages=True,
    ),
    Source("debmake-doc", ("usr/share/doc/debmake-doc/html/*.en.html",), "MIT", join_pages=True),
    Source(
        "gnome-user-docs",
        ("usr/share/help/C/*/*.page",),
        "CC-BY-SA-3.0",
        drop="info, credit, license, desc, comment",
        join_pages=True,
    ),
    Source(
        "libreoffice-help-en-us",
        tuple(
            f"usr/share/libreoffice/help/en-US/text/{part}/**/*.html"
            for part in (
                "shared",
                "swriter",
                "scalc",
                "sdraw",
                "simpress",
                "smath",
                "schart",
                "sdatabase",
            )
        ),
        "MPL-2.0",
        root="div#DisplayArea",
        drop="div.relatedtopics, div.howtoget",
        join_pages=True,
    ),
    Source(
        "lilypond-doc-html",
        tuple(
            f"usr/share/doc/lilypond/html/Documentation/{part}/*.html"
            for part in ("learning", "usage", "essay", "extending", "notation", "contributor")
        ),
        "GFDL-1.3+, no invariants",
        root="div#main",
        drop="table.nav_table, div.toc, div.header",
        exclude=(r"\.[a-z]{2}\.html$", r"/(index|lilypond-index)\.html$"),
        join_pages=True,
    ),
    Source(
        "octave-doc",
        ("usr/share/doc/octave/octave.html/*.html",),
        _SAME_NOTICE,
        drop="div.header, p.index-entry, table.menu",
        exclude=(r"/(index|.*Index.*|XREF.*)\.html$",),
        join_pages=True,
    ),
    Source(
        "erlang-doc",
        (
            "usr/share/doc/erlang-doc/doc/**/*.html",
            "usr/share/doc/erlang-doc/lib/stdlib-*/doc/html/*.html",
            "usr/share/doc/erlang-doc/lib/kernel-*/doc/html/*.html",
            "usr/share/doc/erlang-doc/erts-*/doc/html/*.html",
        ),
        "Apache-2.0",
        root="div#content, div.content",
        exclude=(r"/(index|notes|.*_app)\.html$",),
    ),
    Source(
        "nodejs-doc",
        ("usr/share/doc/nodejs/api/*.html",),
        "MIT",
        root="div#apicontent",
        exclude=(r"/(all|index)\.html$",),
    ),
    Source(
        "apache2-doc",
        ("usr/share/doc/apache2-doc/manual/en/**/*.html",),
        "Apache-2.0",
        root="div#page-content",
        drop="div#preamble > .toplang, div#quickview, .bottomlang, #comments_section, p.up",
        exclude=(r"/(index|quickreference|directives|sitemap)\.html$",),
    ),
    Source(
        "python-sqlalchemy-doc",
        (
            "usr/share/doc/python-sqlalchemy-doc/html/tutorial/*.html",
            "usr/share/doc/python-sqlalchemy-doc/html/orm/**/*.html",
            "usr/share/doc/python-sqlalchemy-doc/html/core/**/*.html",
            "usr/share/doc/python-sqlalchemy-doc/html/faq/*.html",
            "usr/share/doc/python-sqlalchemy-doc/html/changelog/*.html",
        ),
        "MIT",
        root="div#docs-body",
        exclude=(r"/index\.html$",),
    ),
    Source(
        "cmake-doc",
        tuple(
            f"usr/share/doc/cmake-data/html/{part}/**/*.html"
            for part in ("guide", "manual", "command", "policy", "release", "module", "prop_tgt")
        ),
        "BSD-3-Clause",
        root="div.body",
    ),
    Source(
        "exim4-doc-html",
        ("usr/share/doc/exim4-doc-html/spec_html/*.html",),
        "GPL-2+",
        root="div#content",
        exclude=(r"/(index|.*index.*|filter_toc)\.html$",),
    ),
    Source(
        "postfix-doc",
        ("usr/share/doc/postfix/html/*README.html", "usr/share/doc/postfix/html/postconf.5.html"),
        "EPL-2.0 or IPL-1.0",
    ),
    Source(
        "debian-history",
        ("usr/share/doc/debian-history/docs/*.en.html",),
        "GPL-2+",
        join_pages=True,
    ),
    Source("debian-faq", ("usr/share/doc/debian/FAQ/*.html",), _SAME_NOTICE, join_pages=True),
    Source(
        "aptitude-doc-en",
        ("usr/share/doc/aptitude/html/en/*.html",),
        "GPL-2+",
        join_pages=True,
    ),
    Source("r-doc-html", ("usr/share/R/doc/manual/R-*.html",), _SAME_NOTICE),
    Source("maint-guide", ("usr/share/doc/maint-guide/html/*.en.html",), "GPL-2+", join_pages=True),
    Source("debian-edu-doc-en", ("usr/share/doc/debian-edu-doc-en/*.html",), "GPL-2+"),
    Source("kicad-doc-en", ("usr/share/doc/kicad/help/en/*.html",), "GPL-3+", root="div#content"),
    Source(
        "python-pandas-doc",
        (
            "usr/share/doc/python-pandas-doc/html/user_guide/*.html",
            "usr/share/doc/python-pandas-doc/html/getting_started/**/*.html",
            "usr/share/doc/python-pandas-doc/html/development/*.html",
            "usr/share/doc/python-pandas-doc/html/whatsnew/*.html",
        ),
        "BSD-3-Clause",
        root="main, div[role=main], article",
        exclude=(r"/index\.html$",),
    ),
    Source(
        "python-sklearn-doc",
        (
            "usr/share/doc/python-sklearn-doc/html/modules/*.html",
            "usr/share/doc/python-sklearn-doc/html/tutorial/**/*.html",
            "usr/share/doc/python-sklearn-doc/html/developers/*.html",
            "usr/share/doc/python-sklearn-doc/html/auto_examples/**/*.html",
            "usr/share/doc/python-sklearn-doc/html/whats_new/*.html",
            "usr/share/doc/python-sklearn-doc/html/*.html",
        ),
        "BSD-3-Clause",
        root="div#sk-page-content-wrapper, div.body",
        exclude=(r"/(index|genindex|search|sg_execution_times|classes)\.html$",),
    ),
    Source(
        "ghc-doc",
        ("usr/share/doc/ghc-doc/**/users_guide/**/*.html",),
        "BSD-3-Clause",
        root="div[itemprop=articleBody]",
        exclude=(r"/(index|genindex|search)\.html$",),
    ),
    Source(
        "qemu-system-common",
        ("usr/share/doc/qemu-system-common/**/*.html",),
        "GPL-2",
        root="div[itemprop=articleBody]",
        exclude=(r"/(index|genindex|search)\.html$",),
    ),
    Source(
        "clang-14-doc",
        ("usr/share/doc/clang-14/html/**/*.html",),
        "Apache-2.0 with LLVM exception",
        root="div.content",
        exclude=(
            r"/(index|genindex|search|DiagnosticsReference|ClangCommandLineReference)\.html$",
        ),
    ),
    Source(
        "llvm-14-doc",
        (
            "usr/share/doc/llvm-14-doc/html/*.html",
            "usr/share/doc/llvm-14-doc/html/tutorial/**/*.html",
            "usr/share/doc/llvm-14-doc/html/CommandGuide/*.html",
            "usr/share/doc/llvm-14-doc/html/GlobalISel/*.html",
        ),
        "Apache-2.0 with LLVM exception",
        root="div.body",
        exclude=(r"/(index|genindex|search)\.html$",),
    ),
    Source(
        "python-scipy-doc",
        (
            "usr/share/doc/python-scipy-doc/html/tutorial/**/*.html",
            "usr/share/doc/python-scipy-doc/html/dev/**/*.html",
            "usr/share/doc/python-scipy-doc/html/release*.html",
        ),
        "BSD-3-Clause",
        root="main, div.body, article",
        exclude=(r"/index\.html$",),
    ),
)
