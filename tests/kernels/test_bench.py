from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

KERNELS = Path(__file__).parents[2] / "kernels"
BENCH = runpy.run_path(str(KERNELS / "bench/run.py"))


@pytest.fixture
def cases() -> list[Any]:
    spec = BENCH["SalaSpec"].from_file(BENCH["CHECKPOINT"])
    lightning = [BENCH["lightning_case"](spec, *shape) for shape in ((1, 70), (2, 1))]
    return [*lightning, *BENCH["sparse_cases"](spec, 7000, 3)]


def test_every_case_is_checked_and_measured(cases: list[Any]) -> None:
    *lines, summary = BENCH["run"](cases, with_engine=False)
    assert [line["op"] for line in lines] == [case.op for case in cases]
    assert set(summary["summary"]) == {f"{case.op}, {case.shape}" for case in cases}
    fields = {"op", "shape", "dtype", "ours_us", "reference_us", "ratio", "bytes", "flops"}
    fields |= {"device", "versions", "commit", "seed"}
    for line in lines:
        assert fields <= line.keys()
        assert line["repeats"] >= 3
        assert line["ours_us"]["p10"] <= line["ours_us"]["median"] <= line["ours_us"]["p90"]


@pytest.mark.parametrize("broken", range(5))
def test_nothing_is_measured_if_an_operator_is_wrong(
    broken: int, cases: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name = cases[broken].op.split()[0]
    name = {"lightning": "lightning_attention", "cache_write": "write_cache"}.get(name, name)
    right = BENCH[name]

    def wrong(first: torch.Tensor, *rest: Any) -> Any:
        return right(first.roll(1, dims=-2), *rest)

    main = BENCH["main"]
    monkeypatch.setitem(main.__globals__, name, wrong)
    monkeypatch.setitem(main.__globals__, "all_cases", lambda: cases)
    assert main([]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "against the reference" in output.err


def test_the_table_is_the_stored_measurements() -> None:
    path = KERNELS / "bench/results/cpu-2-cores.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert "summary" in lines[-1]
    assert "+changes" not in lines[-1]["commit"]
    assert BENCH["table"](lines) in (KERNELS / "README.md").read_text()
