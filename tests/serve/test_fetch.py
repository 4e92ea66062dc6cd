"""`sala-serve fetch`: a checkpoint of the stated digest, whole, or an error and nothing."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest

from sala_serve.fetch import FetchError, fetch_checkpoint


def archive(path, names=("config.json", "model.safetensors"), *, below="", link=None):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(below + name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
        if link is not None:
            member = tarfile.TarInfo("inside")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
    return path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("below", ["", "checkpoint/"])
def test_archive_becomes_the_folder(tmp_path, below):
    url, sha256 = archive(tmp_path / "a.tar.gz", below=below)
    folder = tmp_path / "models" / "m"
    fetch_checkpoint(url, sha256=sha256.upper(), folder=folder)
    assert (folder / "config.json").read_text() == "config.json"
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_what_is_there_is_not_fetched_again(tmp_path):
    url, sha256 = archive(tmp_path / "a.tar.gz")
    folder = tmp_path / "m"
    fetch_checkpoint(url, sha256=sha256, folder=folder)
    (tmp_path / "a.tar.gz").unlink()
    fetch_checkpoint(url, sha256=sha256, folder=folder)
    assert (folder / "config.json").exists()


def test_another_digest_replaces_it(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "half").touch()
    url, sha256 = archive(tmp_path / "a.tar.gz")
    fetch_checkpoint(url, sha256=sha256, folder=folder)
    assert not (folder / "half").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: (archive(path)[0], "0" * 64), "expected SHA-256 0000"),
        (lambda path: (archive(path)[0], "abc"), "64 hexadecimal digits"),
        (lambda path: ("ftp://host/a.tar", "0" * 64), "expected an http, https or file URL"),
        (lambda path: (path.with_name("none").as_uri(), "0" * 64), "No such file"),
        (lambda path: archive(path, ["weights"]), r"expected config\.json"),
        (lambda path: archive(path, link="/etc"), "unpacked safely"),
        (lambda path: archive(path, ["../evil"]), "unpacked safely"),
    ],
)
def test_refused(tmp_path, make, message):
    url, sha256 = make(tmp_path / "a.tar.gz")
    folder = tmp_path / "models" / "m"
    with pytest.raises(FetchError, match=message):
        fetch_checkpoint(url, sha256=sha256, folder=folder)
    assert not folder.exists()
    assert not folder.parent.exists() or not list(folder.parent.iterdir())


def test_no_archive_at_all(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>")
    with pytest.raises(FetchError, match="not a tar archive"):
        fetch_checkpoint(
            path.as_uri(),
            sha256=hashlib.sha256(b"<html>").hexdigest(),
            folder=tmp_path / "m",
        )
