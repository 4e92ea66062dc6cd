"""The README's two commands, each in a fresh clone as a stranger runs them.

As root the clone belongs to ``nobody``, who then runs everything (unless ``nobody`` has no Python):
so a command that needs root, or that writes outside the clone, HOME and TMPDIR, fails here.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.install, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
JANITOR = Path(__file__).with_name("janitor.py")
FIRST_START_LIMIT_S = 600
"""`make serve` on a bare machine until ready: two minutes of installing on 2 idle cores, then vLLM."""
NEXT_START_LIMIT_S = 240
STOP_LIMIT_S = 60
FAST_TESTS = "tests/test_import_rules.py"
PASSED_ON = re.compile(
    r"PATH|LANG|PIP_\w+|\w+_proxy|(SSL|CURL|REQUESTS)_\w+|SALA_TORCH_INDEX_URL", re.I
)
DEAD_INDEX = {
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "",
    "SALA_TORCH_INDEX_URL": "http://127.0.0.1:9",
}


@dataclass(frozen=True)
class Clone:
    folder: Path
    env: dict[str, str]
    user: str | None

    def start(self, command: str, output: Path, **env: str) -> subprocess.Popen[bytes]:
        with output.open("wb") as stream:
            return subprocess.Popen(
                shlex.split(command),
                cwd=self.folder,
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **as_user(self.user),
            )

    def processes(self) -> dict[str, str]:
        """Everything that still runs on behalf of this clone, by process id."""
        listing = subprocess.run(
            [sys.executable, JANITOR, self.folder.parent], capture_output=True, check=True
        )
        found = json.loads(listing.stdout)
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def clone() -> Iterator[Clone]:
    # not pytest's folder, which is closed to other users
    with (
        tempfile.TemporaryDirectory(prefix="sala-clone-") as name,
        cleaned_up(Path(name).resolve()),
    ):
        top = Path(name).resolve()
        folder = top / "sala-serve"
        git = ["git", "-c", f"safe.directory={ROOT}", "-c", f"safe.directory={ROOT}/.git"]
        subprocess.run([*git, "clone", "--quiet", str(ROOT), str(folder)], check=True)
        env = {key: value for key, value in os.environ.items() if PASSED_ON.fullmatch(key)}
        path = [part for part in env["PATH"].split(":") if not Path(part).is_relative_to(ROOT)]
        env |= {"PATH": ":".join(path), "HOME": f"{top}/home", "TMPDIR": f"{top}/tmp"}
        for part in ("home", "tmp"):
            (top / part).mkdir()
        yield Clone(folder, env, hand_over(top, env))


@contextmanager
def cleaned_up(top: Path) -> Iterator[None]:
    """Nothing that was started in ``top`` outlives the block, not even if this process is killed."""
    janitor = subprocess.Popen(
        [sys.executable, JANITOR, top, "--reap"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert janitor.stdin is not None
    try:
        yield
    finally:
        janitor.stdin.close()
        assert janitor.wait(STOP_LIMIT_S) == 0, "a process of the clone cannot be ended"


def hand_over(top: Path, env: dict[str, str]) -> str | None:
    """As root, give ``top`` to ``nobody`` and return that name, if he can run Python at all."""
    if os.geteuid() != 0:
        return None
    code = "import sys, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
    probe = f"python3.11 -c '{code}' || python3 -c '{code}'"
    try:
        subprocess.run(["sh", "-c", probe], env=env, cwd="/", check=True, **as_user("nobody"))
    except (KeyError, OSError, subprocess.CalledProcessError):
        return None
    top.chmod(0o755)
    subprocess.run(["chown", "-R", "nobody", str(top)], check=True)
    return "nobody"


def as_user(user: str | None) -> dict[str, Any]:
    """Arguments of Popen that make a process belong to ``user``; ``None`` leaves it as it is."""
    return (
        {}
        if user is None
        else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    )


@contextmanager
def served(
    clone: Clone, output: Path, limit_s: float, **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    """``make serve`` from its start until it is ready; ended with the block if the test did not stop it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = clone.start(readme_commands()["serve"], output, SALA_SERVE_PORT=str(port), **env)
    try:
        wait_ready(f"http://127.0.0.1:{port}/readyz", process, output, limit_s)
        yield process
    finally:
        # the gateway's death ends its engine
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def readme_commands() -> dict[str, str]:
    """The README's first code block: its ``make`` commands by target."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no bash block"
    commands = [line.split("#")[0].strip() for line in block[1].splitlines()]
    found = {line.removeprefix("make "): line for line in commands if line.startswith("make ")}
    assert list(found) == ["serve", "test"]
    return found


def wait_ready(url: str, process: subprocess.Popen[bytes], output: Path, limit_s: float) -> None:
    end_at_s = time.monotonic() + limit_s
    while time.monotonic() < end_at_s:
        assert process.poll() is None, f"make serve ended:\n{tail(output)}"
        with suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"not ready after {limit_s:.0f} s:\n{tail(output)}")


def tail(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-40:])


def ask_with_printed_command(output: Path) -> dict[str, Any]:
    """Run the curl command that the server printed; without curl, send the same request."""
    end_at_s = time.monotonic() + 10
    while not (
        match := re.search(r"^curl .*?(?=\n\n)", output.read_text(), re.DOTALL | re.MULTILINE)
    ):
        assert time.monotonic() < end_at_s, f"no curl command was printed:\n{tail(output)}"
        time.sleep(0.1)
    words = shlex.split(match[0].replace("\\\n", " "))
    if shutil.which("curl"):
        answer = subprocess.run(words, capture_output=True, timeout=300, check=True).stdout
    else:
        body = words[words.index("-d") + 1].encode()
        request = urllib.request.Request(words[1], body, {"Content-Type": "application/json"})
        answer = urllib.request.urlopen(request, timeout=300).read()
    parsed = json.loads(answer)
    assert isinstance(parsed, dict)
    return parsed


def assert_all_gone(clone: Clone, process: subprocess.Popen[bytes], output: Path) -> None:
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running {STOP_LIMIT_S} s after the signal:\n{tail(output)}")
    assert clone.processes() == {}


def test_make_serve_answers_and_stops(clone: Clone, tmp_path: Path) -> None:
    output = tmp_path / "serve.log"
    with served(clone, output, FIRST_START_LIMIT_S) as process:
        answer = ask_with_printed_command(output)
        process.terminate()
        assert_all_gone(clone, process, output)
    (choice,) = answer["choices"]
    assert choice["message"]["content"].strip(), answer
    assert answer["usage"]["completion_tokens"] > 0
    assert {path.name for path in Path(clone.env["HOME"]).iterdir()} <= {".cache", ".config"}


def test_make_test_runs_some_tests(clone: Clone, tmp_path: Path) -> None:
    output = tmp_path / "test.log"
    process = clone.start(readme_commands()["test"], output, SALA_TEST_SELECT=FAST_TESTS)
    assert process.wait(FIRST_START_LIMIT_S) == 0, tail(output)
    assert re.search(r"=+ \d+ passed in [\d.]+s =+\n$", output.read_text())
    status = ["git", "-c", f"safe.directory={clone.folder}", "status", "--short"]
    changes = subprocess.run(status, cwd=clone.folder, capture_output=True, text=True, check=True)
    assert changes.stdout == "", "the commands left files that git does not ignore"


def test_second_start_needs_no_network_and_stops_on_ctrl_c(clone: Clone, tmp_path: Path) -> None:
    installed = clone.start("make install", tmp_path / "install.log")
    assert installed.wait(FIRST_START_LIMIT_S) == 0, tail(tmp_path / "install.log")
    stamp = clone.folder / ".venv/.stamp"
    installed_at_unix_s = stamp.stat().st_mtime
    output = tmp_path / "serve.log"
    with served(clone, output, NEXT_START_LIMIT_S, **DEAD_INDEX) as process:
        assert "scripts/install" not in output.read_text()
        assert stamp.stat().st_mtime == installed_at_unix_s
        os.killpg(process.pid, signal.SIGINT)
        assert_all_gone(clone, process, output)
