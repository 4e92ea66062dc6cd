"""``sala-serve``: serve a model (``up``) or its parts (``gateway``, ``engine``), fetch one, or talk to one (``chat``)."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from sala_kernels.spec import SalaSpec, SpecError
from sala_serve import terminal
from sala_serve.config import (
    ConfigError,
    Settings,
    load_chat_config,
    load_settings,
    parse_engine_url,
    parse_port,
    read_api_key_file,
)
from sala_serve.engine.launch import EngineOptions, engine_command, reserved_flag, runs_on_gpu
from sala_serve.engine.supervisor import EngineStartFailed, EngineSupervisor, RestartPolicy
from sala_serve.fetch import FetchError, fetch_checkpoint
from sala_serve.gateway import Gateway
from sala_serve.memory import freeze_what_stays, keep_large_blocks_apart
from sala_serve.serving import bind, serve
from sala_serve.telemetry.logs import configure_logging

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

logger = logging.getLogger("sala_serve")

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_USAGE = 2
MAX_SOCKET_PATH_BYTES = 107
"""Linux's limit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    own, extra = _split_at_dashes(arguments)
    options = _parser().parse_args(own)
    try:
        match options.command:
            case "up":
                return _up(options, extra)
            case "gateway":
                return _gateway(options)
            case "engine":
                return _engine(options, extra)
            case "fetch":
                return _fetch(options)
            case _:
                return _chat(options)
    except (ConfigError, SpecError) as error:
        _print_error(str(error))
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def _up(options: argparse.Namespace, extra: list[str]) -> int:
    engine_options = _engine_options(options, extra)
    model = engine_options.model
    on_gpu = runs_on_gpu()
    with _temporary_folder() as folder:
        engine_socket = Path(folder, "engine.sock")
        if len(os.fsencode(engine_socket)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(f"{folder} is too long for a socket: set TMPDIR to a shorter path")
        settings = _settings(
            options,
            engines=[{"url": "http://engine", "socket": engine_socket}],
            # the engine's own; without one vLLM counts, or refuses to start
            tokens={"tokenizer": model} if (model / "tokenizer.json").exists() else {},
        )
        listeners = _bind(settings)
        gateway = Gateway.create(settings)
        supervisor = EngineSupervisor(
            engine_command(engine_options, listen=engine_socket, on_gpu=on_gpu, env=os.environ),
            socket=engine_socket,
            monitor=gateway.monitor,
            policy=RestartPolicy(),
            print_line=lambda line: print(f"engine | {line}", file=sys.stderr, flush=True),  # noqa: T201
            clock=time.monotonic,
        )
        return _serve(gateway, listeners, supervisor)


def _engine_options(options: argparse.Namespace, extra: list[str]) -> EngineOptions:
    """Return what the command line says about the engine, once the checkpoint is known to be one.

    Raises:
        ConfigError, SpecError: a flag is not the user's to set, or the folder holds no SALA checkpoint.
    """
    if flag := reserved_flag(extra):
        raise ConfigError(
            f"{flag} cannot be passed to vLLM: sala-serve {options.command} sets it itself"
        )
    model = options.model.resolve()
    SalaSpec.from_file(model)
    return EngineOptions(
        model=model,
        served_model_name=options.served_model_name or model.name,
        max_model_len=options.max_model_len,
        dtype=options.dtype,
        tensor_parallel_size=options.tensor_parallel_size,
        extra=extra,
    )


def _engine(options: argparse.Namespace, extra: list[str]) -> int:
    command = engine_command(
        _engine_options(options, extra),
        listen=(options.host, options.port),
        on_gpu=runs_on_gpu(),
        env=os.environ,
    )
    # vLLM takes this process's place, and so its signals: under a service manager nothing stands between them
    os.execve(command.argv[0], command.argv, dict(command.env))


def _fetch(options: argparse.Namespace) -> int:
    try:
        fetch_checkpoint(options.url, sha256=options.sha256, folder=options.folder)
    except FetchError as error:
        _print_error(str(error))
        return EXIT_FAILED
    SalaSpec.from_file(options.folder)
    return 0


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="sala-serve-")
    except OSError as error:
        raise ConfigError(f"no temporary folder can be made, set TMPDIR: {error}") from None


def _gateway(options: argparse.Namespace) -> int:
    named = {"engines": [{"url": options.engine_url}]} if options.engine_url else {}
    settings = _settings(options, **named)
    listeners = _bind(settings)
    return _serve(Gateway.create(settings), listeners, None)


def _chat(options: argparse.Namespace) -> int:
    config = load_chat_config(os.environ, url=options.url, api_key=options.api_key)
    return terminal.run(
        config,
        model=options.model,
        paths=options.file,
        max_tokens=options.max_tokens,
        prompt=options.prompt,
    )


def _settings(options: argparse.Namespace, **named: Any) -> Settings:
    """Read the settings, and log as they say; ``named`` are sections that follow from the command."""
    keys = None if options.api_key_file is None else read_api_key_file(options.api_key_file)
    settings = load_settings(
        os.environ,
        file=options.config,
        overrides={
            "server": {"host": options.host, "port": options.port, "api_keys": keys},
            **named,
        },
    )
    configure_logging(settings.telemetry)
    return settings


def _bind(settings: Settings) -> tuple[socket.socket, socket.socket | None]:
    """Bind the gateway's port, and the admin port if there is one."""
    admin = settings.admin
    return (
        bind(settings.server.host, settings.server.port),
        None if admin.token is None else bind(admin.host, admin.port),
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _serve(
    gateway: Gateway,
    listeners: tuple[socket.socket, socket.socket | None],
    supervisor: EngineSupervisor | None,
) -> int:
    listener, admin_listener = listeners
    url = _url(listener)
    # a request has two sockets; at the usual 1024 the gateway could not even ask whether the engine lives
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    keep_large_blocks_apart()
    logger.info("listening on %s, settings %s", url, gateway.settings.masked())
    if admin_listener is not None:
        logger.info("admin API on %s", _url(admin_listener))
    started_at_s = gateway.clock()

    def announce() -> None:
        freeze_what_stays()
        model = gateway.pool.models()[0]
        key = ' \\\n  -H "Authorization: Bearer $API_KEY"' if gateway.keys.asks_for_keys else ""
        body = json.dumps({"model": model.name, "messages": [{"role": "user", "content": "Hello"}]})
        print(  # noqa: T201
            f"Ready after {gateway.clock() - started_at_s:.0f} s: {model.name}, "
            f"{model.max_model_len} tokens of context. Try:\n\n"
            f"curl {url}/v1/chat/completions{key} \\\n"
            f"  -H 'Content-Type: application/json' \\\n"
            f"  -d {shlex.quote(body)}\n",
            flush=True,
        )

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            serving = serve(
                gateway,
                listener,
                supervisor=supervisor,
                on_ready=announce,
                admin_listener=admin_listener,
            )
            runner.run(serving)
    except EngineStartFailed as error:
        causes = "\n".join(f"  {cause}" for cause in error.causes)
        _print_error(f"{error}. Its last errors (all of its log is above):\n{causes}")
        return EXIT_FAILED
    return 0


def _print_error(message: str) -> None:
    print(f"sala-serve: error: {message}", file=sys.stderr)  # noqa: T201


def _split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split off what follows the ``--`` of ``up`` and ``engine``."""
    if arguments[:1] not in (["up"], ["engine"]) or "--" not in arguments:
        return arguments, []
    position = arguments.index("--")
    return arguments[:position], arguments[position + 1 :]


def _usable(parse: Callable[[str], T], expected: str) -> Callable[[str], T]:
    """Wrap ``parse`` so that argparse says what was expected."""

    def parse_argument(text: str) -> T:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return parse_argument


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sala-serve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="start vLLM with a SALA checkpoint and the gateway in front of it",
        usage="sala-serve up MODEL [options] [-- VLLM_ARGUMENT ...]",
        description="Start vLLM with a SALA checkpoint and the gateway in front of it. The gateway answers "
        "at once (/readyz tells when the engine is loaded) and restarts the engine if it dies. Both log to "
        "standard error, the engine's lines with the prefix 'engine | '. SIGTERM and Ctrl-C let running "
        "requests finish (SALA_SERVE_DRAIN_TIMEOUT_S, 300 s), then stop both; a second one cuts them.",
        epilog="What follows -- goes to 'vllm serve' as it is, for example: -- --gpu-memory-utilization 0.8",
    )
    _add_engine_arguments(up)
    _add_server_arguments(up)

    gateway = commands.add_parser(
        "gateway",
        help="run the gateway alone, in front of a vLLM that already runs",
        description="Run the gateway alone, in front of a vLLM that already runs. Start that with "
        "--enable-prompt-tokens-details --sse-keep-alive-interval 15 to get cached token counts and "
        "streams that proxies do not cut during long prefills.",
    )
    gateway.add_argument(
        "--engine-url",
        type=_usable(parse_engine_url, "a URL as http://host:8001, without /v1 and without a user"),
        metavar="URL",
        help="vLLM's URL without /v1 (default: the engines of the settings' file)",
    )
    _add_server_arguments(gateway)

    engine = commands.add_parser(
        "engine",
        help="run the engine alone, for a gateway elsewhere",
        usage="sala-serve engine MODEL [options] [-- VLLM_ARGUMENT ...]",
        description="Run vLLM with a SALA checkpoint as 'up' does, but on a port, for gateways on other machines. "
        "It asks for no key: only gateways may reach it.",
        epilog="What follows -- goes to 'vllm serve' as it is; --shutdown-timeout 300 lets running requests "
        "finish after SIGTERM.",
    )
    _add_engine_arguments(engine)
    engine.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    engine.add_argument(
        "--port",
        type=_usable(parse_port, "a port number"),
        default=8001,
        help="port to listen on (default: 8001)",
    )

    fetch = commands.add_parser(
        "fetch",
        help="download a checkpoint as one archive, by its digest",
        description="Download a tar archive (plain, gzip, bzip2 or xz) of a SALA checkpoint, check its SHA-256 and "
        "unpack it into FOLDER. What is there already and has that digest is not fetched again.",
    )
    fetch.add_argument("url", metavar="URL", help="http, https or file URL of the archive")
    fetch.add_argument("folder", type=Path, metavar="FOLDER", help="of the checkpoint, made anew")
    fetch.add_argument("--sha256", required=True, metavar="HEX", help="digest of the archive")

    chat = commands.add_parser(
        "chat",
        help="ask a running gateway, from the terminal or in a pipe",
        description="Ask a running gateway. Without PROMPT: a conversation (Ctrl-C stops an answer, Ctrl-D "
        "ends), or, in a pipe, one question read from standard input. The answer goes to standard output, "
        "all else to standard error.",
    )
    chat.add_argument("prompt", nargs="?", metavar="PROMPT", help="one question")
    chat.add_argument(
        "--url", help="the gateway (default: $SALA_SERVE_URL or http://127.0.0.1:8000)"
    )
    chat.add_argument("--api-key", metavar="KEY", help="(default: $SALA_SERVE_API_KEY)")
    chat.add_argument("--model", metavar="NAME", help="(default: the first the gateway lists)")
    chat.add_argument(
        "--file",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="text file, or folder of text files, put before the question; may be repeated",
    )
    chat.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    return parser


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="name in the API (default: the folder's name)"
    )
    parser.add_argument(
        "--max-model-len",
        metavar="TOKENS",
        help="context length of prompt and answer (default: the most that memory allows)",
    )
    parser.add_argument("--dtype", help="weights and activations (default: float32 without a GPU)")
    parser.add_argument("--tensor-parallel-size", type=int, metavar="N", help="GPUs to split over")


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", help="address to listen on (default: $SALA_SERVE_HOST or 127.0.0.1)"
    )
    parser.add_argument(
        "--port",
        type=_usable(parse_port, "a port number"),
        help="port to listen on (default: $SALA_SERVE_PORT or 8000; 0: any)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings in TOML (default: $SALA_SERVE_CONFIG; docs/settings.md lists them)",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="PATH",
        help="file of accepted API keys, one a line (default: $SALA_SERVE_API_KEYS, else no key is asked)",
    )


if __name__ == "__main__":
    sys.exit(main())
