from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from sala_serve.config import ConfigError
from sala_serve.engine import launch
from sala_serve.engine.launch import (
    EngineOptions,
    engine_command,
    num_physical_cores,
    reserved_flag,
)

SOCKET = Path("/run/engine.sock")


PROGRESS_ENV = {
    "VLLM_PLUGINS": "sala,theirs,sala_progress",
    "SALA_VLLM_PROGRESS_FOLDER": "/run",
}


@pytest.fixture(autouse=True)
def installed_plugins(monkeypatch):
    names = {"vllm.general_plugins": ["sala"], "vllm.platform_plugins": ["theirs"]}

    def entry_points(*, group):
        return [EntryPoint(name, "module:attribute", group) for name in names.get(group, [])]

    monkeypatch.setattr(launch.metadata, "entry_points", entry_points)


def command(on_gpu=False, env=None, **options):
    engine = EngineOptions(model=Path("/models/m"), served_model_name="m", **options)
    return engine_command(engine, listen=SOCKET, on_gpu=on_gpu, env=env or {})


def value(argv, flag):
    return argv[argv.index(flag) + 1]


def test_cpu_gets_what_suits_a_small_machine():
    it = command()
    assert value(it.argv, "--dtype") == "float32"
    assert "--enforce-eager" in it.argv
    assert value(it.argv, "--kv-cache-memory-bytes") == str(1 << 30)
    assert value(it.argv, "--distributed-executor-backend") == "uni"
    assert it.env == PROGRESS_ENV | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(num_physical_cores()),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


@pytest.mark.parametrize(
    "choice",
    [
        {"tensor_parallel_size": 2},
        {"extra": ["-tp", "2"]},
        {"extra": ["--distributed_executor_backend=mp"]},
        {"env": {"VLLM_CPU_OMP_THREADS_BIND": "0-3"}},
    ],
)
def test_users_process_layout_is_left_alone(choice):
    it = command(**choice)
    assert "uni" not in it.argv
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in it.env
    assert "OMP_NUM_THREADS" not in it.env


@pytest.mark.parametrize(
    "extra", [["--kv-cache-memory-bytes=8G"], ["--gpu-memory-utilization", "0.5"]]
)
def test_users_cache_size_is_left_alone(extra):
    it = command(extra=extra)
    assert sum("memory" in argument for argument in it.argv) == 1


def test_threads_of_one_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert num_physical_cores(tmp_path) == 2
    assert num_physical_cores(tmp_path / "hidden") == 4


def test_gpu_gets_vllms_own_defaults_and_steps_of_whole_blocks():
    it = command(on_gpu=True)
    assert value(it.argv, "--max-num-batched-tokens") == str(4 * 2048 + 256)
    assert "--dtype" not in it.argv
    assert "--enforce-eager" not in it.argv
    assert "--kv-cache-memory-bytes" not in it.argv
    assert it.env == PROGRESS_ENV


def test_users_choices_win():
    env = {"VLLM_CPU_KVCACHE_SPACE": "40"}
    extra = ["--max-num-seqs", "2"]
    it = command(
        env=env, max_model_len="64k", dtype="bfloat16", tensor_parallel_size=2, extra=extra
    )
    assert value(it.argv, "--max-model-len") == "64k"
    assert value(it.argv, "--dtype") == "bfloat16"
    assert value(it.argv, "--tensor-parallel-size") == "2"
    assert list(it.argv[-2:]) == extra
    assert it.env["VLLM_CPU_KVCACHE_SPACE"] == "40"


@pytest.mark.parametrize(
    ("chosen", "loaded"),
    [("", "sala_progress"), ("sala,x", "sala,x,sala_progress"), ("sala_progress", "sala_progress")],
)
def test_users_choice_of_plugins_is_kept_and_ours_added(chosen, loaded):
    assert command(env={"VLLM_PLUGINS": chosen}).env["VLLM_PLUGINS"] == loaded


def test_engine_takes_the_priorities_that_the_gateway_sends():
    assert value(command().argv, "--scheduling-policy") == "priority"


def test_engine_does_not_see_the_gateways_keys():
    it = command(env={"SALA_SERVE_API_KEYS": "sk-one", "SALA_VLLM_X": "1"})
    assert "SALA_SERVE_API_KEYS" not in it.env
    assert it.env["SALA_VLLM_X"] == "1"


@pytest.mark.parametrize(
    ("version", "has_driver", "expected"),
    [("0.32.0", True, True), ("0.32.0", False, False), ("0.32.0+cpu", True, False)],
)
def test_gpu_needs_a_driver_and_a_build_for_it(
    monkeypatch, tmp_path, version, has_driver, expected
):
    monkeypatch.setattr(launch.metadata, "version", lambda _name: version)
    driver = tmp_path / "nvidiactl"
    if has_driver:
        driver.touch()
    assert launch.runs_on_gpu(driver) is expected


def test_missing_vllm_is_a_clear_error(monkeypatch):
    def missing(name):
        raise launch.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(launch.metadata, "version", missing)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        launch.runs_on_gpu()


def test_engine_listens_on_the_socket_only():
    it = command()
    assert value(it.argv, "--uds") == str(SOCKET)
    assert value(it.argv, "--served-model-name") == "m"


@pytest.mark.parametrize(
    ("extra", "flag"),
    [
        (["--max-num-seqs", "2"], None),
        (["--api-key=x"], "--api-key"),
        (["--served_model_name", "x"], "--served-model-name"),
    ],
)
def test_flags_that_would_keep_the_gateway_out_are_found(extra, flag):
    assert reserved_flag(extra) == flag


def test_engine_alone_listens_on_a_port_and_keeps_its_own_progress():
    engine = EngineOptions(model=Path("/models/m"), served_model_name="m")
    it = engine_command(engine, listen=("0.0.0.0", 8001), on_gpu=True, env={})
    assert value(it.argv, "--host") == "0.0.0.0"
    assert value(it.argv, "--port") == "8001"
    assert "--uds" not in it.argv
    assert it.env == {"VLLM_PLUGINS": "sala,theirs,sala_progress"}
    assert value(it.argv, "--scheduling-policy") == "priority"
