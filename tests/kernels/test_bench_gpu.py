from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "kernels/bench"))

from gpu import __main__ as command  # noqa: E402
from gpu import correctness, demo_text, environment, kernel_stage, needle, report  # noqa: E402
from gpu.engine import Timed  # noqa: E402
from gpu.results import FAILED, OK, TIMEOUT, Recorder, Results, spread  # noqa: E402
from gpu.settings import H200, MINIATURE, SCALES, K  # noqa: E402
from gpu.timing import Ceilings, copies_beyond_l2, times_us  # noqa: E402

CONDITIONS = {"device": "d", "driver": "1", "versions": {"torch": "2"}, "commit": "c"}
LATENCY = {"p10": 1.0, "p90": 1.0, "repeats": 1}


@pytest.fixture
def record(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / report.RESULTS, "kernels")


def test_results_of_a_repeated_stage_replace_the_older_ones(record: Recorder) -> None:
    for attempt, outcome in ((1, OK), (2, FAILED)):
        record.start({}, CONDITIONS)
        record.write("kernel", attempt=attempt)
        record.end(outcome, 1.0)
    with record.path.open("a") as file:
        file.write('{"stage": "kernels", "na')  # cut off by a kill
    results = Results.read(record.path)
    assert [line["attempt"] for line in results.find("kernels", "kernel")] == [2]
    assert not results.is_done("kernels")


def test_spread_keeps_significant_digits() -> None:
    assert spread([0.00123456]) == {
        "median": 0.001235,
        "p10": 0.001235,
        "p90": 0.001235,
        "repeats": 1,
    }
    assert spread([1.0, 2.0, 3.0])["median"] == 2.0


def test_a_request_is_timed_from_its_outputs() -> None:
    timed = Timed(sent_at_s=10.0, arrivals=[(12.0, 1), (12.5, 2), (13.0, 2)])
    assert timed.ttft_s == 2.0
    assert timed.tpot_s == 0.25
    assert timed.num_tokens(12.0, 12.5) == 2


def test_a_roofline_is_the_slower_of_memory_and_compute() -> None:
    ceilings = Ceilings(bytes_per_s=1e12, flops_per_s=1e14)
    assert ceilings.bound_us(10**6, 10**6) == (1.0, "memory")
    assert ceilings.bound_us(10**6, 10**9) == (10.0, "compute")
    assert copies_beyond_l2(1 << 40) == 1
    assert copies_beyond_l2(1) == 64


def test_input_sets_take_turns() -> None:
    called: list[int] = []
    times = times_us([lambda i=i: called.append(i) for i in range(2)], "cpu")
    assert called[:2] == [0, 1]
    assert set(called[2:]) == {0, 1}
    assert len(times) == len(called) - 2


def small_scale() -> Any:
    return replace(MINIATURE, kernel_contexts=(512,), batch=(2, 300), kernel_step_tokens=64)


def test_every_operator_is_checked_and_measured(record: Recorder) -> None:
    record.start({}, CONDITIONS)
    assert kernel_stage.run(record, small_scale(), grids=[]) == 0
    record.end(OK, 1.0)
    lines = Results.read(record.path).find("kernels", "kernel")
    operators = {line["op"] for line in lines}
    for op in ("lightning", "cache_write", "select_blocks", "attend_blocks"):
        assert {f"{op} prefill", f"{op} decode"} <= operators
    assert {"add_rms_norm", "norm_rope", "norm_gate"} <= operators
    assert all(line["gate_error"] <= line["gate_bound"] for line in lines if "gate_error" in line)
    assert all(line["time_us"]["median"] > 0 < line["bytes"] for line in lines)
    table = report.operators(Results.read(record.path))
    assert all(op in table for op in operators)


def test_a_wrong_operator_has_no_time(record: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_stage.lightning_case.__globals__["lightning_attention"]
    monkeypatch.setitem(
        kernel_stage.lightning_case.__globals__,
        "lightning_attention",
        lambda *arguments: right(*arguments).roll(1, dims=-1),
    )
    record.start({}, CONDITIONS)
    assert kernel_stage.run(record, small_scale(), grids=[], only="lightning") == 3
    lines = Results.read(record.path).find("kernels", "kernel")
    assert {line["failed"] for line in lines} == {"wrong output"}
    assert not any("time_us" in line for line in lines)


class Tiling(NamedTuple):
    rows: int
    num_warps: int


def test_constants_are_varied_and_put_back() -> None:
    grid = kernel_stage.Grid.parse("lightning.torch_impl:SIZE=1,2;TILING.rows=8;choose.rows=4")
    assert grid.module_name == "sala_kernels.lightning.torch_impl"
    assert [variant["SIZE"] for variant in grid.variants()] == [1, 2]
    module = ModuleType("module")
    before = {"SIZE": 7, "TILING": Tiling(1, 2), "choose": lambda dim: Tiling(dim, 2)}
    module.__dict__.update(before)
    with kernel_stage.constants(module, next(grid.variants())):
        assert (module.SIZE, module.TILING, module.choose(64)) == (1, Tiling(8, 2), Tiling(4, 2))
    assert {name: getattr(module, name) for name in before} == before
    with (
        pytest.raises(AttributeError, match="MISSING"),
        kernel_stage.constants(module, {"MISSING": 1}),
    ):
        pass
    with pytest.raises(ValueError, match="--tune: expected"):
        kernel_stage.Grid.parse("lightning:SIZE=")


@pytest.mark.parametrize("context", [300, 1024])
def test_selection_is_compared_with_float64(context: int, record: Recorder) -> None:
    record.start({}, CONDITIONS)
    config = json.loads((ROOT / "tests/golden/released_config.json").read_text())
    spec = correctness.SalaSpec.from_config(config | MINIATURE.sala_overrides)
    shapes = correctness.Shapes(spec, "cpu", torch.float32)
    torch.manual_seed(0)
    correctness.selection_overlap(record, shapes, context)
    lines = Results.read(record.path).find("kernels", "selection")
    assert {line["way"] for line in lines} == {"prompt step", "decode"}
    for line in lines:
        assert line["overlap_frac"] == 1.0
        assert line["all_forced"]


def test_a_selection_of_other_blocks_is_seen(
    record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = correctness.select_blocks

    def without_scores(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(torch.zeros_like(q), *rest)

    monkeypatch.setattr(correctness, "select_blocks", without_scores)
    config = json.loads((ROOT / "tests/golden/released_config.json").read_text())
    spec = correctness.SalaSpec.from_config(config | MINIATURE.sala_overrides)
    record.start({}, CONDITIONS)
    correctness.selection_overlap(
        record, correctness.Shapes(spec, "cpu", torch.float32), context=1024
    )
    lines = Results.read(record.path).find("kernels", "selection")
    assert all(line["overlap_frac"] < 0.999 for line in lines)


def test_greedy_gaps_are_zero_where_the_model_agrees() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            # token t is followed by t + 1
            return torch.nn.functional.one_hot(ids + 1, 11).float()

    gaps = correctness.greedy_gaps(Model(), [1, 2], [3, 4, 9])  # type: ignore[arg-type]
    assert gaps.tolist() == [0.0, 0.0, 1.0]


def fill(path: Path, ours_s: float) -> Results:
    """Store a run in which every time is proportional to ``ours_s``."""
    for stage, factor in (("sala", 1.0), ("full-attention", 10.0)):
        recorder = Recorder(path, stage)
        recorder.start({}, CONDITIONS)
        for tokens in H200.lengths:
            times = {
                "ttft_s": {"median": ours_s * factor, **LATENCY},
                "tpot_s": {"median": ours_s / 1e4, **LATENCY},
            }
            recorder.write("latency", prompt_tokens=tokens, **times)
    recorder = Recorder(path, "sala")
    for requests, rate in ((1, 200.0), (16, 1700.0)):
        recorder.write(
            "decode_throughput", requests=requests, prompt_tokens=128 * K, tokens_per_s=rate
        )
    return Results.read(path)


def test_bars_pass_and_fail(tmp_path: Path) -> None:
    bars = {bar.figure: bar for bar in report.bars(fill(tmp_path / "a.jsonl", 2.0))}
    assert bars["TTFT at 512K, full attention ÷ ours"].measured == 10.0
    assert bars["TTFT at 512K, full attention ÷ ours"].passed
    assert bars["TTFT at 1024K, s"].passed
    assert bars["decode throughput, 16 requests at 128K ÷ one"].measured == 8.5
    missing = bars["TTFT of a second question on a cached 1M document, s"]
    assert missing.measured is None
    assert not missing.passed
    slow = {bar.figure: bar for bar in report.bars(fill(tmp_path / "b.jsonl", 60.0))}
    assert not slow["TTFT at 1024K, s"].passed
    assert "**no**" in slow["TTFT at 1024K, s"].row()


def test_the_report_has_tables_and_plots(tmp_path: Path) -> None:
    fill(tmp_path / report.RESULTS, 2.0)
    text = report.write(tmp_path)
    assert (tmp_path / report.REPORT).read_text() in text
    assert report.SGLANG_LABEL in text
    for name in ("ttft.png", "tpot.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_needles_lie_in_a_text_longer_than_the_novel() -> None:
    novel = demo_text.text_ids(None)
    num_tokens = 2 * len(novel)
    shallow, deep = needle.cases(2, num_tokens)
    tokenizer = demo_text.load_tokenizer()
    for case in (shallow, deep):
        assert len(case.prompt_ids) == num_tokens
        assert tokenizer.decode(case.prompt_ids).count(case.answer) == 1
    assert shallow.depth_frac < 0.5 < deep.depth_frac


@pytest.mark.parametrize(
    ("code", "limit_s", "outcome"),
    [
        ("pass", 20, OK),
        ("raise SystemExit(3)", 20, FAILED),
        ("import time; time.sleep(60)", 1, TIMEOUT),
    ],
)
def test_a_stage_ends_in_its_time(
    code: str, limit_s: float, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho said; exec {sys.executable} -c "{code}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(command, "sys", SimpleNamespace(executable=str(python)))
    start_s = time.monotonic()
    assert command.run_stage("serving", [], tmp_path, limit_s) == outcome
    assert time.monotonic() - start_s < 15
    results = Results.read(tmp_path / report.RESULTS)
    assert results.is_done("serving") == (outcome == OK)
    (end,) = results.find("serving", "end")
    assert ("said" in end["detail"]) == (outcome != OK)


def test_stages_are_chosen_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def stage(name: str, *_: object) -> str:
        ran.append(name)
        return OK

    monkeypatch.setattr(command, "run_stage", stage)
    recorder = Recorder(tmp_path / report.RESULTS, "kernels")
    recorder.start({}, CONDITIONS)
    recorder.end(OK, 1.0)
    arguments = ["--out", str(tmp_path), "--stages", "serving,kernels", "--resume"]
    assert command.main(arguments) == 0
    assert ran == ["serving"]
    with pytest.raises(SystemExit):
        command.parse(["--stages", "servings"])
    assert "unknown servings" in capsys.readouterr().err


def test_the_command_line_changes_the_scale() -> None:
    options = command.parse(["--lengths", "16384,131072", "--engine", '{"max_num_seqs": 4}'])
    scale = command.scale_of(options)
    assert scale.lengths == {16 * K: 3, 128 * K: 1}
    assert scale.sala_engine["max_num_seqs"] == 4
    assert scale.one_request_engine["max_num_seqs"] == 4
    assert scale.sala_engine["max_num_batched_tokens"] == 8448
    # the served context stays: decode is laid out for it
    assert scale.max_model_len == H200.max_model_len == 513 * 2048


def test_plugins_are_declared_where_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "entry_points", lambda group: ())
    environment.declare_plugins(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = {entry.name: entry.value for entry in entry_points(group=environment.PLUGIN_GROUP)}
    assert found == {name: target for name, (_, target) in environment.PLUGINS.items()}


@pytest.mark.parametrize("name", SCALES)
def test_models_are_written_as_their_engines_expect(name: str, tmp_path: Path) -> None:
    scale = SCALES[name]
    for arguments in (scale.sala_arguments(tmp_path), scale.full_attention_arguments(tmp_path)):
        config = json.loads((Path(arguments["model"]) / "config.json").read_text())
        assert config["max_position_embeddings"] >= arguments["max_model_len"]
    assert max(scale.lengths) + 65 <= scale.max_model_len
    correctness.SalaSpec.from_file(tmp_path / "sala")
