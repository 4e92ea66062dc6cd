"""What a scheduler tells about its requests, with vLLM's own requests and names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.request import Request, RequestStatus

from vllm_ext import progress
from vllm_ext.progress import INTERVAL_S, LONG_STEP_TOKENS, ProgressFile, name_of, read_progress

pytestmark = pytest.mark.engine

CAPACITY_TOKENS = 1000


class Scheduler:
    """As much of a scheduler as is looked at, and its clock."""

    def __init__(self, path: Path) -> None:
        self.requests: dict[str, Request] = {}
        self.kv_cache_manager = SimpleNamespace(usage=0.0)
        self.now_s = 0.0
        self.file = ProgressFile(
            path, capacity_tokens=CAPACITY_TOKENS, max_num_seqs=8, clock=lambda: self.now_s
        )
        self.folder = path.parent

    def add(self, request_id: str, num_prompt_tokens: int) -> Request:
        request = Request(request_id, list(range(num_prompt_tokens)), SamplingParams(), None)
        self.requests[request_id] = request
        return request

    def told(self, num_tokens: int = LONG_STEP_TOKENS) -> dict[str, Any]:
        """What is told after a step of so many tokens."""
        self.file.step_ended(self, num_tokens)  # type: ignore[arg-type]
        document = read_progress(self.folder)
        assert document is not None
        return document


@pytest.fixture
def scheduler(tmp_path: Path) -> Scheduler:
    return Scheduler(tmp_path / "engine-0.json")


def internal_ids(external_id: str, num_answers: int = 1) -> list[str]:
    """Ids by which the scheduler knows a request, made by vLLM."""
    request = EngineCoreRequest(
        request_id=external_id,
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=SamplingParams(n=num_answers),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    InputProcessor.assign_request_id(request)
    if num_answers == 1:
        return [request.request_id]
    parent = ParentRequest(request)
    return [parent.get_child_info(index)[0] for index in range(num_answers)]


@pytest.mark.parametrize("name", ["abc.0123abcd", "a-b_c:1", "7_x-00000000", "cmpl-1"])
@pytest.mark.parametrize("prefix_suffix", [("chatcmpl-", ""), ("cmpl-", "-0"), ("cmpl-", "-12")])
@pytest.mark.parametrize("num_answers", [1, 2])
def test_requests_have_the_names_they_were_sent_with(
    name: str, prefix_suffix: tuple[str, str], num_answers: int
) -> None:
    prefix, suffix = prefix_suffix
    ids = internal_ids(f"{prefix}{name}{suffix}", num_answers)
    assert len(set(ids)) == num_answers
    assert {name_of(each) for each in ids} == {name}


def test_names_without_random_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    (request_id,) = internal_ids("chatcmpl-a-00000000")
    assert name_of(request_id) == "a-00000000"


def test_folder_is_the_servers_own_and_named_to_its_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress.atexit, "register", lambda _remove: None)
    monkeypatch.setattr(progress.os, "environ", os.environ.copy())
    monkeypatch.setenv("VLLM_PLUGINS", "sala")
    progress.choose_folder()
    assert progress.FOLDER_VARIABLE not in os.environ
    monkeypatch.setenv("VLLM_PLUGINS", "sala,sala_progress")
    progress.choose_folder()
    folder = Path(os.environ[progress.FOLDER_VARIABLE])
    assert folder.stat().st_mode & 0o777 == 0o700
    progress.choose_folder()
    assert os.environ[progress.FOLDER_VARIABLE] == str(folder)
    folder.rmdir()


def test_one_request_from_arrival_to_its_answer(scheduler: Scheduler) -> None:
    request = scheduler.add("chatcmpl-r-00000000", 100)

    def look() -> dict[str, Any]:
        (found,) = scheduler.told()["requests"].items()
        assert found[0] == "r"
        return dict(found[1])

    assert look() == {
        "phase": "waiting",
        "num_prompt_tokens": 100,
        "num_computed_tokens": 0,
        "num_cached_tokens": 0,
        "num_output_tokens": 0,
    }
    assert request.prefill_stats is not None
    request.prefill_stats.set(100, 30, 0)
    request.status = RequestStatus.RUNNING
    # 30 of the cache; 40 are computed by a step whose end is not known
    request.num_computed_tokens, request.num_in_flight_tokens = 70, 40
    assert (look()["phase"], look()["num_computed_tokens"]) == ("prefilling", 30)
    request.num_in_flight_tokens = 0
    assert (look()["phase"], look()["num_computed_tokens"]) == ("prefilling", 70)
    request.num_computed_tokens = 100
    request.take_prefill_stats()
    request.append_output_token_ids([5, 6])
    request.num_computed_tokens = 101
    assert look() == {
        "phase": "decoding",
        "num_prompt_tokens": 100,
        "num_computed_tokens": 100,
        "num_cached_tokens": 30,
        "num_output_tokens": 2,
    }
    request.status = RequestStatus.PREEMPTED
    request.num_computed_tokens = 0
    assert (look()["phase"], look()["num_computed_tokens"]) == ("waiting", 0)
    del scheduler.requests[request.request_id]
    assert scheduler.told(num_tokens=1)["requests"] == {}


def test_several_answers_are_added_up(scheduler: Scheduler) -> None:
    first = scheduler.add("0_chatcmpl-r-00000000", 100)
    scheduler.add("1_chatcmpl-r-00000000", 100)
    first.status = RequestStatus.RUNNING
    first.num_computed_tokens = 60
    requests = scheduler.told()["requests"]
    assert requests["r"]["phase"] == "prefilling"
    assert requests["r"]["num_prompt_tokens"] == 200
    assert requests["r"]["num_computed_tokens"] == 60


def test_memory_and_steps_are_told(scheduler: Scheduler) -> None:
    scheduler.kv_cache_manager.usage = 0.25
    before = scheduler.told()
    assert before["kv"] == {"capacity_tokens": CAPACITY_TOKENS, "used_tokens": 250}
    assert before["max_num_seqs"] == 8
    assert scheduler.told()["step"] == before["step"] + 1
    assert scheduler.told(num_tokens=0)["step"] == before["step"] + 1


def test_short_steps_are_told_now_and_then_long_ones_each(scheduler: Scheduler) -> None:
    scheduler.add("chatcmpl-r-00000000", 100)
    step = scheduler.told(num_tokens=1)["step"]
    assert scheduler.told(num_tokens=1)["step"] == step
    assert scheduler.told(num_tokens=LONG_STEP_TOKENS)["step"] == step + 2
    assert scheduler.told(num_tokens=1)["step"] == step + 2
    scheduler.now_s += INTERVAL_S
    assert scheduler.told(num_tokens=1)["step"] == step + 4


def test_schedulers_of_one_server_are_read_as_one(tmp_path: Path) -> None:
    documents = []
    for rank, name in enumerate("ab"):
        scheduler = Scheduler(tmp_path / f"engine-{rank}.json")
        scheduler.add(f"chatcmpl-{name}-00000000", 10)
        documents.append(scheduler.told())
    both = documents[1]
    assert set(both["requests"]) == {"a", "b"}
    assert both["step"] == 2
    assert both["kv"]["capacity_tokens"] == 2 * CAPACITY_TOKENS
    assert both["instance"].startswith(documents[0]["instance"])


def test_full_disk_leaves_no_old_news_and_no_error(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.add("chatcmpl-r-00000000", 100)
    scheduler.told()
    (scheduler.folder / "engine-0.new").mkdir()
    scheduler.file.step_ended(scheduler, LONG_STEP_TOKENS)  # type: ignore[arg-type]
    assert read_progress(scheduler.folder) is None
    assert "cannot be written" in caplog.text


def test_nothing_is_written_unless_the_plugin_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=3),
        cache_config=SimpleNamespace(kv_cache_size_tokens=5),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
    )
    monkeypatch.setenv(progress.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("VLLM_PLUGINS", "sala")
    assert ProgressFile.of_engine(config) is None
    monkeypatch.setenv("VLLM_PLUGINS", "sala,sala_progress")
    file = ProgressFile.of_engine(config)
    assert file is not None
    scheduler = Scheduler(tmp_path / "other" / "engine-0.json")
    file.step_ended(scheduler, 1)  # type: ignore[arg-type]
    document = json.loads((tmp_path / "engine-3.json").read_text())
    assert (document["kv"]["capacity_tokens"], document["max_num_seqs"]) == (5, 2)
    file.remove()
    assert read_progress(tmp_path) is None
