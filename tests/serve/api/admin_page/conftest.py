"""A real browser for the admin page's tests."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
from contextlib import asynccontextmanager

import pytest

from sala_serve.serving import GatewayServer, bind

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HINT = "no chromium on PATH (apt-get install chromium): the admin page is NOT tested in a browser"


class Browser:
    """One tab of a headless chromium, driven over the DevTools protocol through a pair of pipes."""

    def __init__(self, reader, write):
        self._reader = reader
        self._write = write
        self._ids = itertools.count(1)
        self._answers = {}
        self._session_id = None
        self.problems = []
        """What the console showed as an error: exceptions, refusals of the content security policy."""

    async def listen(self):
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            if (waiting := self._answers.pop(message.get("id"), None)) is not None:
                waiting.set_result(message)
            elif message.get("method") == "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error":
                    self.problems.append(f"{entry['text']} {entry.get('url', '')}")
            elif message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(message["params"]["exceptionDetails"]))

    async def call(self, method, **params):
        message = {"id": next(self._ids), "method": method, "params": params}
        if self._session_id is not None:
            message["sessionId"] = self._session_id
        self._answers[message["id"]] = answer = asyncio.get_running_loop().create_future()
        self._write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(30):
            result = await answer
        assert "error" not in result, result
        return result["result"]

    async def open(self):
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session_id = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def goto(self, url):
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def js(self, expression):
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression):
        """Wait until an expression is true, a minute at most; pages may be exchanged meanwhile."""
        async with asyncio.timeout(60):
            while True:
                result = await self.call(
                    "Runtime.evaluate", expression=f"Boolean({expression})", returnByValue=True
                )
                if result["result"].get("value"):
                    return
                await asyncio.sleep(0.02)

    async def click(self, selector):
        """Press and release the mouse in the middle of an element, as a person does."""
        await self.until(f"document.querySelector({selector!r})")
        await self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = await self.js(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    async def type(self, text):
        await self.call("Input.insertText", text=text)

    async def text(self, selector):
        return await self.js(f"document.querySelector({selector!r})?.innerText")

    async def screenshot(self, path, *, width, height):
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        await self.call("Emulation.setScrollbarsHidden", hidden=True)
        result = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(result["data"]))


@asynccontextmanager
async def _chromium(folder):
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(HINT)
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    # the browser looks for its ends at 3 and 4, which may be taken in this process: bash puts them there
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", program),
        *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}"),
        *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "about:blank"),
        pass_fds=(to_browser, from_browser),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    os.close(to_browser)
    os.close(from_browser)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**26)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(to_us, "rb")
    )
    writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(from_us, "wb"))
    browser = Browser(reader, writer.write)
    listening = asyncio.create_task(browser.listen())
    try:
        await browser.open()
        yield browser
    finally:
        listening.cancel()
        await asyncio.wait({listening})
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(20):
            await process.wait()
        writer.close()
        transport.close()


@pytest.fixture
async def browser(tmp_path):
    """A tab of a headless chromium, skipped loudly where there is none."""
    async with _chromium(tmp_path / "browser") as browser:
        yield browser


@asynccontextmanager
async def _served(app):
    listener = bind("127.0.0.1", 0)
    server = GatewayServer(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
def served():
    """A function that serves an application for the length of a block, which gets its URL."""
    return _served
