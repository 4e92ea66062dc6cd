"""Stands in for ``vllm serve``: a fake engine on a Unix socket, with a worker process beside it.

``STUB_MODE`` says how it behaves, ``STUB_PIDS`` names the file to which it adds its process ids.
"""

# ruff: noqa: T201
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MODE = os.environ["STUB_MODE"]


def main() -> None:
    worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with Path(os.environ["STUB_PIDS"]).open("a") as pids:
        pids.write(f"{os.getpid()} {worker.pid}\n")
    if MODE == "die_at_start":
        print("(EngineCore pid=7) INFO 11-23 22:10:11 [core.py:90] Loading the model")
        print(
            "(EngineCore pid=7) ERROR 11-23 22:10:11 [core.py:900] "
            "OSError: no file named model.safetensors found"
        )
        print("RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(1)
    if MODE == "ignore_sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ignoring SIGTERM", flush=True)
    if MODE == "slow_start":
        time.sleep(1.5)
    # imported late: these take longer than everything above
    import uvicorn

    from sala_serve.engine.fake import Behaviour, FakeEngine

    arguments = sys.argv[1:]
    socket = arguments[arguments.index("--uds") + 1]
    name = arguments[arguments.index("--served-model-name") + 1]
    engine = FakeEngine(Behaviour(model=name))
    print("x" * 100_000, "a long line")
    if MODE == "ignore_sigterm":
        while True:
            time.sleep(1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # the gateway asks for the models once, when it finds the engine ready
        if MODE == "die_after_ready" and scope.get("path") == "/v1/models":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        await engine.app(scope, receive, send)

    uvicorn.run(app, uds=socket, log_level="warning")


if __name__ == "__main__":
    main()
